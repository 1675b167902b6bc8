"""PyTorch's side of `gpu_report`'s end_to_end on the CPU: it trains what the recipe says, as minires does."""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from benchmarks import gpu_end_to_end
from benchmarks.gpu_end_to_end import torch_run
from minires.train.loop import train
from minires.train.recipe import load_recipe

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'minires[peers]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty images of ten classes that can be told apart by their colours."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for split, count in (("train", 3), ("test", 1)):
        for label in range(10):
            place = root / split / f"class{label}"
            place.mkdir(parents=True)
            for i in range(count):
                base = np.array([20 * label, 255 - 20 * label, 128 + (-60, 60)[label % 2]])
                pixels = np.clip(base + rng.normal(0, 30, (8, 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return root


def recipe_of(folder, out, **changes):
    settings = dict(
        dataset="folder", data_dir=str(folder), image_size=8, model="resnet20", batch_size=30, epochs=4, warmup=0.5
    )
    settings |= dict(shift=0, flip=False, workers=0, out=str(out)) | changes
    return load_recipe("cifar10-short", settings)


def test_it_computes_what_minires_computes(folder, tmp_path):
    """A batch of all images, and no augmentation: nothing is left to chance, so losses and accuracy agree."""
    recipe, ours, theirs = recipe_of(folder, tmp_path / "run", lr=0.02, label_smoothing=0.1), [], []
    summary = train(recipe, on_epoch=lambda epoch: ours.append(epoch.train_loss))
    row = torch_run(recipe, 0.5, "torch", theirs.append)
    np.testing.assert_allclose(theirs, ours, rtol=2e-4)
    assert len(theirs) == row["steps"] == 4 and abs(row["test_accuracy"] - summary.test_accuracy) < 0.11


def test_every_step_of_an_epoch_counts_and_the_rest_that_fills_no_batch_does_not(folder, tmp_path):
    recipe = recipe_of(folder, tmp_path / "run", batch_size=8, steps=4, shift=2, flip=True, precision="bf16")
    epochs = []
    row = torch_run(recipe, 0.0, "torch", epochs.append)
    assert row["steps"] == 4 and len(epochs) == 2 and np.isfinite(epochs).all()
    assert 0 < row["seconds_to_wanted"] < row["seconds"] and 0 < row["first_step_seconds"] < row["seconds"]
    assert torch_run(recipe, 1.01, "torch")["seconds_to_wanted"] is None


def test_windows_are_those_of_padded_images(folder, tmp_path):
    """Each image of a batch is one of the 2 (2 p + 1)^2 windows of its image, black around it; all of them occur."""
    recipe, p = recipe_of(folder, tmp_path / "run", shift=1, flip=True), 1
    torch.manual_seed(0)
    data, _ = gpu_end_to_end._on_device(torch, recipe, torch.device("cpu"))
    from minires.train.images import open_images

    images = open_images(recipe)
    mean, std = np.array(images.mean), np.array(images.std)
    padded = np.pad(images.train.images[7], ((p, p), (p, p), (0, 0)))
    normal = ((padded / 255 - mean) / std).transpose(2, 0, 1)
    batch = data.augmented(torch.full((400,), 7), p, True)
    assert batch.is_contiguous(memory_format=torch.channels_last) and batch.dtype == torch.float32
    windows = {}
    for top, left, mirrored in itertools.product(range(3), range(3), (False, True)):
        window = normal[:, top : top + 8, left : left + 8]
        windows[top, left, mirrored] = window[..., ::-1] if mirrored else window
    kinds = [min(windows, key=lambda k, image=image: np.abs(windows[k] - image).max()) for image in batch.numpy()]
    assert set(kinds) == set(windows)
    for kind, image in zip(kinds, batch.numpy(), strict=True):
        np.testing.assert_allclose(image, windows[kind], atol=1e-5)
    np.testing.assert_allclose(data.plain(torch.tensor([7]))[0].numpy(), windows[1, 1, False], atol=1e-5)


def test_what_is_compiled_is_forward_and_loss(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, mode: asked.append(mode) or function)
    recipe = recipe_of(folder, tmp_path / "run", steps=4)
    compiled, eager = (torch_run(recipe, 0, library) for library in ("torch_compiled", "torch"))
    assert asked == ["max-autotune"] and compiled["test_accuracy"] == eager["test_accuracy"]


def test_settings_that_it_does_not_know_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"mixup=0\.2: PyTorch's side of end_to_end has no such setting"):
        torch_run(recipe_of(folder, tmp_path / "run", mixup=0.2), 0, "torch")
    torch_side = gpu_end_to_end._FOLLOWED.split()
    assert set(torch_side) <= {field.name for field in dataclasses.fields(recipe_of(folder, tmp_path))}
