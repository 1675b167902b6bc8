"""The data sets of a recipe: training images, augmented, and held-out images; both resized and normalised.

The only page of training that knows how data sets are opened and batches are made.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data import DATASETS, DataLoader, ImageDataset, Subset, open_dataset
from ..data.transforms import Augment, MixUp
from ..device import device
from .recipe import Recipe

HOLD_OUT = 0.2  # of a folder of images without a split
_ON_GPU = 2**31  # bytes of images that are kept there at most: CIFAR has 2^27
_SPLIT_SEED = 0  # the images held out of training are the same ones for every seed of a recipe
_ONE_WAY = ("digits", "mnist")  # a mirrored 2 is not a 2


@dataclass(frozen=True)
class Images:
    """Data sets of ((C, S, S) float32, label): train, augmented; held_out, judged after epochs; test, at the end.

    held_out is test, unless the recipe holds out images of the training set. classes: their names. mean, std: per
    channel of the training images, in [0, 1]. mean_image: (S, S, C), subtracted instead of `mean`, or None.
    """

    train: Any
    held_out: Any
    test: ImageDataset
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mean_image: np.ndarray | None = None

    channels = property(lambda self: len(self.mean))
    classes = property(lambda self: tuple(self.test.classes))

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash that other images, labels, classes or another order of them will hardly have."""
        train = self.train.dataset if isinstance(self.train, Subset) else self.train
        digest = hashlib.sha256(repr((len(self.train), self.classes, self.mean, self.std)).encode())
        for data in (train, self.test):
            some = np.linspace(0, len(data) - 1, min(len(data), 256)).round().astype(int)
            digest.update(data.labels.tobytes() + data.images[some].tobytes())
        return digest.hexdigest()


def open_images(recipe: Recipe) -> Images:
    """The images that the recipe names. Raises ValueError, RuntimeError or OSError in one line for what is missing."""
    name, where = _source(recipe)
    if recipe.flip and name in _ONE_WAY:
        raise ValueError(f"flip=True does not suit {name}: a mirrored 2 is not a 2")
    train, test = (
        open_dataset(name, where, part, image_size=recipe.image_size, download=recipe.download, hold_out=HOLD_OUT)
        for part in (True, False)
    )
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"dataset={recipe.dataset!r}: {odd[0]!r} is a class of only one of train/ and test/")
    learn, judge = _split(recipe, len(train))
    mean, std = _moments(recipe, train)
    image = None
    if recipe.normalize == "pixel_mean":
        image = train.images[learn].mean(0, dtype=np.float64) / 255
    plain = Augment(mean, std) if image is None else Augment(image)
    augment = Augment(
        mean if image is None else image,
        std if image is None else 1.0,
        padding=recipe.shift,
        fill="black" if image is None else "mean",
        flip=recipe.flip,
        cutout=recipe.cutout,
    )
    test = test.with_transform(plain)
    learned = train.with_transform(augment)
    if not recipe.val:
        return Images(learned, test, test, mean, std, image)
    held_out = Subset(train.with_transform(plain), judge)
    return Images(Subset(learned, learn), held_out, test, mean, std, image)


def _moments(recipe: Recipe, train: ImageDataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel: the recipe's, or those of the training images."""
    if recipe.mean:
        if len(recipe.mean) != (channels := train.images.shape[3]):
            raise ValueError(
                f"dataset={recipe.dataset!r} has images of {channels} channels, and mean={recipe.mean} is for "
                f"{len(recipe.mean)}: it, or the weights that it belongs to, are for other images"
            )
        return recipe.mean, recipe.std
    return train.statistics() if train.mean is None or train.std is None else (train.mean, train.std)


def open_test(recipe: Recipe, resize: int = 0) -> ImageDataset:
    """The test images alone, normalised by the recipe's mean and std; of a folder without a split, all images.

    resize: of the shorter side, before the middle is cropped to the recipe's image_size; by default the same. Raises
    as `open_images` does.
    """
    name, where = _source(recipe)
    size = max(resize, recipe.image_size)
    test = open_dataset(name, where, False, image_size=size, download=recipe.download, hold_out=1.0)
    return test.with_transform(_Middle(recipe.image_size, Augment(*_moments(recipe, test))))


@dataclass(frozen=True)
class _Middle:
    """The middle (size, size) of a batch of images (B, H, W, C), then another transform."""

    size: int
    then: Augment

    def __call__(self, images: np.ndarray) -> Any:
        top, left = (round((side - self.size) / 2) for side in images.shape[1:3])  # as transforms.CenterCrop
        return self.then(images[:, top : top + self.size, left : left + self.size])


def make_loader(recipe: Recipe, images: Images, data: Any, batch_size: int, training: bool) -> DataLoader:
    """Batches of a data set. In training shuffled and mixed as the recipe says; the rest of an epoch that fills no
    batch is then dropped: statistics of a few images would unsettle BatchNorm.

    On a GPU, small data sets are kept there and augmented there; workers have nothing to do then."""
    mix = MixUp(len(images.classes), recipe.mixup) if training and recipe.mixup else None
    there = None if mix else _on_gpu(data, recipe.device)
    return DataLoader(
        there or data,
        batch_size,
        shuffle=training,
        drop_last=training,
        num_workers=0 if there else recipe.workers,
        workers=recipe.worker_kind,
        persistent_workers=bool(recipe.workers) and recipe.worker_kind == "process" and training,
        generator=recipe.seed,
        batch_transform=mix,
    )


def _on_gpu(data: Any, where: str) -> Any:
    """The data set kept on the GPU; None where it is not for a GPU, or does not suit."""
    if isinstance(data, Subset):
        whole = _on_gpu(data.dataset, where)
        return whole and Subset(whole, data.indices)
    suits = isinstance(data, ImageDataset) and isinstance(data.transform, Augment) and data.images.nbytes <= _ON_GPU
    return data.on(where) if suits and device(where).type == "cuda" else None


def _source(recipe: Recipe) -> tuple[str, str | None]:
    """(name, place) of the data set; a path in place of a name is a folder or an archive of images."""
    if recipe.dataset in DATASETS:
        return recipe.dataset, recipe.data_dir or None
    if not Path(recipe.dataset).expanduser().exists():
        near = difflib.get_close_matches(recipe.dataset, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(DATASETS)}"
        raise FileNotFoundError(f"dataset={recipe.dataset!r} is neither a data set ({hint}) nor a folder or archive")
    if recipe.data_dir:
        raise ValueError(f"dataset={recipe.dataset!r} is a path already; leave out data_dir={recipe.data_dir!r}")
    return "folder", recipe.dataset


def _split(recipe: Recipe, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices to train on, indices held out), each ascending."""
    if recipe.val >= n:
        raise ValueError(f"val={recipe.val} leaves nothing of the {n} training images")
    order = np.random.default_rng(_SPLIT_SEED).permutation(n)
    return np.sort(order[recipe.val :]), np.sort(order[: recipe.val])
