"""`minires evaluate` and what it counts."""

import csv
import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import minires
from minires import nn
from minires.cli import main
from minires.engine import Tensor
from minires.ops import cross_entropy
from minires.train import load_recipe, train
from minires.train.checkpoint import read_checkpoint
from minires.train.evaluation import evaluate_model, evaluate_run
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
