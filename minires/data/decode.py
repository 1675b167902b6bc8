"""Image files as pixels; Pillow does the work. What is not a whole image of reasonable size is an error naming it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from .transforms import CenterCrop, Resize

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
LARGEST_IMAGE = 50_000_000  # pixels; a few kilobytes of PNG can hold more than the memory does
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # and no others: Pillow hands EPS to another program


def open_image(file: str | Path | bytes, name: str | None = None, mode: str = "RGB") -> Any:
    """The image file (its path, or its content with a `name` for messages) as a PIL image of `mode` (RGB or L).

    Raises FileNotFoundError, and ValueError naming a file that is not an image, is cut off, has more than 50 million
    pixels, or more than 8 bits per channel.
    """
    from PIL import Image

    name = str(file) if name is None else name
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > LARGEST_IMAGE:
                raise ValueError(f"{width}x{height} pixels are more than {LARGEST_IMAGE}")
            if image.mode[0] in "IF":  # 16 bits and more: Pillow would cut off what is above 255
                raise ValueError(f"its pixels ({image.mode}) have more than 8 bits per channel; save it with 8")
            return image.convert(mode)
    except FileNotFoundError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"cannot read the image {name!r}: it is not in a known image format") from error
    except MemoryError:
        raise
    except Exception as error:  # whatever bad bytes make a decoder do
        raise ValueError(f"cannot read the image {name!r}: {error}") from error


def resized(image: Any, size: int) -> Any:
    """The middle square of a PIL image: its shorter side resized to `size` (bilinear, antialiased), then cropped.

    Raises ValueError for an image so narrow that it would have more than 50 million pixels on the way.
    """
    if image.size == (size, size):
        return image
    if max(image.size) / min(image.size) * size * size > LARGEST_IMAGE:
        raise ValueError(f"an image of {image.size[0]}x{image.size[1]} is too narrow to be resized to {size}x{size}")
    return CenterCrop(size)(Resize(size)(image))


def pixels(image: Any) -> np.ndarray:
    """A PIL image of mode RGB or L as uint8 (H, W, C)."""
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def resized_batch(images: np.ndarray, size: int) -> np.ndarray:
    """`resized`, of every image of (N, H, W, C) uint8."""
    from PIL import Image

    if images.shape[1:3] == (size, size):
        return images
    out = np.empty((len(images), size, size, images.shape[3]), np.uint8)
    for i, image in enumerate(images):
        out[i] = pixels(resized(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image), size))
    return out
