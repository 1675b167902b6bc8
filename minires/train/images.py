"""The data sets of a recipe: training images, augmented, and held-out images; both resized and normalised.

The only page of training that knows how data sets are opened and batches are made.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..data import DataLoader, Subset
from ..data import transforms as T
from ..data.dataset import ArrayDataset
from ..data.datasets import ImageFolder, digits
from ..data.randomness import generator
from ..engine import Tensor
from .recipe import Recipe

_SAMPLE = 1000  # images of a folder that mean and deviation are taken from
_MIXUP = 2  # the last word of a generator's key: what it is for (the loader's own are 0 and 1)
_SPLIT_SEED = 0  # the images held out of training are the same ones for every seed of a recipe


@dataclass(frozen=True)
class Images:
    """Data sets of ((C, S, S) float32, label): train, augmented; held_out, judged after epochs; test, at the end.

    held_out is test, unless the recipe holds out images of the training set. classes: their names. mean, std: per
    channel, in [0, 1]. mean_image: (C, S, S), subtracted instead of `mean`, or None.
    """

    train: Any
    held_out: Any
    test: Any
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mean_image: np.ndarray | None = None

    channels = property(lambda self: len(self.mean))

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash that other images, labels, classes or another order of them will hardly have."""
        digest = hashlib.sha256(repr((len(self.train), len(self.test), self.classes, self.mean, self.std)).encode())
        for data in {id(data): data for data in (self.held_out, self.test)}.values():
            for i in np.linspace(0, len(data) - 1, min(len(data), 32)).round().astype(int).tolist():
                image, label = data[i]
                pixels = np.asarray(image.array if isinstance(image, Tensor) else image, order="C")
                digest.update(pixels.tobytes() + str(int(label)).encode())
        return digest.hexdigest()


def open_images(recipe: Recipe) -> Images:
    """The images that the recipe names. Raises ValueError, RuntimeError or OSError in one line for what is missing."""
    if recipe.dataset == "digits":
        return _digits(recipe)
    if recipe.dataset == "folder" and not recipe.data_dir:
        raise ValueError("dataset='folder' needs data_dir, a folder that has train/CLASS/*.png and test/CLASS/*.png")
    return _folder(recipe, Path(recipe.data_dir if recipe.dataset == "folder" else recipe.dataset))


def make_loader(recipe: Recipe, data: Any, batch_size: int, training: bool) -> DataLoader:
    """Batches of a data set. In training shuffled; the rest of an epoch that fills no batch is then dropped:
    statistics of a few images would unsettle BatchNorm."""
    if recipe.worker_kind == "process":
        raise ValueError("worker_kind='process' is not there yet; use 'thread'")
    common: dict[str, Any] = {"num_workers": recipe.workers, "generator": recipe.seed}
    return DataLoader(data, batch_size, shuffle=training, drop_last=training, **common)


def batches(loader: DataLoader, epoch: int, start: int = 0) -> Iterator[Any]:
    """The batches of an epoch (from 0) from number `start` on: the same ones as in a whole pass."""
    loader.set_epoch(epoch)
    return itertools.islice(iter(loader), start, None)


def mixed(images: Tensor, labels: Tensor, classes: int, alpha: float, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Every image mixed with another one of the batch, and the targets (N, classes) with them.

    x = l * x_i + (1 - l) * x_j, l from Beta(alpha, alpha), one for the batch; `key` decides l and the pairs.
    Source: Zhang et al. 2018 (arXiv:1710.09412).
    """
    rng = np.random.default_rng((*key, _MIXUP))
    share, other = np.float32(rng.beta(alpha, alpha)), rng.permutation(labels.shape[0])
    array, classes_of = cast("tuple[Any, Any]", (images.array, labels.array))
    nhwc = array.transpose(0, 2, 3, 1)
    x = nhwc * share + nhwc[other] * (1 - share)
    one_hot = np.eye(classes, dtype=np.float32)[classes_of]
    return Tensor(x.transpose(0, 3, 1, 2)), Tensor(one_hot * share + one_hot[other] * (1 - share))


class Cutout:
    """Zero a square of `pixels` by `pixels` of every image, centred anywhere in it; after normalisation 0 is the mean.

    Takes (C, H, W) or a batch (N, C, H, W), Tensor or array. Source: DeVries & Taylor 2017 (arXiv:1708.04552).
    """

    def __init__(self, pixels: int):
        self.pixels = pixels

    def __call__(self, images: Any) -> Any:
        x = images.array if isinstance(images, Tensor) else images
        height, width = x.shape[-2:]
        n = x.shape[0] if x.ndim == 4 else 1
        top, left = generator().integers((0, 0), (height, width), (n, 2)).T - self.pixels // 2
        rows, columns = np.arange(height), np.arange(width)
        in_rows = (rows >= top[:, None]) & (rows < top[:, None] + self.pixels)  # (N, H)
        in_columns = (columns >= left[:, None]) & (columns < left[:, None] + self.pixels)  # (N, W)
        hole = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]  # (N, 1, H, W)
        y = np.where(hole if x.ndim == 4 else hole[0], np.float32(0), x)
        return Tensor(y) if isinstance(images, Tensor) else y


def _digits(recipe: Recipe) -> Images:
    if recipe.flip:
        raise ValueError("flip=True does not suit digits: a mirrored 2 is not a 2")
    train, test = digits(recipe.image_size)
    learn, judge = _split(recipe, len(train))
    pixels, labels = train.arrays
    mean, std = _moments(pixels[learn])
    image = _mean_image(recipe, pixels[learn])
    finish = _finish(mean, std, image)
    shift, cutout = T.RandomShift(recipe.shift), [Cutout(recipe.cutout)] if recipe.cutout else []
    # the border that a shift brings in is black; subtracted from a mean image, it is the mean
    augment = [shift, finish] if image is None else [finish, shift]
    plain = ArrayDataset(*test.arrays, transform=finish)
    return Images(
        ArrayDataset(pixels[learn], labels[learn], transform=T.Compose([*augment, *cutout])),
        ArrayDataset(pixels[judge], labels[judge], transform=finish) if recipe.val else plain,
        plain,
        tuple("0123456789"),
        mean,
        std,
        image,
    )


def _folder(recipe: Recipe, root: Path) -> Images:
    size = recipe.image_size
    if not root.is_dir():
        name = f"data_dir={recipe.data_dir!r}" if recipe.dataset == "folder" else f"dataset={recipe.dataset!r}"
        raise FileNotFoundError(f"{name} is neither 'digits' nor a folder")
    resize = [T.Resize(size), T.CenterCrop(size)]
    held_out = "val" if (root / "val").is_dir() and not (root / "test").is_dir() else "test"
    train, judged, test = ImageFolder(root / "train"), ImageFolder(root / "train"), ImageFolder(root / held_out)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"dataset={recipe.dataset!r}: {odd[0]!r} is a class of only one of train/ and {held_out}/")
    learn, judge = _split(recipe, len(train))
    some = learn[np.linspace(0, len(learn) - 1, min(len(learn), _SAMPLE)).round().astype(int)]
    pixels = T.Compose([*resize, T.ToTensor()])
    sample = np.stack([pixels(train[i][0]).array for i in some.tolist()])
    mean, std = _moments(sample)
    image = _mean_image(recipe, sample)
    finish = [T.ToTensor(), _finish(mean, std, image)]
    augment = [T.RandomCrop(size, padding=recipe.shift)] if recipe.shift else []
    augment += [T.RandomHorizontalFlip()] if recipe.flip else []
    cutout = [Cutout(recipe.cutout)] if recipe.cutout else []
    train.transform = T.Compose([*resize, *augment, *finish, *cutout])
    judged.transform = test.transform = T.Compose([*resize, *finish])
    return Images(
        Subset(train, learn) if recipe.val else train,
        Subset(judged, judge) if recipe.val else test,
        test,
        tuple(train.classes),
        mean,
        std,
        image,
    )


class _SubtractImage:
    """x - mean image, of a Tensor or array (..., C, H, W)."""

    def __init__(self, image: np.ndarray):
        self.image = image

    def __call__(self, x: Any) -> Any:
        return Tensor(x.array - self.image) if isinstance(x, Tensor) else x - self.image


def _finish(mean: tuple[float, ...], std: tuple[float, ...], image: np.ndarray | None) -> Any:
    return T.Normalize(mean, std) if image is None else _SubtractImage(image)


def _mean_image(recipe: Recipe, images: np.ndarray) -> np.ndarray | None:
    return images.mean(0, dtype=np.float64).astype(np.float32) if recipe.normalize == "pixel_mean" else None


def _split(recipe: Recipe, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices to train on, indices held out), each ascending."""
    if recipe.val >= n:
        raise ValueError(f"val={recipe.val} leaves nothing of the {n} training images")
    order = np.random.default_rng(_SPLIT_SEED).permutation(n)
    return np.sort(order[recipe.val :]), np.sort(order[: recipe.val])


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel of (N, C, H, W), summed in float64."""
    mean, std = (moment((0, 2, 3), dtype=np.float64) for moment in (images.mean, images.std))
    if not (std > 0).all():
        raise ValueError("all training images are of one colour: there is nothing to learn from")
    return tuple(np.round(mean, 6).tolist()), tuple(np.round(std, 6).tolist())
