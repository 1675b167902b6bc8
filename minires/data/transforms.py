"""What happens to an image between the file and the network. Names, meaning and rounding are torchvision's.

Images are PIL images until `ToTensor`; random choices come from `randomness.generator()`, which a `DataLoader` keys
by (seed, epoch, index). Images of the form (C, H, W) may also be batches (N, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..device import namespace_of
from ..engine import Tensor
from .randomness import generator

_MODES = {"nearest": 0, "bilinear": 2, "bicubic": 3}  # numbers of PIL.Image.Resampling


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]):
        self.transforms = list(transforms)

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Lambda:
    """Any function as a transform."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __call__(self, image: Any) -> Any:
        return self.function(image)


class ToTensor:
    """A PIL image, or a uint8 array (H, W) or (H, W, C), as a float32 Tensor (C, H, W) scaled from 0..255 to [0, 1].

    Arrays of other dtypes, and PIL images of modes I, I;16 and F, keep their values.
    """

    def __call__(self, image: Any) -> Tensor:
        if not isinstance(image, np.ndarray):
            _pil(image, "ToTensor")
            image = image.convert("L") if image.mode == "1" else image
            image = image.convert("RGB") if image.mode == "P" else image
        pixels = np.asarray(image)
        if pixels.ndim not in (2, 3):
            raise ValueError(f"ToTensor takes an image (H, W) or (H, W, C), not {pixels.shape}")
        scale = np.float32(255 if pixels.dtype == np.uint8 else 1)
        pixels = pixels.astype(np.float32) / scale
        return Tensor(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


class Normalize:
    """(x - mean) / std per channel, of a Tensor or array (..., C, H, W). Raises ValueError for a std of 0."""

    def __init__(self, mean: Sequence[float] | float, std: Sequence[float] | float):
        self.mean, self.std = (np.atleast_1d(np.asarray(v, np.float32))[:, None, None] for v in (mean, std))
        if not (self.std > 0).all():
            raise ValueError(f"Normalize: std={std} must be above 0 in every channel")

    def __call__(self, image: Any) -> Any:
        x = image.array if isinstance(image, Tensor) else image
        if x.ndim < 3 or self.mean.shape[0] not in (1, x.shape[-3]):
            raise ValueError(f"Normalize: {self.mean.shape[0]} means do not fit an image of shape {x.shape}")
        xp = namespace_of(x)
        y = (x - xp.asarray(self.mean)) / xp.asarray(self.std)
        return Tensor(y) if isinstance(image, Tensor) else y


class Resize:
    """Resize a PIL image, antialiased: to (height, width), or an int for its shorter side.

    interpolation: "bilinear", "bicubic" or "nearest".
    """

    def __init__(self, size: int | Sequence[int], interpolation: str = "bilinear"):
        self.size = _size(size, "Resize", short_side=True)
        if interpolation not in _MODES:
            raise ValueError(f"Resize: interpolation={interpolation!r} must be one of {', '.join(_MODES)}")
        self.mode = _MODES[interpolation]

    def __call__(self, image: Any) -> Any:
        width, height = _pil(image, "Resize").size
        if len(self.size) == 2:
            height, width = self.size
        elif width <= height:
            width, height = self.size[0], int(self.size[0] * height / width)
        else:
            width, height = int(self.size[0] * width / height), self.size[0]
        return image.resize((width, height), self.mode)


class CenterCrop:
    """The middle (height, width) of a PIL image, which is padded with zeros where it is smaller."""

    def __init__(self, size: int | Sequence[int]):
        self.size = _size(size, "CenterCrop")

    def __call__(self, image: Any) -> Any:
        width, height = _pil(image, "CenterCrop").size
        h, w = self.size
        if h > height or w > width:
            dx, dy = max(w - width, 0), max(h - height, 0)
            image = _padded(image, (dx // 2, dy // 2, (dx + 1) // 2, (dy + 1) // 2))
            width, height = image.size
        top, left = round((height - h) / 2), round((width - w) / 2)
        return image.crop((left, top, left + w, top + h))


class RandomCrop:
    """A random (height, width) of a PIL image that is first padded with zeros.

    padding: pixels on every side, or (left and right, top and bottom), or (left, top, right, bottom). Raises
    ValueError where the padded image is smaller than the crop.
    """

    def __init__(self, size: int | Sequence[int], padding: int | Sequence[int] | None = None):
        self.size = _size(size, "RandomCrop")
        sides = (0,) if padding is None else (padding,) if isinstance(padding, int) else tuple(padding)
        if len(sides) not in (1, 2, 4) or min(sides) < 0:
            raise ValueError(f"RandomCrop: padding={padding!r} must be 1, 2 or 4 numbers of pixels, none negative")
        self.padding = sides * (4 // len(sides))

    def __call__(self, image: Any) -> Any:
        image = _padded(_pil(image, "RandomCrop"), self.padding)
        (width, height), (h, w) = image.size, self.size
        if h > height or w > width:
            raise ValueError(f"RandomCrop: a crop of {h}x{w} does not fit an image of {height}x{width} (padded)")
        top, left = generator().integers((0, 0), (height - h + 1, width - w + 1)).tolist()
        return image.crop((left, top, left + w, top + h))


class RandomHorizontalFlip:
    """Mirror a PIL image left to right with probability p."""

    def __init__(self, p: float = 0.5):
        if not 0 <= p <= 1:
            raise ValueError(f"RandomHorizontalFlip: p={p} must be from 0 to 1")
        self.p = p

    def __call__(self, image: Any) -> Any:
        _pil(image, "RandomHorizontalFlip")
        return image.transpose(0) if generator().random() < self.p else image  # 0 is PIL's FLIP_LEFT_RIGHT


class RandomShift:
    """Shift every image of a batch (N, C, H, W) by its own random whole number of pixels, up to `pixels` each way.

    Zeros come in at the border, so use it before `Normalize`: the same as padding by `pixels` and cropping at random,
    for a whole batch at once.
    """

    def __init__(self, pixels: int):
        if pixels < 0:
            raise ValueError(f"RandomShift: pixels={pixels} must be at least 0")
        self.pixels = pixels

    def __call__(self, images: Any) -> Any:
        n, _, height, width = images.shape
        reach = self.pixels
        xp = namespace_of(images)
        padded = xp.pad(images, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
        top, left = xp.asarray(generator().integers(0, 2 * reach + 1, (2, n)))
        rows = top[:, None] + xp.arange(height)  # (N, H)
        columns = left[:, None] + xp.arange(width)  # (N, W)
        nhwc = padded.transpose(0, 2, 3, 1)[xp.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
        return nhwc.transpose(0, 3, 1, 2)


def _size(size: int | Sequence[int], who: str, short_side: bool = False) -> tuple[int, ...]:
    """An int as (n, n), or as (n,) where it means the shorter side; a pair as it is."""
    sizes = (size,) * (1 if short_side else 2) if isinstance(size, int) else tuple(size)
    if len(sizes) not in (1, 2) or not all(isinstance(s, (int, np.integer)) and s >= 1 for s in sizes):
        raise ValueError(f"{who}: size={size!r} must be an int or (height, width), each at least 1")
    return sizes if short_side or len(sizes) == 2 else sizes * 2


def _padded(image: Any, sides: tuple[int, ...]) -> Any:
    """The image with zeros at (left, top, right, bottom); PIL's crop fills what lies outside with zeros."""
    left, top, right, bottom = sides
    width, height = image.size
    return image.crop((-left, -top, width + right, height + bottom)) if any(sides) else image


def _pil(image: Any, who: str) -> Any:
    """The image, if it is a PIL image."""
    if not type(image).__module__.startswith("PIL"):
        kind = type(image).__name__
        raise TypeError(f"{who} takes a PIL image, not a {kind}; put it before ToTensor() in Compose")
    return image
