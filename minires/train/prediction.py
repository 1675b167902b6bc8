"""What a network says of image files: the classes that it holds most likely, and where it looked.

network = open_network("runs/pets-...")
for found in predict(network, find_images(["photos", "cat*.jpg"])):
    print(found.file, found.error or found.top[0])
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.augment import Augment
from ..data.decode import IMAGE_SUFFIXES, open_image, pixels, resized
from ..data.transforms import CenterCrop
from ..device import CPU, to_device
from ..engine import Tensor
from ..grad_cam import grad_cam
from ..nn import Module
from ..state import no_grad
from .pretrained import Network, for_inference

_SMALLEST = 224  # pixels of a side of an overlay, at least: 32x32 cannot be looked at
_GAP, _CAPTION = 8, 24  # between and below
_NEAREST, _BILINEAR = 0, 2  # Pillow's numbers of these filters
# black, violet, red, orange, yellow: lighter for more, so that it reads in grey and by every eye
_HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)


@dataclass(frozen=True)
class Prediction:
    """file: as it was asked for. top: (class, probability) in falling order. error: why there are none. overlay: the
    file that shows where the network looked, "" where none was asked for."""

    file: str
    top: tuple[tuple[str, float], ...] = ()
    error: str = ""
    overlay: str = ""


def find_images(names: Iterable[str]) -> list[Path]:
    """Image files by path, in folders (all below, sorted) and by patterns (*, ?, [abc], **), each once, in that order.

    A name that is nothing of it is taken for a file. ValueError for a folder without images, and for a pattern that
    nothing matches.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
            inside = [p for p in inside if not any(part[0] == "." for part in p.relative_to(path).parts)]
            if not inside:
                raise ValueError(f"no images in the folder {name!r}; they end in {', '.join(IMAGE_SUFFIXES)}")
            found += inside
        elif glob.has_magic(name) and not path.exists():
            matches = sorted(Path(m) for m in glob.glob(str(path), recursive=True))
            matches = [m for m in matches if m.is_file()]
            if not matches:
                raise ValueError(f"nothing matches {name!r}")
            found += matches
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def predict(
    network: Network,
    files: Sequence[str | Path],
    top: int = 5,
    batch_size: int = 64,
    overlays: str | Path | None = None,
) -> Iterator[Prediction]:
    """A `Prediction` for every file, in order. One that cannot be read has an error; the others go on.

    top: how many classes, at most. overlays: a folder for a picture of each image with its Grad-CAM map for the class
    that is most likely. Raises ValueError where the network takes images neither grey nor RGB, or its outputs are not
    finite.
    """
    if network.channels not in (1, 3):
        raise ValueError(f"{network.source} take images of {network.channels} channels; files have 1 or 3")
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    folder = None if overlays is None else Path(overlays)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    model = for_inference(network.model) if folder is None else network.model  # Grad-CAM looks at its parts
    for first in range(0, len(files), batch_size):
        batch, images, errors = files[first : first + batch_size], {}, {}
        for i, file in enumerate(batch):
            try:
                images[i] = _read(file, network)
            except (ValueError, OSError) as error:
                errors[i] = " ".join(str(error).split())
        if images:
            shares, maps = _shares(network, model, np.stack(list(images.values())), folder is not None)
        for i, file in enumerate(batch):
            if i in errors:
                yield Prediction(str(file), error=errors[i])
                continue
            row = list(images).index(i)
            order = np.argsort(-shares[row], kind="stable")[:top]
            best = tuple((network.classes[c], float(shares[row, c])) for c in order)
            overlay = ""
            if folder is not None:
                overlay = str(folder / _unused(Path(file).stem, taken))
                draw_overlay(images[i], maps[row], f"{best[0][0]} {best[0][1]:.1%}").save(overlay)
            yield Prediction(str(file), best, overlay=overlay)


def draw_overlay(image: np.ndarray, heat: np.ndarray, caption: str) -> Any:
    """A PIL image: the image (H, W, C) uint8, and beside it the same under its map (h, w), lighter for more."""
    from PIL import Image, ImageDraw

    factor = -(-_SMALLEST // min(image.shape[:2]))
    height, width = (factor * n for n in image.shape[:2])
    plain = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3))).resize((width, height), _NEAREST)
    large = np.asarray(Image.fromarray(heat.astype(np.float32)).resize((width, height), _BILINEAR)).clip(0, 1)
    at, levels = large * (len(_HEAT) - 1), np.arange(len(_HEAT))
    colours = np.stack([np.interp(at, levels, _HEAT[:, c]) for c in range(3)], -1)
    mixed = Image.fromarray((0.45 * np.asarray(plain) + 0.55 * colours).round().astype(np.uint8))
    picture = Image.new("RGB", (2 * width + _GAP, height + _CAPTION), "white")
    picture.paste(plain, (0, 0))
    picture.paste(mixed, (width + _GAP, 0))
    ImageDraw.Draw(picture).text((4, height + 4), caption, fill="black", font_size=14)
    return picture


def _read(file: str | Path, network: Network) -> np.ndarray:
    """(S, S, C) uint8, as the network takes it."""
    if not Path(file).exists():
        raise FileNotFoundError(f"there is no file {str(file)!r}")
    image = open_image(Path(file), mode="L" if network.channels == 1 else "RGB")
    try:
        image = resized(image, network.resize or network.image_size)
        return pixels(image if image.size[0] == network.image_size else CenterCrop(network.image_size)(image))
    except ValueError as error:
        raise ValueError(f"cannot take the image {str(file)!r}: {error}") from error


def _shares(network: Network, model: Module, images: np.ndarray, look: bool) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities (N, K) float64, Grad-CAM maps (N, h, w) of the largest, or none) of images (N, S, S, C)."""
    x = Tensor(Augment(network.mean, network.std)(images)).to(next(network.model.parameters()).device)
    with no_grad():
        y = to_device(model(x).array, CPU).astype(np.float64)
    if not np.isfinite(y).all():
        raise ValueError(f"{network.source} give outputs that are NaN or infinite: they are damaged, or diverged")
    shares = np.exp(y - y.max(1, keepdims=True))
    maps = grad_cam(network.model, x, y.argmax(1)) if look else np.empty(0)
    return shares / shares.sum(1, keepdims=True), maps


def _unused(stem: str, taken: set[str]) -> str:
    name, number = f"{stem}.png", 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}.png"
    taken.add(name)
    return name
