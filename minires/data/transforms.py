"""What happens to an image between the file and the network. Names, meaning and rounding are torchvision's.

Images are PIL images until `ToTensor`; random choices come from `randomness.generator()`, which a `DataLoader` keys
by (seed, epoch, index). Images of the form (C, H, W) may also be batches (N, C, H, W). For small images held in memory
`Augment` does the usual ones for a whole batch at once; `MixUp` and `CutMix` mix the images of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..device import namespace_of
from ..engine import Tensor
from .augment import Augment, PerImage
from .mix import CutMix, MixUp
from .randomness import generator

__all__ = [
    "Augment",
    "CenterCrop",
    "ColorJitter",
    "Compose",
    "CutMix",
    "Cutout",
    "Lambda",
    "MixUp",
    "Normalize",
    "PerImage",
    "RandomCrop",
    "RandomErasing",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "RandomShift",
    "Resize",
    "ToTensor",
]
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


class RandomResizedCrop:
    """A random part of a PIL image, resized (antialiased) to (height, width): Inception's augmentation.

    The part has a share of the area drawn from `scale` and a width / height whose logarithm is drawn from that of
    `ratio`; after ten draws that do not fit, the middle with the nearest ratio. Source: Szegedy et al. 2015, section 6.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: str = "bilinear",
    ):
        self.size = _size(size, "RandomResizedCrop")
        self.scale, self.ratio = (
            _range(scale, "RandomResizedCrop", "scale"),
            _range(ratio, "RandomResizedCrop", "ratio"),
        )
        if interpolation not in _MODES:
            raise ValueError(f"RandomResizedCrop: interpolation={interpolation!r} must be one of {', '.join(_MODES)}")
        self.mode = _MODES[interpolation]

    def __call__(self, image: Any) -> Any:
        width, height = _pil(image, "RandomResizedCrop").size
        left, top, w, h = self._part(width, height)
        return image.crop((left, top, left + w, top + h)).resize(self.size[::-1], self.mode)

    def _part(self, width: int, height: int) -> tuple[int, int, int, int]:
        """left, top, width, height."""
        g, (low, high) = generator(), self.ratio
        for _ in range(10):
            area = width * height * g.uniform(*self.scale)
            ratio = math.exp(g.uniform(math.log(low), math.log(high)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = g.integers((0, 0), (width - w + 1, height - h + 1)).tolist()
                return left, top, w, h
        ratio = min(max(width / height, low), high)
        w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
        return (width - w) // 2, (height - h) // 2, w, h


class ColorJitter:
    """Change brightness, contrast, saturation and hue of a PIL image by random factors, in random order.

    brightness, contrast, saturation: a factor drawn from [max(0, 1 - v), 1 + v], or from a pair. hue: a shift of the
    colour circle drawn from [-v, v], v at most 0.5, or from a pair; greyscale images have none.
    """

    def __init__(self, brightness: Any = 0.0, contrast: Any = 0.0, saturation: Any = 0.0, hue: Any = 0.0):
        self.ranges = {
            "Brightness": _factor(brightness, "brightness"),
            "Contrast": _factor(contrast, "contrast"),
            "Color": _factor(saturation, "saturation"),
            "Hue": _factor(hue, "hue", 0.0, -0.5, 0.5),
        }

    def __call__(self, image: Any) -> Any:
        from PIL import ImageEnhance

        image, g = _pil(image, "ColorJitter"), generator()
        kinds = list(self.ranges)
        for i in g.permutation(len(kinds)).tolist():
            low, high = self.ranges[kinds[i]]
            amount = g.uniform(low, high)
            if low == high == (0.0 if kinds[i] == "Hue" else 1.0):
                continue
            if kinds[i] == "Hue":
                image = _hue_shifted(image, amount)
            else:
                image = getattr(ImageEnhance, kinds[i])(image).enhance(amount)
        return image


class RandomErasing:
    """With probability p, replace a random box of a Tensor or array (C, H, W) by `value` (after ToTensor).

    scale, ratio: share of the area and height / width, drawn as RandomResizedCrop does; a box that does not fit in ten
    draws leaves the image as it is. Source: Zhong et al. 2017, "Random Erasing Data Augmentation".
    """

    def __init__(
        self,
        p: float = 0.5,
        scale: Sequence[float] = (0.02, 0.33),
        ratio: Sequence[float] = (0.3, 3.3),
        value: float = 0.0,
    ):
        if not 0 <= p <= 1:
            raise ValueError(f"RandomErasing: p={p} must be from 0 to 1")
        self.p, self.value = p, value
        self.scale, self.ratio = _range(scale, "RandomErasing", "scale"), _range(ratio, "RandomErasing", "ratio")

    def __call__(self, image: Any) -> Any:
        _, height, width = _chw(image, "RandomErasing").shape
        g, (low, high) = generator(), self.ratio
        if g.random() >= self.p:
            return image
        for _ in range(10):
            area = height * width * g.uniform(*self.scale)
            ratio = math.exp(g.uniform(math.log(low), math.log(high)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < h < height and 0 < w < width:
                top, left = g.integers((0, 0), (height - h + 1, width - w + 1)).tolist()
                return _filled(image, slice(top, top + h), slice(left, left + w), self.value)
        return image


class Cutout:
    """Set a square of a Tensor or array (C, H, W) to zero, the mean after Normalize; centred anywhere, clipped.

    size: pixels of its side. Source: DeVries & Taylor 2017, "Improved Regularization of CNNs with Cutout".
    """

    def __init__(self, size: int):
        if size < 1:
            raise ValueError(f"Cutout: size={size} must be at least 1")
        self.size = size

    def __call__(self, image: Any) -> Any:
        _, height, width = _chw(image, "Cutout").shape
        corner = (generator().integers((0, 0), (height, width)) - self.size // 2).tolist()
        rows, columns = (slice(max(first, 0), first + self.size) for first in corner)
        return _filled(image, rows, columns, 0.0)


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


def _range(pair: Sequence[float], who: str, name: str) -> tuple[float, float]:
    """(low, high), both above 0."""
    if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
        raise ValueError(f"{who}: {name}={pair!r} must be (low, high) with 0 < low <= high")
    return float(pair[0]), float(pair[1])


def _factor(
    value: Any, name: str, centre: float = 1.0, least: float = 0.0, most: float = math.inf
) -> tuple[float, float]:
    """(low, high) of a number's reach around `centre`, or of a pair."""
    if isinstance(value, (int, float)):
        low, high = (max(centre - value, least) if centre else -value, centre + value)
        good = value >= 0
    else:
        low, high = value
        good = low <= high
    if not (good and least <= low and high <= most):
        raise ValueError(f"ColorJitter: {name}={value!r} must be a number from 0 or a pair, within {least} to {most}")
    return float(low), float(high)


def _hue_shifted(image: Any, amount: float) -> Any:
    from PIL import Image

    if image.mode in ("L", "1", "I", "F"):
        return image
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int64) + round(amount * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert(image.mode)


def _filled(image: Any, rows: slice, columns: slice, value: float) -> Any:
    """A copy of (C, H, W), a Tensor if it was one, with `value` in a box."""
    x = image.array if isinstance(image, Tensor) else image
    y = x.transpose(1, 2, 0).copy().transpose(2, 0, 1)  # channels-last stays so
    y[:, rows, columns] = value
    return Tensor(y) if isinstance(image, Tensor) else y


def _chw(image: Any, who: str) -> Any:
    """The image, if it is a Tensor or array (C, H, W)."""
    if getattr(image, "ndim", 0) != 3:
        kind = getattr(image, "shape", type(image).__name__)
        raise TypeError(f"{who} takes a Tensor or array (C, H, W), not {kind}; put it after ToTensor() in Compose")
    return image


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
