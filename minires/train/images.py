"""The two data sets of a recipe: training images, augmented, and test images; both resized and normalised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data import transforms as T
from ..data.dataset import ArrayDataset
from ..data.datasets import ImageFolder, digits
from .recipe import Recipe

_SAMPLE = 1000  # images of a folder that mean and deviation are taken from


@dataclass(frozen=True)
class Images:
    """train, test: data sets of ((C, S, S) float32, label). classes: their names. mean, std: per channel, in [0, 1]."""

    train: Any
    test: Any
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    channels = property(lambda self: len(self.mean))


def open_images(recipe: Recipe) -> Images:
    """The images that the recipe names. Raises ValueError, RuntimeError or OSError in one line for what is missing."""
    return _digits(recipe) if recipe.dataset == "digits" else _folder(recipe)


def _digits(recipe: Recipe) -> Images:
    if recipe.flip:
        raise ValueError("flip=True does not suit digits: a mirrored 2 is not a 2")
    train, test = digits(recipe.image_size)
    mean, std = _moments(train.arrays[0])
    normalize = T.Normalize(mean, std)
    return Images(
        ArrayDataset(*train.arrays, transform=T.Compose([T.RandomShift(recipe.shift), normalize])),
        ArrayDataset(*test.arrays, transform=normalize),
        tuple("0123456789"),
        mean,
        std,
    )


def _folder(recipe: Recipe) -> Images:
    root, size = Path(recipe.dataset), recipe.image_size
    if not root.is_dir():
        raise FileNotFoundError(f"dataset={recipe.dataset!r} is neither 'digits' nor a folder")
    resize = [T.Resize(size), T.CenterCrop(size)]
    held_out = "val" if (root / "val").is_dir() and not (root / "test").is_dir() else "test"
    train, test = ImageFolder(root / "train"), ImageFolder(root / held_out)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"dataset={recipe.dataset!r}: {odd[0]!r} is a class of only one of train/ and {held_out}/")
    some = np.linspace(0, len(train) - 1, min(len(train), _SAMPLE)).round().astype(int)
    pixels = T.Compose([*resize, T.ToTensor()])
    mean, std = _moments(np.stack([pixels(train[i][0]).array for i in some.tolist()]))
    augment = [T.RandomCrop(size, padding=recipe.shift)] if recipe.shift else []
    augment += [T.RandomHorizontalFlip()] if recipe.flip else []
    finish = [T.ToTensor(), T.Normalize(mean, std)]
    train.transform, test.transform = T.Compose([*resize, *augment, *finish]), T.Compose([*resize, *finish])
    return Images(train, test, tuple(train.classes), mean, std)


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel of (N, C, H, W), summed in float64."""
    mean, std = (moment((0, 2, 3), dtype=np.float64) for moment in (images.mean, images.std))
    if not (std > 0).all():
        raise ValueError("all training images are of one colour: there is nothing to learn from")
    return tuple(np.round(mean, 6).tolist()), tuple(np.round(std, 6).tolist())
