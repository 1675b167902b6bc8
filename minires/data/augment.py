"""Transforms of whole batches of small images: (B, H, W, C) uint8 in, (B, C, H, W) float32 out, in a millisecond.

Each image draws its own numbers, keyed by (seed, epoch, index) within a `DataLoader`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

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
        if images.dtype != np.uint8 or images.ndim != 4:
            raise TypeError(f"Augment takes uint8 images (B, H, W, C), not {images.dtype} {images.shape}")
        x = self._normalized(images)
        if self.padding or self.flip or self.cutout:
            x = self._augmented(x, *images.shape[:3])
        return x.transpose(0, 3, 1, 2)

    def _normalized(self, images: np.ndarray) -> np.ndarray:
        """(B, H + 2p, W + 2p, C) float32: normalised, with a border of p = padding pixels."""
        b, h, w, c = images.shape
        if self.mean.size not in (1, c, h * w * c) or self.std.size not in (1, c):
            raise ValueError(
                f"Augment: mean {self.mean.shape} and std {self.std.shape} do not fit images (H, W, C) = {(h, w, c)}"
            )
        p = self.padding
        x = np.empty((b, h + 2 * p, w + 2 * p, c), np.float32)
        if p:
            x[:] = np.broadcast_to(-self.mean / self.std, c) if self.fill == "black" else 0
        # y = scale * x + shift along rows of W * C numbers: loops over the C channels alone would be too short
        inside = x.reshape(b, h + 2 * p, -1)[:, p : p + h, p * c : (p + w) * c]
        scale = np.broadcast_to(1 / (255 * self.std), (w, c)).reshape(-1).astype(np.float32)
        shift = np.broadcast_to(-self.mean / self.std, (h, w, c)).reshape(h, w * c).astype(np.float32)
        np.multiply(images.reshape(b, h, w * c), scale, out=inside, dtype=np.float32)
        inside += shift
        return x

    def _augmented(self, x: np.ndarray, b: int, h: int, w: int) -> np.ndarray:
        u = uniforms(b, 5)
        tops, lefts = (u[:, :2] * (2 * self.padding + 1)).astype(np.int64).T.tolist()
        flips = (u[:, 2] < 0.5).tolist() if self.flip else [False] * b
        y = np.empty((b, h, w, x.shape[3]), np.float32)
        for i in range(b):
            window = x[i, tops[i] : tops[i] + h, lefts[i] : lefts[i] + w]
            y[i] = window[:, ::-1] if flips[i] else window
        if self.cutout:
            corners = (u[:, 3:] * (h, w)).astype(np.int64) - self.cutout // 2  # top left, from the centre
            first, last = np.maximum(corners, 0).tolist(), (corners + self.cutout).tolist()
            for i in range(b):
                y[i, first[i][0] : last[i][0], first[i][1] : last[i][1]] = 0
        return y


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
