"""MNIST (LeCun et al. 1998) and Fashion-MNIST (Xiao et al. 2017) from their four IDX files, packed by gzip or not.

IDX: two zero bytes, the type (8: uint8), the number of axes, each axis as a big-endian uint32, then the numbers.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .cache import Contents, Draft, Entry, cached, file_hash
from .decode import resized_batch

_LARGEST = 2**30  # bytes; MNIST's own files are at most 47 million


@dataclass(frozen=True)
class Idx:
    """One of the two. files: (split, what) -> (name, SHA-256); they lie under `url`."""

    name: str
    url: str
    files: dict[tuple[str, str], tuple[str, str]]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _files(*hashes: str) -> dict[tuple[str, str], tuple[str, str]]:
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    what = [(split, part) for split in ("train", "test") for part in ("images", "labels")]
    return {key: (f"{name}.gz", value) for key, name, value in zip(what, names, hashes, strict=True)}


MNIST = Idx(
    "mnist",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    _files(
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    tuple("0123456789"),
    (0.1307,),
    (0.3081,),
)
FASHION_MNIST = Idx(
    "fashion_mnist",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    _files(
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
    ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    (0.2860,),
    (0.3530,),
)


def open_idx(kind: Idx, files: dict[tuple[str, str], Path], image_size: int | None = None) -> Entry:
    """Both splits from the four files, through the cache. Raises ValueError naming a file that is wrong."""
    key: dict[str, Any] = {
        "idx": kind.name,
        "files": [file_hash(files[key]) for key in sorted(files)],
        "image_size": image_size,
    }
    if image_size is not None:
        import PIL

        key["pillow"] = PIL.__version__

    def make(draft: Draft) -> Contents:
        parts, labels = [], []
        for split in ("train", "test"):
            images, marks = read_idx(files[split, "images"], 3), read_idx(files[split, "labels"], 1)
            if len(images) != len(marks):
                raise ValueError(
                    f"{str(files[split, 'images'])!r} has {len(images)} images, but {len(marks)} labels go with it"
                )
            if len(marks) and marks.max() >= len(kind.classes):
                raise ValueError(
                    f"{str(files[split, 'labels'])!r}: label {marks.max()} in a data set of {len(kind.classes)} classes"
                )
            images = images[..., None]
            parts.append(images if image_size is None else resized_batch(images, image_size))
            labels.append(marks)
        train, test = parts
        if train.shape[1:] != test.shape[1:]:
            raise ValueError(f"{kind.name}: training images are {train.shape[1:]}, test images {test.shape[1:]}")
        n = len(train)
        out = draft.images((n + len(test), *train.shape[1:]))
        out[:n], out[n:] = train, test
        splits = {"train": (0, n), "test": (n, len(out))}
        return Contents(np.concatenate(labels).astype(np.int64), list(kind.classes), splits)

    return cached(key, make)


def read_idx(path: str | Path, axes: int) -> np.ndarray:
    """The uint8 array of an IDX file (name.gz: packed) with that many axes.

    Raises ValueError naming a file that is not one, is cut off, or has more in it than it says.
    """
    path = Path(path)
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            header = file.read(4 + 4 * axes)
            if header[:4] != bytes((0, 0, 8, axes)) or len(header) < 4 + 4 * axes:
                raise ValueError(f"{str(path)!r} is not an IDX file of uint8 with {axes} axes")
            shape = tuple(int(n) for n in np.frombuffer(header[4:], ">u4"))
            if (size := math.prod(shape)) > _LARGEST:
                raise ValueError(f"{str(path)!r} claims {shape}: more than {_LARGEST} bytes")
            content = file.read(size + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    if len(content) != size:
        more = "more" if len(content) > size else "fewer"
        raise ValueError(f"{str(path)!r} has {more} than the {size} bytes of its {shape}")
    return np.frombuffer(content, np.uint8).reshape(shape)
