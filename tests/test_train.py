"""Recipes, schedules, the training loop and the run folder."""

import dataclasses
import json
import math
import re
import sys
import tomllib

import numpy as np
import pytest
from PIL import Image

import minires
from minires import nn
from minires.data import DataLoader
from minires.models import create_model
from minires.optim import SGD
from minires.serialization import write_atomically
from minires.train import Diverged, Recipe, evaluate, load_recipe, train
from minires.train.images import open_images
from minires.train.metrics import Mean, Stopwatch, count_right
from minires.train.optimizers import make_optimizer
from minires.train.recipe import SHIPPED
from minires.train.schedule import make_schedule
from minires.train.step import TrainStep

QUICK = load_recipe("digits", {"image_size": 8, "epochs": 2, "batch_size": 128, "threads": 1})

# --- recipes ------------------------------------------------------------------------------------------------------


def test_shipped_recipe_is_the_default():
    recipe = load_recipe()
    assert recipe.name == "digits" and recipe.model == "resnet20" and recipe.dataset == "digits"
    assert recipe == load_recipe("digits")


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_say_what_to_expect(path):
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem
    assert recipe.expected.startswith("not measured") or "minires train" in recipe.expected
    assert load_recipe(path.stem, {"workers": 3, "keep": 5}).expected == recipe.expected
    assert load_recipe(path.stem, {"seed": 1}).expected == ""  # measured with other flags: it is said no longer
    create_model(recipe.model, **({"stem": recipe.stem} if recipe.stem else {}))


def test_the_paper_s_recipe_is_the_paper_s():
    recipe = load_recipe("he2015-cifar10")
    optimizer = make_optimizer(recipe, create_model("resnet20"))
    lr = make_schedule(recipe, optimizer, recipe.steps)
    rates = {step: lr.lrs_at(step)[0] for step in (0, 31_999, 32_000, 47_999, 48_000, 63_999)}
    assert [round(rate, 9) for rate in rates.values()] == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert recipe.steps <= recipe.epochs * (50_000 // recipe.batch_size)
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "lars"])
def test_optimizers_and_their_groups(kind):
    model = create_model("resnet20")
    recipe = Recipe(optimizer=kind, lr=0.5, weight_decay=0.25, decay_norm=False)
    optimizer = make_optimizer(recipe, model)
    assert type(optimizer).__name__.lower() == kind
    weights, vectors = optimizer.param_groups
    assert (weights["weight_decay"], vectors["weight_decay"], weights["lr"], vectors["lr"]) == (0.25, 0, 0.5, 0.5)
    assert {p.ndim for p in weights["params"]} == {2, 4} and {p.ndim for p in vectors["params"]} == {1}
    assert len(weights["params"]) + len(vectors["params"]) == len(list(model.parameters()))
    if kind == "lars":
        assert (weights["trust"], vectors["trust"]) == (1e-3, None)
    (group,) = make_optimizer(dataclasses.replace(recipe, decay_norm=True), model).param_groups
    assert group["weight_decay"] == 0.25


def test_recipe_survives_toml(tmp_path):
    recipe = Recipe(lr=1e-5, milestones=(0.25, 0.5), nesterov=False, dataset='a "quoted" übung\\x', name="mine")
    path = tmp_path / "mine.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(str(path)) == recipe
    assert load_recipe(str(path), {"lr": 2.0}) == dataclasses.replace(recipe, lr=2.0)
    assert "out" not in tomllib.loads(Recipe(out="here").to_toml())


def test_fields_are_judged_with_the_flags_in_place(tmp_path):
    path = tmp_path / "plain.toml"
    path.write_text("momentum = 0\nnesterov = false")
    assert load_recipe(str(path), {"momentum": 0.5, "nesterov": True}).nesterov
    with pytest.raises(ValueError, match=r"^nesterov=True needs momentum"):
        load_recipe(str(path), {"nesterov": True})


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("lr = -1", ValueError, "lr=-1.0 must be above 0"),
        ("lr = nan", ValueError, "lr=nan must be finite"),
        ("lr = 'big'", TypeError, "lr='big' must be a number, not a text"),
        ("epochs = 2.5", TypeError, "epochs=2.5 must be a whole number, not a number"),
        ("epochs = 0", ValueError, "epochs=0 must be at least 1"),
        ("epochs = true", TypeError, "epochs=True must be a whole number, not true or false"),
        ("schedule = 'step'", ValueError, "schedule='step' must be one of 'one_cycle', 'cosine', 'multistep'"),
        ("milestones = [0.9, 0.5]", ValueError, "must be rising fractions"),
        ("milestones = 3", TypeError, "milestones=3 must be a list of numbers"),
        ("accumulate = 5", ValueError, "accumulate=5 must divide batch_size=64"),
        ("ema = 1", ValueError, "ema=1.0 must be from 0 to below 1"),
        ("optimizer = 'lamb'", ValueError, "optimizer='lamb' must be one of 'sgd', 'adamw', 'lars'"),
        ("momentum = 0", ValueError, "nesterov=True needs momentum above 0"),
        ("learning_rate = 0.1", ValueError, "unknown key 'learning_rate'"),
        ("epoch = 3", ValueError, "unknown key 'epoch'; did you mean 'epochs'?"),
        ("lr = ", ValueError, "not a TOML file"),
    ],
)
def test_recipe_errors_name_file_and_key(tmp_path, text, error, says):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    for overrides in (None, {"seed": 1}):
        with pytest.raises(error) as caught:
            load_recipe(str(path), overrides)
        assert says in str(caught.value) and str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_missing_recipe_names_the_shipped_ones():
    with pytest.raises(
        FileNotFoundError,
        match=r"neither a shipped one \(cifar10-94, .*digits, finetune, he2015-cifar10\) nor a TOML file",
    ):
        load_recipe("digit")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("one_cycle", lambda s: None),
        ("cosine", lambda s: (1 + math.cos(math.pi * (s - 10) / 90)) / 2),
        ("multistep", lambda s: 1.0 if s < 50 else 0.1 if s < 75 else 0.01),
    ],
)
def test_schedule_over_the_run(schedule, expected):
    recipe = Recipe(epochs=10, lr=2.0, warmup=0.1, schedule=schedule)
    optimizer = SGD(create_model("resnet20").parameters(), 2.0, momentum=0.9)
    rates = []
    lr = make_schedule(recipe, optimizer, steps=100)
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        lr.step()
    assert rates[0] < 0.25 and np.all(np.diff(rates[:10]) > 0) and max(rates) == pytest.approx(2.0)
    if schedule == "one_cycle":
        assert rates[9] == pytest.approx(2.0) and np.all(np.diff(rates[9:]) < 0) and rates[-1] < 1e-5
    else:
        np.testing.assert_allclose(rates[10:], [2 * expected(s) for s in range(10, 100)])


# --- metrics ------------------------------------------------------------------------------------------------------


def test_mean_weighs_batches_by_their_images():
    mean = Mean()
    assert math.isnan(mean.loss)
    mean.add(1.0, count_right(np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 5.0]]), np.array([1, 1, 1])), 3)
    mean.add(5.0, count_right(np.array([[3.0, 1.0]]), np.array([[0.6, 0.4]])), 1)
    assert (mean.images, mean.loss, mean.accuracy) == (4, 2.0, 0.75)


def test_stopwatch_leaves_the_first_step_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("minires.train.metrics.time.perf_counter", lambda: now[0])
    watch = Stopwatch()
    for seconds, speed, epoch_speed in ((100, 0, 0), (2, 5, 5), (8, 2, 2), (None, 2, 0), (10, 1.5, 1)):
        if seconds is None:
            now[0] += 1000  # evaluation: not training
            watch.begin_epoch()
        else:
            if seconds == 100:
                watch.begin_epoch()
            now[0] += seconds
            watch.lap(10)
        assert (watch.speed, watch.epoch_speed) == (speed, epoch_speed)
    assert watch.first == 100


# --- the loop -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run: (summary, folder, steps, epochs, notes)."""
    folder = tmp_path_factory.mktemp("runs") / "new"
    steps, epochs, notes = [], [], []
    recipe = dataclasses.replace(QUICK, out=str(folder))
    return train(recipe, steps.append, epochs.append, notes.append), folder, steps, epochs, notes


def test_run_folder(run):
    summary, folder, steps, epochs, notes = run
    assert {p.name for p in folder.iterdir()} == {
        "checkpoints",
        "curves.png",
        "metrics.csv",
        "metrics.jsonl",
        "model.safetensors",
        "recipe.toml",
        "summary.json",
    }
    written = json.loads((folder / "summary.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(summary)))
    assert {"test_accuracy", "seconds", "images_per_second", "threads", "recipe", "model", "seed"} <= set(written)
    assert {"python", "numpy", "numba", "minires"} <= set(written["versions"])
    assert (written["epochs"], written["steps"], written["threads"]) == (2, 22, 1)
    assert written["recipe"]["image_size"] == 8 and written["train_images"] == 1437

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [dataclasses.asdict(e) for e in epochs] and [line["epoch"] for line in lines] == [1, 2]
    assert lines[-1]["step"] == 22 and lines[-1]["test_accuracy"] == summary.test_accuracy
    assert lines[0]["train_loss"] > lines[1]["train_loss"] and lines[1]["train_accuracy"] > 0.3  # chance is 0.1
    assert all(line["images_per_second"] > 0 for line in lines)
    assert [s.step for s in steps] == list(range(1, 23)) and {s.steps for s in steps} == {22}
    assert steps[10].accuracy == pytest.approx(lines[0]["train_accuracy"]) and not notes
    assert np.mean([s.loss for s in steps[:11]]) == pytest.approx(lines[0]["train_loss"])

    assert load_recipe(str(folder / "recipe.toml")) == dataclasses.replace(QUICK, out="")
    with Image.open(folder / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width > 600


def test_saved_weights_give_the_reported_accuracy(run):
    summary, folder, *_ = run
    model = create_model("resnet20", num_classes=10, in_channels=1)
    model.load_state_dict(minires.load(folder / "model.safetensors"))
    images = open_images(QUICK)
    result = evaluate(model, DataLoader(images.test, 100), QUICK.label_smoothing)
    assert result.accuracy == summary.test_accuracy and result.images == 360
    assert result.loss == pytest.approx(summary.test_loss, rel=1e-5)
    assert model.training and all(p.grad is None for p in model.parameters())


def weights(tmp_path, name, **changes):
    train(dataclasses.replace(QUICK, epochs=1, out=str(tmp_path / name), **changes))
    return {k: v.array for k, v in minires.load(tmp_path / name / "model.safetensors").items()}


def test_same_seed_same_weights_bit_for_bit(tmp_path):
    first = weights(tmp_path, "a")
    again = weights(tmp_path, "b", workers=2)  # threads that load do not change what is loaded
    other = weights(tmp_path, "c", seed=1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["fc.weight"], other["fc.weight"])


def test_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 6), ("test", 3)):
        for c, name in enumerate(("blue", "red")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 100, (10 + i, 12, 3)).astype(np.uint8)
                pixels[..., 2 * (1 - c)] += 150
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    recipe = Recipe(
        dataset=str(tmp_path), image_size=8, batch_size=4, epochs=1, shift=1, flip=True, out=str(tmp_path) + "-out"
    )
    images = open_images(recipe)
    assert images.classes == ("blue", "red") and images.channels == 3
    x = np.stack([images.test[i][0] for i in range(6)])
    assert x.shape == (6, 3, 8, 8) and abs(x.mean()) < 0.3 and 0.7 < x.std() < 1.3
    summary = train(dataclasses.replace(recipe, threads=1))
    assert (summary.steps, summary.test_images, summary.classes) == (3, 6, ["blue", "red"])

    (tmp_path / "test" / "green").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "green" / "0.png")
    with pytest.raises(ValueError, match="'green' is a class of test/ only"):
        open_images(recipe)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"dataset": "nowhere"}, FileNotFoundError, "is neither a data set"),
        ({"model": "resnet21"}, ValueError, "resnet21"),
        ({"device": "gpu"}, ValueError, "unknown device 'gpu'"),
        ({"flip": True}, ValueError, "a mirrored 2"),
        ({"batch_size": 2000}, ValueError, "more than the 1437 training images"),
        ({"threads": 10_000}, ValueError, "10000"),
    ],
)
def test_refused_recipes_leave_no_folder(tmp_path, changes, error, says):
    with pytest.raises(error, match=says):
        train(dataclasses.replace(QUICK, out=str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


def test_a_run_never_writes_into_a_used_folder(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        train(dataclasses.replace(QUICK, out=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_default_folders_do_not_collide(tmp_path, monkeypatch):
    from minires.train.run_folder import RunFolder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda format: "20260101-000000")
    paths = [str(RunFolder.new(QUICK).path) for _ in range(3)]
    assert paths == [f"runs/digits-20260101-000000{end}" for end in ("", "-2", "-3")]


def test_divergence_names_op_and_module(tmp_path):
    with pytest.raises(
        Diverged, match=r"the loss is (nan|-?inf) in step \d+: forward: .* in (conv1|layer|bn1|fc).*smaller lr"
    ):
        train(dataclasses.replace(QUICK, lr=1e30, warmup=0.0, out=str(tmp_path / "out")))


def test_divergence_in_backward_is_named_and_changes_no_weight(tmp_path, monkeypatch):
    """The loss is finite, a gradient is not: the op, its module and the direction are named."""
    from minires.ops.pooling import AvgPool2d

    model = create_model("resnet20", in_channels=1)
    step = TrainStep(QUICK, model, make_optimizer(QUICK, model))
    step.forward = model  # its ops, one of which goes wrong from here on; launches are noted already
    x, labels = minires.randn(4, 1, 8, 8), minires.tensor([0, 1, 2, 3])
    step(1, x, labels)
    before = {name: tensor.array.copy() for name, tensor in model.named_parameters()}
    true = AvgPool2d.backward
    monkeypatch.setattr(AvgPool2d, "backward", staticmethod(lambda ctx, dy: true(ctx, dy) * np.inf))
    with np.errstate(all="ignore"), pytest.raises(Diverged) as caught:
        step(2, x, labels)
    assert re.search(
        r"norm of the gradient is (nan|inf) in step 2: backward: .*AvgPool2d in avgpool", str(caught.value)
    )
    assert all(np.array_equal(before[name], tensor.array) for name, tensor in model.named_parameters())


def test_divergence_writes_nothing_over_the_last_good_weights(tmp_path, monkeypatch):
    real, seen, notes = TrainStep._gradients, {}, []
    folder = tmp_path / "out"

    def poisoned(self, images, targets):
        if (folder / "checkpoints" / "step-00000011.safetensors").exists():
            if not seen:
                seen.update({p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()})
            images = minires.tensor(np.full(images.shape, np.nan, np.float32))
        return real(self, images, targets)

    monkeypatch.setattr(TrainStep, "_gradients", poisoned)
    with pytest.raises(Diverged, match=r"in step 12: forward: .*Conv2d in conv1 .*already input 0"):
        train(dataclasses.replace(QUICK, out=str(folder)), on_note=notes.append)
    assert seen == {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()} and "metrics.jsonl" in seen
    assert notes == [f"diverged; the checkpoint of step 11 is in {folder}"]


def test_accumulated_parts_make_the_whole_gradient(tmp_path):
    """Without batch normalisation's statistics in between, two halves are the whole."""
    x, labels = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32), np.arange(8) % 3
    weights = []
    for parts in (1, 2, 4):
        minires.manual_seed(0)
        model = nn.Linear(5, 3)
        recipe = Recipe(accumulate=parts, batch_size=8, label_smoothing=0.1)
        loss, right = TrainStep(recipe, model, make_optimizer(recipe, model))(
            1, minires.tensor(x), minires.tensor(labels)
        )
        weights.append((loss, model.weight.array.copy(), right))
    assert len({right for *_, right in weights}) == 1 and 0 < right < 8
    for loss, weight, _ in weights[1:]:
        assert loss == pytest.approx(weights[0][0], rel=1e-6)
        np.testing.assert_allclose(weight, weights[0][1], rtol=1e-5, atol=1e-6)
    assert not np.array_equal(weights[0][1], minires.zeros(3, 5).array)


def test_gradients_are_clipped():
    model = nn.Linear(5, 3)
    recipe = Recipe(clip=1e-3, lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, batch_size=4)
    before = [p.array.copy() for p in model.parameters()]
    TrainStep(recipe, model, make_optimizer(recipe, model))(1, minires.randn(4, 5), minires.tensor([0, 1, 2, 0]))
    moved = math.sqrt(sum(float(((p.array - b) ** 2).sum()) for p, b in zip(model.parameters(), before, strict=True)))
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_every_part_of_a_recipe_together(tmp_path):
    recipe = dataclasses.replace(
        QUICK,
        **{"val": 300, "mixup": 0.2, "cutout": 2, "ema": 0.9, "recalibrate": True, "checkpoint_blocks": True},
        **{"optimizer": "adamw", "lr": 0.01, "decay_norm": False, "clip": 1.0, "accumulate": 2, "eval_every": 2},
        **{"normalize": "pixel_mean", "epochs": 3, "out": str(tmp_path / "out")},
    )
    epochs = []
    summary = train(recipe, on_epoch=epochs.append)
    assert [e.test_accuracy is None for e in epochs] == [True, False, False]  # every second one, and the last
    assert summary.train_images == 1137 and summary.test_images == 360
    assert summary.test_accuracy > 0.5 and summary.best_step in (16, 24)
    model = create_model("resnet20", num_classes=10, in_channels=1)
    model.load_state_dict(minires.load(tmp_path / "out" / "model.safetensors"))
    assert evaluate(model, DataLoader(open_images(recipe).test, 100)).accuracy == summary.test_accuracy


def test_a_number_of_steps_may_end_within_an_epoch(tmp_path):
    epochs = []
    summary = train(dataclasses.replace(QUICK, steps=13, out=str(tmp_path / "out")), on_epoch=epochs.append)
    assert summary.steps == 13 and [e.step for e in epochs] == [11, 13] and epochs[-1].lr < 1e-6


def test_held_out_images_are_no_training_images():
    images = open_images(dataclasses.replace(QUICK, val=400))
    train_rows, held_out = (
        {row.tobytes() for row in data.dataset.images[data.indices]} for data in (images.train, images.held_out)
    )
    assert (len(images.train), len(images.held_out), len(images.test)) == (1037, 400, 360)
    assert len(train_rows & held_out) <= 2  # the data set has a few images twice
    other_seed = open_images(dataclasses.replace(QUICK, val=400, seed=5))
    np.testing.assert_array_equal(other_seed.held_out.indices, images.held_out.indices)
    with pytest.raises(ValueError, match="val=1437 leaves nothing"):
        open_images(dataclasses.replace(QUICK, val=1437))


def test_pixel_mean_is_subtracted_and_nothing_else():
    images = open_images(dataclasses.replace(QUICK, normalize="pixel_mean"))
    assert images.mean_image is not None
    x, y = images.test.images / 255, images.test.batch(range(360))[0]
    np.testing.assert_allclose(y.transpose(0, 2, 3, 1), x - images.mean_image, atol=1e-6)
    assert images.mean_image.std() > 0.1


def test_without_matplotlib_a_line_says_so(tmp_path, monkeypatch):
    from minires.train.curves import draw_curves

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_curves(tmp_path / "curves.png", [], "title") is False
    assert not list(tmp_path.iterdir())


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "file.txt"
    write_atomically(path, lambda beside: beside.write_text("old"))

    def fail(beside):
        beside.write_text("half of the ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_training_images_are_augmented_and_test_images_are_not():
    images = open_images(dataclasses.replace(QUICK, shift=1))
    loader = DataLoader(images.train, 8, generator=0)
    first, second = next(iter(loader))[0].array, next(iter(loader))[0].array
    assert not np.array_equal(first, second)
    tests = DataLoader(images.test, 8, generator=0)
    np.testing.assert_array_equal(next(iter(tests))[0].array, next(iter(tests))[0].array)
    x, std = images.train.images / 255, images.std[0]
    assert images.mean[0] == pytest.approx(x.mean(), abs=1e-5) and std == pytest.approx(x.std(), abs=1e-5)
    background = next(iter(DataLoader(images.test, 360)))[0].array.min()
    assert first.min() == pytest.approx(background) == pytest.approx(-images.mean[0] / std, abs=1e-5)
