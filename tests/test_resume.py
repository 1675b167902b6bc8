"""A run that was stopped and resumed is the run that never was: the same weights, bit for bit, the same records."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import minires
from minires import dispatch, tuning
from minires.cli import main
from minires.train import Interrupted, load_recipe, resume, train
from minires.train.checkpoint import Checkpoints
from minires.train.loop import Run
from minires.train.run_folder import RunFolder
from minires.train.state import capture

QUICK = load_recipe("digits", {"image_size": 8, "epochs": 3, "batch_size": 128, "threads": 1})  # 11 steps an epoch
EVERYTHING = {
    **{"ema": 0.9, "mixup": 0.3, "cutout": 2, "accumulate": 2, "clip": 1.0, "decay_norm": False, "workers": 2},
    **{"val": 200, "recalibrate": True, "eval_every": 2, "checkpoint_every": 4},
}


def stop_at(*steps, signals=(signal.SIGTERM, signal.SIGINT)):
    """An on_step that signals this very process when one of the steps is done."""

    def on_step(step):
        if step.step in steps:
            os.kill(os.getpid(), signals[step.step % len(signals)])

    return on_step


def finish(folder, recipe, stops):
    """Run to the end, stopped after each of `stops`. Returns the notes."""
    notes = []
    stops = list(stops)
    with contextlib.suppress(Interrupted):
        train(dataclasses.replace(recipe, out=str(folder)), on_step=stop_at(*stops), on_note=notes.append)
    for _ in range(len(stops) - 1):
        with pytest.raises(Interrupted):
            resume(folder, on_step=stop_at(*stops), on_note=notes.append)
    if stops:
        resume(folder, on_note=notes.append)
    return notes


def records(folder):
    """The metrics without what a clock says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def assert_same_run(a, b):
    ours, theirs = (minires.load(folder / "model.safetensors") for folder in (a, b))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].array.tobytes() != theirs[name].array.tobytes()] == []
    assert records(a) == records(b)
    checkpoints = [Checkpoints(folder / "checkpoints").load() for folder in (a, b)]
    for part in range(2):
        assert checkpoints[0] is not None and checkpoints[1] is not None
        arrays = checkpoints[part].arrays
        assert all(arrays[name].tobytes() == checkpoints[1 - part].arrays[name].tobytes() for name in arrays)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (a, b)]
    for name in ("test_accuracy", "test_loss", "steps", "best_accuracy", "best_step"):
        assert summaries[0][name] == summaries[1][name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs without a break, made once: whole(changes) is the folder."""
    made = {}

    def run(**changes):
        key = tuple(sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            train(dataclasses.replace(QUICK, out=str(made[key]), **changes))
        return made[key]

    return run


@pytest.mark.parametrize(
    "stops",
    [[1], [5, 6], [11], [22], [33], [2, 11, 13, 22, 30]],
    ids=["after the first step", "in an epoch", "end of an epoch", "end of the second", "after the last", "often"],
)
def test_any_step_bit_for_bit(tmp_path, whole, stops):
    notes = finish(tmp_path / "run", QUICK, stops)
    assert_same_run(tmp_path / "run", whole())
    assert notes == []


@pytest.mark.parametrize("stops", [[3, 4, 17], [9, 10, 18, 26], [27]], ids=str)
def test_with_average_mixup_cutout_workers_and_all(tmp_path, whole, stops):
    finish(tmp_path / "run", dataclasses.replace(QUICK, **EVERYTHING), stops)
    assert_same_run(tmp_path / "run", whole(**EVERYTHING))


@pytest.mark.parametrize("kind", ["adamw", "lars"])
def test_other_optimizers(tmp_path, whole, kind):
    changes = {"optimizer": kind, "lr": 0.01, "epochs": 2}
    finish(tmp_path / "run", dataclasses.replace(QUICK, **changes), [7])
    assert_same_run(tmp_path / "run", whole(**changes))


def test_random_numbers_go_on_where_they_were(tmp_path, whole, monkeypatch):
    """A model that draws in its forward pass (dropout)."""
    from minires.models.resnet import ResNet
    from minires.ops import dropout

    head = ResNet.head
    monkeypatch.setattr(ResNet, "head", lambda self, x: head(self, dropout(x, 0.3, self.training)))
    train(dataclasses.replace(QUICK, epochs=1, out=str(tmp_path / "whole")))
    finish(tmp_path / "run", dataclasses.replace(QUICK, epochs=1), [4])
    minires.manual_seed(99)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, whole):
    """SIGKILL in another process, between two checkpoints; half-written files are swept, no record is doubled."""
    code = (
        "import dataclasses, os, signal; from minires.train import *\n"
        f"recipe = load_recipe('digits', {dict(image_size=8, epochs=3, batch_size=128, threads=1)!r})\n"
        f"recipe = dataclasses.replace(recipe, checkpoint_every=5, out={str(tmp_path / 'run')!r})\n"
        "train(recipe, on_step=lambda s: s.step == 18 and os.kill(os.getpid(), signal.SIGKILL))"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "NUMBA_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    checkpoints = tmp_path / "run" / "checkpoints"
    assert Checkpoints(checkpoints).steps() == [11, 15]
    (checkpoints / ".step-00000020.safetensors.tmp-1").write_bytes(b"half")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "st')
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole())
    assert not list(checkpoints.glob(".*"))


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, whole):
    RunFolder.new(dataclasses.replace(QUICK, out=str(tmp_path / "run"))).close()
    notes = []
    resume(tmp_path / "run", on_note=notes.append)
    assert notes == [f"{tmp_path / 'run'} has no checkpoint yet: starting from the beginning"]
    assert_same_run(tmp_path / "run", whole())


@pytest.fixture
def stopped(tmp_path):
    """A run stopped after step 14 of 33, with checkpoints of steps 11 and 14."""
    with pytest.raises(Interrupted):
        train(dataclasses.replace(QUICK, out=str(tmp_path / "run")), on_step=stop_at(14))
    return tmp_path / "run"


def rewrite(folder, change):
    """Write the last checkpoint again, with another state."""
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoint = checkpoints.load()
    assert checkpoint is not None
    change(checkpoint.state)
    checkpoints.save(checkpoint.state["step"], checkpoint.arrays, checkpoint.state)


def damage(folder, step):
    path = Checkpoints(folder / "checkpoints").path(step)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(stopped, whole):
    damage(stopped, 14)
    notes = []
    resume(stopped, on_note=notes.append)
    assert len(notes) == 1 and "step-00000014.safetensors is damaged: its checksum is wrong" in notes[0]
    assert "going back to step 11" in notes[0]
    assert_same_run(stopped, whole())


def test_all_checkpoints_damaged(stopped, capsys):
    damage(stopped, 11)
    damage(stopped, 14)
    assert main(["train", "--resume", str(stopped)]) == 2
    assert "there is no earlier one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lr", "0.2"], "lr=0.2 differs from the run's 0.1"),
        (["--seed", "1"], "seed=1 differs from the run's 0"),
        (["--model", "resnet32"], "model='resnet32' differs"),
        (["--ema", "0.5"], "ema=0.5 differs"),
        (["--device", "cuda"], "device='cuda' differs"),
        (["--epochs", "4"], "epochs=4 differs from the run's 3; with --extend it is taken"),
        (["--extend"], "--extend needs --epochs or --steps"),
        (["--epochs", "1", "--extend"], "at step 14 already, beyond the 11 asked for"),
        (["--out", "elsewhere"], "does not go with a resumed run"),
        (["--recipe", "digits"], "does not go with --resume"),
        (["--workers", "-1"], "workers=-1 must not be negative"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_may_not_change(stopped, capsys, arguments, says):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(stopped), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and error.startswith("minires: error: ")
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def test_what_changes_nothing_may_change(stopped, whole):
    resume(stopped, {"workers": 1, "keep": 1, "checkpoint_every": 3})
    assert_same_run(stopped, whole())
    assert load_recipe(str(stopped / "recipe.toml")).keep == 1
    assert len(Checkpoints(stopped / "checkpoints").steps()) <= 2  # the last, and the best


def test_a_run_is_lengthened_when_asked(tmp_path, stopped):
    summary = resume(stopped, {"epochs": 4}, extend=True)
    assert (summary.steps, summary.epochs) == (44, 4)
    assert [row["epoch"] for row in records(stopped)] == [1, 2, 3, 4]
    assert load_recipe(str(stopped / "recipe.toml")).epochs == 4
    with pytest.raises(ValueError, match="is complete; to train on, give --epochs N --extend"):
        resume(stopped)
    assert resume(stopped, {"epochs": 5}, extend=True).steps == 55


def test_other_images_are_noticed(stopped):
    rewrite(stopped, lambda state: state.update(data="the hash of other images"))
    with pytest.raises(ValueError, match="the images are not the ones"):
        resume(stopped)


def test_a_recipe_file_that_was_changed_is_noticed(stopped):
    path = stopped / "recipe.toml"
    path.write_text(
        path.read_text().replace("weight_decay = 0.0005", "weight_decay = 0.5").replace("keep = 2", "keep = 3")
    )
    with pytest.raises(ValueError, match=r"weight_decay=0.5 in .*recipe.toml, but the checkpoint was made with 0.0005"):
        resume(stopped)


def test_other_versions_and_thread_counts_are_said(stopped):
    rewrite(stopped, lambda state: (state["versions"].update(numpy="1.0"), state["threads"].update(kernels=64)))
    notes = []
    resume(stopped, on_note=notes.append)
    assert [note.count("\n") for note in notes] == [0, 0]
    assert "versions changed" in notes[0] and "numpy 1.0 -> " in notes[0]
    assert "threads changed" in notes[1] and "kernels 64 -> 1" in notes[1]


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_no_run_folder(tmp_path, capsys, path):
    (tmp_path / "empty").mkdir()
    assert main(["train", "--resume", str(tmp_path / path)]) == 2
    assert "no folder" in capsys.readouterr().err or path == "empty"
    assert not list((tmp_path / "empty").iterdir())


def test_two_processes_never_train_in_one_folder(stopped):
    held = RunFolder.existing(stopped, 2)
    with pytest.raises(RuntimeError, match="another process is training in"):
        resume(stopped)
    held.close()
    assert resume(stopped).steps == 33


def test_a_full_disk_ends_the_run_in_one_line(tmp_path, stopped, whole, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # less than the weights need
    try:
        assert main(["train", "--resume", str(stopped)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert "File too large" in error and error.count("\n") == 1
    resume(stopped)  # nothing was lost
    assert_same_run(stopped, whole())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    run = Run(dataclasses.replace(QUICK, out=str(tmp_path / "run")))
    run.save()
    run.step = 1
    run.model.fc.weight.array[0, 0] = np.nan
    with pytest.raises(RuntimeError, match=r"fc.weight is not finite after step 1; try a smaller lr"):
        run.save()
    assert run.folder.checkpoints.steps() == [0]
    run.folder.close()


def test_the_plan_of_kernels_is_kept(tmp_path, monkeypatch):
    """What autotune measured is chosen again after a resume, however the clock would decide now."""
    monkeypatch.setattr(dispatch, "_measured", {})
    monkeypatch.setattr(tuning, "fastest", lambda key, rivals, arrays, params: rivals[-1])
    recipe = dataclasses.replace(QUICK, autotune=True, epochs=1, out=str(tmp_path / "run"))
    with pytest.raises(Interrupted):
        train(recipe, on_step=stop_at(2))
    assert len(dispatch.plan()) > 20
    dispatch._measured.clear()
    monkeypatch.setattr(tuning, "fastest", lambda key, rivals, arrays, params: rivals[0])
    checkpoint = Checkpoints(tmp_path / "run" / "checkpoints").load()
    assert checkpoint is not None
    resume(tmp_path / "run")
    after = {json.dumps(entry[:-1]): entry[-1] for entry in dispatch.plan()}
    kept = {json.dumps(entry[:-1]): entry[-1] for entry in checkpoint.state["plan"]}
    assert kept and all(after[key] == name for key, name in kept.items())
    assert not any("sgd_step" in key and "lr" in key for key in kept)  # a learning rate is not a shape


def test_a_kernel_of_the_plan_that_is_gone_is_named():
    assert dispatch.restore_plan([["relu_fprop", "cpu", [], [], "no_such_kernel"]]) == ["relu_fprop: no_such_kernel"]


def test_a_checkpoint_is_a_copy(tmp_path):
    run = Run(dataclasses.replace(QUICK, out=str(tmp_path / "run")))
    arrays, state = capture(run)
    assert all(array.flags.c_contiguous for array in arrays.values()) and json.loads(json.dumps(state))["step"] == 0
    run.folder.close()


# --- signals, from outside ----------------------------------------------------------------------------------------

COMMAND = ["train", "--image-size", "8", "--epochs", "40", "--batch-size", "128", "--threads", "1", "--out", "run"]


def start(cwd, *arguments):
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "minires", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"no line with {text!r}: {process.stderr.read()}")


@pytest.mark.parametrize(
    ("number", "code", "says"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "inter")]
)
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number, code, says):
    process = start(tmp_path, *COMMAND)
    wait_for(process, "epoch 2/")
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert error.startswith(f"minires: {says}") and error.count("\n") == 1
    assert error.endswith("go on with: minires train --resume run\n")
    step = int(error.split("after step ")[1].split()[0])
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == step >= 22
    shutil.rmtree(tmp_path / "run")


def test_a_second_ctrl_c_stops_at_once(tmp_path, capsys):
    def twice(step):
        if step.step == 14:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    notes = []
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(QUICK, out=str(tmp_path / "run")), on_step=twice, on_note=notes.append)
    assert notes == [f"interrupted at once; the checkpoint of step 11 is in {tmp_path / 'run'}"]
    assert signal.getsignal(signal.SIGINT) is handler
    assert resume(tmp_path / "run").steps == 33


def test_a_signal_while_the_held_out_images_are_looked_at(tmp_path, whole, monkeypatch):
    from minires.train import loop

    real = loop.evaluate

    def signalled(model, batches, label_smoothing=0.0):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(model, batches, label_smoothing)

    recipe = dataclasses.replace(QUICK, **EVERYTHING, out=str(tmp_path / "run"))
    monkeypatch.setattr(loop, "evaluate", signalled)
    with pytest.raises(Interrupted, match="after step 18 of 27"):
        train(dataclasses.replace(recipe, **{"eval_every": 2}))
    monkeypatch.setattr(loop, "evaluate", real)
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole(**EVERYTHING))
