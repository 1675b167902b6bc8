"""Transforms of whole batches of small images: (B, H, W, C) uint8 in, (B, C, H, W) float32 out, in a millisecond.

Each image draws its own numbers, keyed by (seed, epoch, index) within a `DataLoader`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..device import device_of, to_device
from ..dispatch import run
from .collate import default_collate
from .randomness import sample, uniforms


class Augment:
    """Normalise, pad and crop, mirror and cut out, for a whole batch at once. Without arguments: x / 255.

    mean, std: y = (x / 255 - mean) / std; a number, one per channel, or (mean only) an image (H, W, C): the per-pixel
    mean of He et al. 2015. padding: pad every side by so many pixels, then crop a random window of the image's size.
    fill: what padding is, "black" (as torchvision's RandomCrop before Normalize) or "mean" (zeros after normalising,
    as He et al. 2015). flip: mirror half of the images left to right. cutout: set a square of so many pixels, centred
    anywhere in the image and clipped at its border, to zero after normalising (DeVries & Taylor 2017); 0: none.

    Takes uint8 arrays (B, H, W, C), returns float32 (B, C, H, W) with channels last in memory. Raises ValueError for
    values that cannot be, and TypeError for images that are not uint8.
    """

    def __init__(
        self,
        mean: Any = 0.0,
        std: Sequence[float] | float = 1.0,
        *,
        padding: int = 0,
        fill: str = "black",
        flip: bool = False,
        cutout: int = 0,
    ):
        self.mean, self.std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
        if not (self.std > 0).all() or self.std.ndim > 1:
            raise ValueError(f"Augment: std={std} must be above 0, one number or one per channel")
        if self.mean.ndim not in (0, 1, 3):
            raise ValueError(
                f"Augment: mean of shape {self.mean.shape} must be one number, one per channel, or (H, W, C)"
            )
        for name, value in (("padding", padding), ("cutout", cutout)):
            if value < 0:
                raise ValueError(f"Augment: {name}={value} must be at least 0")
        if fill not in ("black", "mean"):
            raise ValueError(f"Augment: fill={fill!r} must be 'black' or 'mean'")
        if fill == "black" and self.mean.ndim == 3 and padding:
            raise ValueError(
                "Augment: with a per-pixel mean, padding needs fill='mean'; there is no mean outside the image"
            )
        self.padding, self.fill, self.flip, self.cutout = padding, fill, flip, cutout

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.gathered(images, np.arange(len(images)))

    def gathered(self, images: Any, rows: np.ndarray) -> Any:
        """The batch of the images at `rows`, on the device of `images`: on each the same, to the bit."""
        if images.dtype != np.uint8 or images.ndim != 4:
            raise TypeError(f"Augment takes uint8 images (B, H, W, C), not {images.dtype} {images.shape}")
        numbers = self._numbers(images.shape[1:])
        arrays = (
            to_device(a, device_of(images)) for a in (rows, self._places(len(rows), *images.shape[1:3]), *numbers)
        )
        return run("augment", images, *arrays, padding=self.padding, dtype="float32")

    def _numbers(self, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        """y = scale * x + shift inside the image, and border outside: (C,), (H, W, C), (C,) float32."""
        c = shape[2]
        if self.mean.size not in (1, c, math.prod(shape)) or self.std.size not in (1, c):
            raise ValueError(
                f"Augment: mean {self.mean.shape} and std {self.std.shape} do not fit images (H, W, C) = {shape}"
            )
        scale, shift = np.broadcast_to(1 / (255 * self.std), c), np.broadcast_to(-self.mean / self.std, shape)
        border = np.broadcast_to(-self.mean / self.std, c) if self.padding and self.fill == "black" else np.zeros(c)
        return scale.astype(np.float32), shift.astype(np.float32), border.astype(np.float32)

    def _places(self, b: int, h: int, w: int) -> np.ndarray:
        """Where each image is cropped, whether it is mirrored, what is cut out of it: (B, 7) int32, see the kernel."""
        places = np.zeros((b, 7), np.int32)
        if not (self.padding or self.flip or self.cutout):
            return places
        u = uniforms(b, 5)
        places[:, :2] = u[:, :2] * (2 * self.padding + 1)
        places[:, 2] = self.flip & (u[:, 2] < 0.5)
        if self.cutout:
            corners = (u[:, 3:] * (h, w)).astype(np.int64) - self.cutout // 2  # top left, from the centre
            places[:, 3:5], places[:, 5:] = np.maximum(corners, 0), np.minimum(corners + self.cutout, (h, w))
        return places


class PerImage:
    """Apply a transform of PIL images to every image of a batch (B, H, W, C), and stack the results: a `Tensor`.

    What an image looks like is what the transform makes of it alone, whatever its batch. The transform's last step is
    usually ToTensor or Normalize.
    """

    def __init__(self, transform: Callable[[Any], Any]):
        self.transform = transform

    def __call__(self, images: np.ndarray) -> Any:
        from PIL import Image

        results = []
        for i, pixels in enumerate(images):
            with sample(i):
                results.append(self.transform(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)))
        return default_collate(results)
