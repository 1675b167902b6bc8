"""`minires evaluate` and what it counts."""

import csv
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import minires
from minires import nn
from minires.cli import main
from minires.data.transforms import Compose, Normalize, ToTensor
from minires.engine import Tensor
from minires.models import create_model
from minires.ops import cross_entropy
from minires.train import load_recipe, train
from minires.train.checkpoint import read_checkpoint
from minires.train.evaluation import evaluate_model, evaluate_run, evaluate_weights
from minires.train.pictures import write_confusion

SMALL = {"image_size": 8, "epochs": 2, "batch_size": 128, "threads": 1, "keep": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run folder, summary) of a short run with a running average of the weights."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, train(load_recipe("digits", {**SMALL, "ema": 0.9, "out": str(folder)}))


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run folder, to be damaged."""
    return shutil.copytree(trained[0], tmp_path / "run")


class Logits(nn.Module):
    """Outputs as they are given in."""

    def forward(self, x):
        return x


def logits(*rows):
    return Tensor(np.array(rows, np.float32))


def test_counts():
    # 7 classes; the label's place among the outputs: 1st, 2nd, 5th, 6th, and equal to a class with a lower number
    y = logits(
        [9, 1, 2, 3, 4, 5, 6],
        [9, 8, 2, 3, 4, 5, 6],
        [9, 8, 2, 7, 6, 1, 0],
        [9, 8, 7, 2, 6, 5, 0],
        [1, 1, 1, 1, 1, 1, 1],
    )
    t = Tensor(np.array([0, 1, 2, 3, 6]))
    model = Logits()
    half = [(Tensor(y.array[:3]), Tensor(t.array[:3])), (Tensor(y.array[3:]), Tensor(t.array[3:]))]
    found = evaluate_model(model, half, list("abcdefg"), label_smoothing=0.1)
    assert (found.correct, found.total, found.correct5, found.top1, found.top5) == (1, 5, 3, 0.2, 0.6)
    expected = np.zeros((7, 7), int)
    expected[[0, 1, 2, 3, 6], 0] = 1
    np.testing.assert_array_equal(found.confusion, expected)
    assert found.per_class()[:2] == [("a", 1, 1), ("b", 0, 1)] and found.per_class()[4] == ("e", 0, 0)
    assert found.loss == pytest.approx(float(cross_entropy(y, t, label_smoothing=0.1).array), rel=1e-6)
    assert model.training
    with pytest.raises(ValueError, match="NaN or infinite: they are damaged, or diverged"):
        evaluate_model(model, [(logits([0.0, np.nan]), Tensor(np.array([1])))], "ab")
    with pytest.raises(ValueError, match="no images"):
        evaluate_model(model, [], "ab")


def test_confusion_files(tmp_path, monkeypatch):
    t = Tensor(np.array([0, 0, 1]))
    found = evaluate_model(Logits(), [(logits([1, 0], [0, 1], [0, 1]), t)], ['cat, "big"', "dög"])
    assert [p.name for p in write_confusion(found, tmp_path)] == ["confusion.csv", "confusion.png"]
    with open(tmp_path / "confusion.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["class / taken for", 'cat, "big"', "dög"], ['cat, "big"', "1", "1"], ["dög", "0", "1"]]
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 10
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert [p.name for p in write_confusion(found, tmp_path)] == ["confusion.csv"]


def test_final_weights_give_what_the_summary_says(trained):
    folder, summary = trained
    found = evaluate_run(folder)
    assert (found.top1, found.total) == (summary.test_accuracy, 360) and found.classes == tuple("0123456789")
    assert found.loss == pytest.approx(summary.test_loss, rel=1e-5)
    assert found.confusion.sum(1).tolist() == [36, 36, 36, 36, 37, 36, 36, 36, 35, 36]


def test_which_weights(trained):
    folder, summary = trained
    arrays = read_checkpoint(folder / "checkpoints" / f"step-{summary.steps:08d}.safetensors").arrays
    assert any(name.startswith("ema/") for name in arrays)
    last, ema, best = (evaluate_run(folder, weights) for weights in ("last", "ema", "best"))
    final = evaluate_run(folder)
    np.testing.assert_array_equal(ema.confusion, final.confusion)  # the average is what the run keeps
    assert last.loss != ema.loss and best.top1 == summary.best_accuracy
    assert [found.weights for found in (last, ema, best, final)] == ["last", "ema", "best", "final"]
    assert best.file.endswith(f"step-{summary.best_step:08d}.safetensors") and final.file.endswith("model.safetensors")


def test_a_damaged_checkpoint_is_passed_over_and_stays(run):
    newest = sorted((run / "checkpoints").iterdir())[-1]
    shutil.copy(newest, newest.with_name("step-00009999.safetensors"))
    (damaged := newest.with_name("step-00009999.safetensors")).write_bytes(newest.read_bytes()[:-7])
    notes = []
    assert evaluate_run(run, "last", on_note=notes.append).file == str(newest)
    assert len(notes) == 1 and "is damaged" in notes[0] and damaged.exists()


def test_without_an_average_and_without_a_summary(run):
    """A run that was stopped early has checkpoints and no summary."""
    (run / "summary.json").unlink()
    (run / "model.safetensors").unlink()
    assert evaluate_run(run, "last").total == 360
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors yet; try --weights last"):
        evaluate_run(run)


def test_command(trained, run, capsys):
    folder, summary = trained
    assert main(["evaluate", str(run)]) == 0
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["class", "right", "of", "accuracy"] and lines[1].split()[0] == "0" and not error
    rights = [int(line.split()[1]) for line in lines[1:11]]
    assert f"top-1 accuracy {summary.test_accuracy:.2%} ({sum(rights)} of 360 images); top-5 " in lines[11]
    assert lines[12] == f"written to {run}: confusion.csv, confusion.png, mistakes.png"

    assert main(["evaluate", str(run), "--json", "--weights", "last", "--no-confusion", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = evaluate_run(folder, "last")
    assert {"correct", "total", "top1", "top5", "loss", "weights", "per_class", "run"} <= found.keys()
    assert (found["correct"], found["total"], found["weights"]) == (expected.correct, 360, "last")
    assert found["per_class"]["4"]["total"] == 37 and found["files"] == []
    assert {p.name for p in run.iterdir()} - {p.name for p in folder.iterdir()} == {
        *("confusion.csv", "confusion.png", "mistakes.png")
    }


def test_other_images_are_noticed(tmp_path, capsys):
    rng = np.random.default_rng(0)

    def images(root, classes, shade):
        for part in ("train", "test"):
            for name in classes:
                (root / part / name).mkdir(parents=True)
                for i in range(4):
                    Image.fromarray((rng.integers(0, 100, (8, 8, 3)) + shade).astype(np.uint8)).save(
                        root / part / name / f"{i}.png"
                    )
        return str(root)

    here, there = images(tmp_path / "a", ("x", "y"), 0), images(tmp_path / "b", ("x", "y"), 90)
    other = images(tmp_path / "c", ("x", "z"), 0)
    out = str(tmp_path / "run")
    recipe = load_recipe("digits", {**SMALL, "dataset": here, "batch_size": 4, "epochs": 1, "out": out})
    train(dataclasses.replace(recipe, shift=0))
    assert main(["evaluate", out, "--no-confusion"]) == 0 and not capsys.readouterr().err
    assert main(["evaluate", out, "--no-confusion", "--dataset", there]) == 0
    assert "warning: the training images' mean is [" in capsys.readouterr().err
    assert main(["evaluate", out, "--dataset", other]) == 2
    assert "has other classes than those that" in capsys.readouterr().err
    model = minires.load(tmp_path / "run" / "model.safetensors")
    assert model["conv1.weight"].shape[1] == 3


@pytest.mark.parametrize(
    ("damage", "arguments", "says"),
    [
        (lambda run: shutil.rmtree(run), [], "is no folder"),
        (lambda run: (run / "recipe.toml").unlink(), [], "has no recipe.toml: it is no run folder"),
        (lambda run: (run / "recipe.toml").write_text("model = "), [], "recipe.toml: not a TOML file"),
        (lambda run: (run / "recipe.toml").write_text("model = 'resnet21'"), [], "no model is named 'resnet21'"),
        (lambda run: (run / "model.safetensors").unlink(), [], "try --weights last"),
        (lambda run: (run / "model.safetensors").write_bytes(b"\x10"), [], "model.safetensors is damaged"),
        (lambda run: (run / "model.safetensors").write_bytes(b"\xff" * 99), [], "model.safetensors is damaged"),
        (
            lambda run: minires.save({"x": Tensor(np.zeros(3))}, run / "model.safetensors"),
            [],
            "does not fit the recipe",
        ),
        (lambda run: (run / "summary.json").write_text("{"), [], "summary.json is damaged"),
        (lambda run: (run / "summary.json").write_text("[]"), [], "summary.json is damaged"),
        (
            lambda run: shutil.rmtree(run / "checkpoints"),
            ["--weights", "last"],
            "has no checkpoints; try --weights final",
        ),
        (
            lambda run: [p.write_bytes(p.read_bytes()[:99]) for p in (run / "checkpoints").iterdir()],
            ["--weights", "best"],
            "is damaged",
        ),
        (lambda run: None, ["--weights", "worst"], "worst"),
        (lambda run: None, ["--device", "tpu"], "unknown device 'tpu'"),
        (lambda run: None, ["--dataset", "nowhere"], "nowhere"),
        (lambda run: None, ["--threads", "-1"], "threads=-1 must not be negative"),
    ],
)
def test_errors_are_one_line(run, capsys, damage, arguments, says):
    damage(run)
    before = sorted(run.rglob("*"))
    assert main(["evaluate", str(run), *arguments]) == 2
    out, error = capsys.readouterr()
    last = error.splitlines()[-1]
    assert last.startswith("minires: error: ") and says in last and "Traceback" not in error and not out
    assert sorted(run.rglob("*")) == before


def test_weights_that_are_not_numbers_are_no_result(run, capsys):
    state = minires.load(run / "model.safetensors")
    state["fc.bias"].array[3] = np.nan
    minires.save(state, run / "model.safetensors")
    assert main(["evaluate", str(run)]) == 2
    assert "NaN or infinite" in capsys.readouterr().err


# --- weights that belong to no run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A folder with w.safetensors of 3 classes, and images of 3 classes: split/test/CLASS, flat/CLASS."""
    folder = tmp_path_factory.mktemp("foreign")
    minires.manual_seed(0)
    model = create_model("resnet20", 3)
    model(minires.randn(16, 3, 12, 12))
    minires.save(model.state_dict(), folder / "w.safetensors")
    rng = np.random.default_rng(0)
    for root in ("flat", "split/test"):
        for name in "abc":
            (folder / root / name).mkdir(parents=True)
            for i in range(5):
                pixels = rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / root / name / f"{i}.png")
    return folder


SCALE = {"mean": (0.2, 0.3, 0.4), "std": (0.5, 0.5, 0.5), "image_size": 12, "threads": 1}


@pytest.mark.parametrize("root", ["flat", "split"])
def test_weights_on_a_folder(foreign, root):
    """Counted one by one, by transforms of single images."""
    found = evaluate_weights(foreign / "w.safetensors", "", {"data_dir": str(foreign / root), **SCALE})
    prepare = Compose([ToTensor(), Normalize(SCALE["mean"], SCALE["std"])])
    model = create_model("resnet20", weights=foreign / "w.safetensors").eval()
    confusion, sure = np.zeros((3, 3), int), {}
    for t, name in enumerate("abc"):
        for path in sorted((foreign / root).rglob(f"{name}/*.png")):
            with minires.no_grad(), Image.open(path) as image:
                y = model(Tensor(prepare(image).array[None])).array[0].astype(np.float64)
            confusion[t, y.argmax()] += 1
            if y.argmax() != t:
                sure[f"{name}/{path.name}"] = (np.exp(y) / np.exp(y).sum()).max()
    np.testing.assert_array_equal(found.confusion, confusion)
    assert (found.total, found.classes, found.correct5) == (15, ("a", "b", "c"), 15)
    assert [m.file[-7:] for m in found.mistakes] == sorted(sure, key=lambda file: -sure[file])
    np.testing.assert_allclose([m.sure for m in found.mistakes], sorted(sure.values(), reverse=True), rtol=1e-4)
    worst = found.mistakes[0]
    assert worst.label == worst.file[-7] and worst.image is not None
    with Image.open(foreign / root / worst.file) as image:
        np.testing.assert_array_equal(worst.image, np.asarray(image))


def test_command_for_weights(foreign, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "--weights", str(foreign / "w.safetensors"), "--model", "resnet20", "--image-size", "12"]
    words += ["--data", "folder", "--data-dir", str(foreign / "flat")]
    assert main([*words, "--json"]) == 0
    out, error = capsys.readouterr()
    found = json.loads(out)
    assert found["total"] == 15 and found["files"] == [] and 0 <= found["correct"] <= 15
    assert sum(map(sum, found["confusion"])) == 15 and len(found["mistakes"]) == 15 - found["correct"]
    assert error.count("\n") == 1 and "do not say how images are normalised: taking ImageNet's" in error
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "--out", "report", *"--mean 0.2 0.3 0.4 --std 0.5 0.5 0.5".split()]) == 0
    out, error = capsys.readouterr()
    assert "written to report: confusion.csv, confusion.png, mistakes.png" in out and not error
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(tmp_path / "report" / name) as image:
            assert min(image.size) > 200


def test_a_run_by_weights(run, capsys):
    assert main(["evaluate", "--weights", str(run), "--json", "--no-pictures"]) == 0
    by_weights = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(run), "--json", "--no-pictures"]) == 0
    by_run = json.loads(capsys.readouterr().out)
    assert by_weights["run"] == str(run) and by_weights == by_run


def test_other_names_of_classes_are_said(trained, foreign, capsys):
    """A run's weights know their classes; here of digits, on images of as many classes with other names."""
    folder = foreign / "ten"
    for i in range(10):
        (folder / f"c{i}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(folder / f"c{i}" / "x.png")
    weights = str(trained[0] / "model.safetensors")
    assert main(["evaluate", "--weights", weights, "--data-dir", str(folder)]) == 2
    assert "dataset='folder' has images of 3 channels" in capsys.readouterr().err
    state = minires.load(weights)
    state["conv1.weight"] = Tensor(np.repeat(state["conv1.weight"].array, 3, axis=1) / 3)
    notes = {"model": "resnet20", "classes": json.dumps([*"0123456789"]), "mean": "[0.3,0.3,0.3]", "std": "[1,1,1]"}
    minires.save(state, foreign / "ten.safetensors", notes)  # as `minires export` writes
    assert main(["evaluate", "--weights", str(foreign / "ten.safetensors"), "--data-dir", str(folder)]) == 0
    out, error = capsys.readouterr()
    assert "warning: the weights' classes are 0, 1, 2, 3" in error and " of 10 images)" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "say what to evaluate"),
        (["--weights", "{w}"], "needs data_dir"),
        (["--weights", "{w}", "--data-dir", "nowhere"], "no folder or archive 'nowhere'"),
        (["--weights", "{w}", "--data-dir", "{two}"], "tell 3 classes apart, and dataset='folder' has 2 (a, b)"),
        (["--weights", "{w}", "--model", "resnet32", "--data-dir", "{flat}"], "do not fit resnet32"),
        (["--weights", "{w}", "--mean", "1", "--data-dir", "{flat}"], "mean and std go together"),
        (["--weights", "nowhere", "--data-dir", "{flat}"], "no file 'nowhere'"),
        (["{flat}", "--model", "resnet20"], "does not go with a run"),
        (["--weights", "{head}", "--data-dir", "{flat}"], "its head says classes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_with_weights_are_one_line(foreign, tmp_path, capsys, arguments, says):
    for name in "ab":
        shutil.copytree(foreign / "flat" / name, tmp_path / "two" / name)
    minires.save(minires.load(foreign / "w.safetensors"), tmp_path / "head.safetensors", {"classes": "a, b, c"})
    places = {"w": foreign / "w.safetensors", "flat": foreign / "flat", "two": tmp_path / "two"}
    places["head"] = tmp_path / "head.safetensors"
    assert main(["evaluate", *(word.format(**places) for word in arguments)]) == 2
    out, error = capsys.readouterr()
    assert says in error.splitlines()[-1] and error.splitlines()[-1].startswith("minires: error: ") and not out


@pytest.mark.skipif("MINIRES_DATA" not in os.environ, reason="MINIRES_DATA does not name the folder of real data")
def test_published_weights_get_as_many_right_as_in_pytorch(capsys):
    data = Path(os.environ["MINIRES_DATA"])
    words = ["--weights", str(data / "resnet20-12fca82f.th"), "--model", "resnet20", "--data", "folder", "--json"]
    assert main(["evaluate", *words, "--data-dir", str(data / "cifar10-jpg.tar.xz")]) == 0
    out, error = capsys.readouterr()
    found = json.loads(out)
    assert (found["correct"], found["total"]) == (8103, 10000) and not error  # its hash says how images are normalised
