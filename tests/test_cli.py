"""The command line: what it prints, where, and its exit codes."""

import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minires.cli import main
from minires.cli.display import BarDisplay
from minires.train import Epoch, Recipe, Step

TRAIN = ["train", "--image-size", "8", "--epochs", "2", "--batch-size", "256", "--threads", "1"]


def command(*arguments, cwd):
    return subprocess.run([sys.executable, "-m", "minires", *arguments], cwd=cwd, capture_output=True, text=True)


def test_train_on_a_pipe(tmp_path):
    done = command(*TRAIN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "\r" not in done.stdout and "\x1b" not in done.stdout
    assert lines[0] == "resnet20 on digits, 2 epochs, seed 0"
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert [line.split()[1] for line in epochs] == ["1/2", "2/2"]
    score = r"loss [\d.]+  accuracy [\d.]+%"
    pattern = rf"epoch \d/2  train {score}  test {score}  [\d,]+ images/s  [\d.]+ s"
    assert all(re.fullmatch(pattern, line) for line in epochs)
    last = re.fullmatch(r"test accuracy ([\d.]+)% \((\d+) of 360 images\); \d+ s; run folder (.+)", lines[-1])
    assert last, lines[-1]
    folder = tmp_path / last[3]
    assert folder.parent == tmp_path / "runs" and folder.name.startswith("digits-")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test_accuracy"] == int(last[2]) / 360
    assert summary["recipe"]["epochs"] == 2 and summary["recipe"]["shift"] == 1  # flags before the recipe's values


def test_flags_and_recipe_file(tmp_path, monkeypatch):
    given = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minires.train.loop.train", lambda recipe, **callbacks: given.append(recipe) or 1 / 0)
    (tmp_path / "mine.toml").write_text("epochs = 7\nnesterov = true\nshift = 3\n")
    flags = ["--lr", "1", "--no-nesterov", "--milestones", ".2", ".4"]
    assert main(["train", "--recipe", str(tmp_path / "mine.toml"), *flags]) == 70
    assert given == [Recipe(epochs=7, nesterov=False, shift=3, lr=1.0, milestones=(0.2, 0.4), name="mine")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--epocs", "3"], "--epocs"),
        (["train", "--lr", "fast"], "--lr"),
        (["train", "--lr"], "--lr"),
        (["train", "--lr", "-1"], "lr=-1.0 must be above 0"),
        (["train", "--schedule", "steps"], "one_cycle"),
        (["train", "--recipe", "nope"], "no recipe 'nope'"),
        (["train", "--model", "resnet21"], "resnet21"),
        (["train", "--dataset", "no/folder"], "no/folder"),
        (["train", "--device", "tpu"], "unknown device 'tpu'"),
        (["train", "surprise"], "surprise"),
        (["info", "resnet21"], "resnet21"),
        (["info", "resnet20", "--image-size", "0"], "0"),
        (["fly"], "fly"),
    ],
    ids=" ".join,
)
def test_errors_are_one_line(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert re.fullmatch(r"minires: error: [^\n]+\n", error) and says in error
    assert "Traceback" not in error and not list(tmp_path.iterdir())
    assert arguments[0] == "train" or not out


def test_debug_shows_the_traceback(capsys):
    assert main(["train", "--recipe", "nope", "--debug"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith("nor a TOML file\n")


def _python_s_own(recipe, **callbacks):
    return int("three")


def _numpy_s_own(recipe, **callbacks):
    return np.zeros(2) + np.zeros(3)


@pytest.mark.parametrize(
    "mistake", [_python_s_own, _numpy_s_own, lambda recipe, **callbacks: recipe.nothing, lambda: 0]
)
def test_a_bug_is_told_from_an_error_of_use(mistake, monkeypatch, capsys):
    """One line too, but it says what it is, and where; with --debug comes the traceback."""
    monkeypatch.setattr("minires.train.loop.train", mistake)
    assert main(["train"]) == 70
    error = capsys.readouterr().err
    assert re.fullmatch(r"minires: internal error: \w+ in [\w.]+, line \d+: .* \(a bug; --debug .*\)\n", error), error
    assert main(["train", "--debug"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_interrupt(monkeypatch, capsys):
    def interrupt(recipe, **callbacks):
        raise KeyboardInterrupt

    monkeypatch.setattr("minires.train.loop.train", interrupt)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "minires: interrupted\n"


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("minires")
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("train", "info", "kernels", "--version", "--debug"))
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--label-smoothing" in text and "--no-nesterov" in text and "--name" not in text


def test_info(capsys):
    assert main(["info"]) == 0
    assert "resnet20\n" in capsys.readouterr().out
    assert main(["info", "resnet20", "--batch", "2"]) == 0
    text = capsys.readouterr().out
    assert "2 × 3 × 32 × 32" in text and "layer3.2.conv2" in text and "269,722" in text
    assert max(map(len, text.splitlines())) < 120


@pytest.mark.parametrize("arguments", [["info"], ["info", "resnet20"]], ids=" ".join)
def test_a_closed_pipe_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        child = subprocess.run([sys.executable, "-m", "minires", *arguments], stdout=pipe, stderr=subprocess.PIPE)
    assert child.stderr == b"" and child.returncode in (1, 141)  # rich leaves with 1


def test_bar_shows_progress_and_leaves_nothing():
    from rich.console import Console

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140)
    with BarDisplay(Recipe(epochs=3), console) as display:
        for step in range(1, 5):
            display.step(Step(2, step, 6, 0.25, 0.875, 1234.4))
        display.epoch(Epoch(2, 4, 0.1, 0.25, 0.875, 0.5, 0.9725, 1234.4, 7.0))
        display.progress.refresh()
        shown = screen.getvalue()
        assert display.progress.tasks[0].completed == 3 and display.progress.tasks[0].total == 5
        display.note("a line")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    for text in ("epoch 2/3", "loss 0.250", "train 87.5%", "test 97.2%", "1,234 images/s"):
        assert text in plain
    assert re.search(r"\d:\d\d", plain)  # the time left
    assert "a line" in screen.getvalue()


def test_cold_cache_is_announced(tmp_path):
    code = "from minires.cli.display import *; make_display(Recipe()).__enter__()"
    shown = []
    for _ in range(2):
        environment = {**os.environ, "MINIRES_CACHE": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        shown.append(done.stdout)
        next((tmp_path / "numba").iterdir()).joinpath("kernel.nbi").touch()
    assert "compiling CPU kernels (once" in shown[0] and "compiling" not in shown[1]


def test_help_is_light():
    """Neither plotting nor data sets are imported to show the help."""
    code = "import sys; from minires.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0
    loaded = set(done.stderr.split())
    assert not loaded & {"matplotlib", "sklearn", "minires.train.loop", "minires.models", "safetensors", "torch"}
