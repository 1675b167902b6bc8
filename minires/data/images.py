"""Labelled images of one size in one uint8 array: what `open_dataset` gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..device import CPU, Device, to_device
from ..device import device as as_device
from .augment import Augment
from .cache import Entry
from .dataset import Dataset, common_length, within

_CHUNK = 2**26  # bytes of images whose moments are summed at a time


class ImageDataset(Dataset):
    """Images (N, H, W, C) uint8, in memory or mapped from the cache. Sample i is (transform of image i, label).

    images: (N, H, W, C) uint8, read-only where mapped. labels: (N,) int64. classes: their names. mean, std: per channel
    of the training images in [0, 1], where they are known, else None (`statistics` computes them). paths: the file that
    each image was in, where there was one, else None. transform: called with a batch of images (B, H, W, C) uint8; by
    default `transforms.Augment()`: float32 (B, C, H, W) in [0, 1]; `transforms.PerImage` makes one of a transform of
    PIL images. Raises ValueError where lengths or labels do not fit.

    Pickling it (as worker processes do) passes on where mapped images lie, not the images.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        classes: Sequence[str],
        *,
        name: str = "images",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        paths: Sequence[str] | None = None,
        transform: Callable[[np.ndarray], Any] | None = None,
    ):
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(f"ImageDataset needs uint8 images (N, H, W, C), not {images.dtype} {images.shape}")
        self.images, self.labels = images, np.asarray(labels, np.int64)
        self.length = common_length((self.images, self.labels), "ImageDataset")
        if self.length and not 0 <= self.labels.min() <= self.labels.max() < len(classes):
            low, high = self.labels.min(), self.labels.max()
            raise ValueError(f"ImageDataset: labels from {low} to {high} do not fit {len(classes)} classes")
        self.classes, self.name, self.mean, self.std = list(classes), name, mean, std
        self.paths = None if paths is None else list(paths)
        self.transform = transform or Augment()
        self._part: tuple[Entry, str] | None = None
        self.device = CPU
        self._there: dict[Device, Any] = {}  # the images on other devices

    @classmethod
    def from_cache(cls, entry: Entry, split: str, **options: Any) -> ImageDataset:
        """A split of a cache entry; its images stay in the file until they are read."""
        start, stop = entry.splits[split]
        paths = None if entry.paths is None else entry.paths[start:stop]
        data = cls(entry.images[start:stop], entry.labels[start:stop], entry.classes, paths=paths, **options)
        data._part = entry, split
        return data

    def with_transform(self, transform: Callable[[np.ndarray], Any]) -> ImageDataset:
        """The same images with another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def on(self, where: str | Device) -> ImageDataset:
        """The same images, kept on a device, where `transforms.Augment` makes the batches, to the bit the CPU's.

        They are copied there when the first batch is made, once for all data sets that `with_transform` and `on` made
        of this one. Labels stay on the CPU. TypeError for another transform: it runs on the CPU alone.
        """
        other = copy.copy(self)
        other.device = as_device(where)
        if other.device.type == "cuda" and not isinstance(self.transform, Augment):
            raise TypeError(f"{self.name}: of the transforms only Augment runs on {where}, not {self.transform!r}")
        return other

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Any, np.ndarray]:
        """(transformed images, labels) at `indices`."""
        rows = np.asarray(indices, dtype=np.int64)
        if self.device == CPU:
            return self.transform(self.images[rows]), self.labels[rows]
        if self.device not in self._there:
            self._there[self.device] = to_device(np.asarray(self.images), self.device)
        return self.transform.gathered(self._there[self.device], rows), self.labels[rows]

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        images, labels = self.batch([within(index, self.length)])
        return images[0], labels[0]

    def __len__(self) -> int:
        return self.length

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of every channel, in [0, 1], over all images.

        Raises ValueError where a channel is of one value: there is nothing to learn from it.
        """
        channels = self.images.shape[3]
        step = max(1, _CHUNK // max(1, self.images[:1].nbytes))
        counts = np.zeros((channels, 256), np.int64)
        for i in range(0, self.length, step):
            for c in range(channels):
                counts[c] += np.bincount(self.images[i : i + step, :, :, c].ravel(), minlength=256)
        values = np.arange(256) / 255
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        mean = shares @ values
        std = np.sqrt(((values - mean[:, None]) ** 2 * shares).sum(1))
        if not (std > 0).all():
            raise ValueError(f"{self.name}: all pixels of a channel are the same: there is nothing to learn from")
        return tuple(np.round(mean, 6).tolist()), tuple(np.round(std, 6).tolist())

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_there"] = {}
        if self._part is not None:
            del state["images"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._part is not None:
            entry, split = self._part
            start, stop = entry.splits[split]
            self.images = entry.images[start:stop]
