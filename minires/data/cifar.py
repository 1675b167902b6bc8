"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their binary archives, or the folder that somebody unpacked.

A record is 1 (CIFAR-10) or 2 (CIFAR-100: coarse, fine) bytes of label and 3,072 bytes of pixels, (3, 32, 32). Only the
members named here are read, and only at their exact sizes. (The archives for Python are pickles: not read.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .archive import members
from .cache import Contents, Draft, Entry, cached, file_hash
from .decode import resized_batch

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class Cifar:
    """One of the two. files: split -> the members it consists of. rows: images in each file of a split."""

    name: str
    archive: str
    folder: str
    url: str
    sha256: str
    files: dict[str, tuple[str, ...]]
    rows: dict[str, int]
    names: str
    label_bytes: int
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def size(self, split: str) -> int:
        """Bytes of each file of a split."""
        return self.rows[split] * (self.label_bytes + _PIXELS)


CIFAR10 = Cifar(
    name="cifar10",
    archive="cifar-10-binary.tar.gz",
    folder="cifar-10-batches-bin",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    files={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
    rows={"train": 10_000, "test": 10_000},
    names="batches.meta.txt",
    label_bytes=1,
    classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
CIFAR100 = Cifar(
    name="cifar100",
    archive="cifar-100-binary.tar.gz",
    folder="cifar-100-binary",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    files={"train": ("train.bin",), "test": ("test.bin",)},
    rows={"train": 50_000, "test": 10_000},
    names="fine_label_names.txt",
    label_bytes=2,
    classes=100,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def open_cifar(kind: Cifar, source: Path, image_size: int | None = None) -> Entry:
    """Both splits, from the archive or the unpacked folder `source`, through the cache. Labels are the fine ones.

    Raises ValueError in one line naming a member that is missing, twice there, or not of its exact size.
    """
    if source.is_dir():
        expected = [*(name for names in kind.files.values() for name in names), kind.names]
        present = [source / name for name in expected if (source / name).is_file()]
        origin = {path.name: file_hash(path) for path in present}
        contents = ((path.name, path.stat().st_size, path.read_bytes) for path in present)
    else:
        origin = file_hash(source)
        inside = kind.folder + "/"
        largest = max(kind.size(split) for split in kind.files)
        files = (member for member in members(source, largest) if member.name.startswith(inside))
        contents = ((member.name.removeprefix(inside), member.size, member.read) for member in files)
    key: dict[str, Any] = {"cifar": kind.name, "source": origin, "image_size": image_size}
    if image_size is not None:
        import PIL

        key["pillow"] = PIL.__version__

    def make(draft: Draft) -> Contents:
        return _read(kind, source, contents, draft, image_size)

    return cached(key, make)


def _read(
    kind: Cifar, source: Path, contents: Iterator[tuple[str, int, Any]], draft: Draft, size: int | None
) -> Contents:
    starts: dict[str, tuple[str, int]] = {}  # file -> its split, the place of its first image
    splits, total = {}, 0
    for split, files in kind.files.items():
        splits[split] = (total, total + len(files) * kind.rows[split])
        for file in files:
            starts[file] = split, total
            total += kind.rows[split]
    images = draft.images((total, size or _SIDE, size or _SIDE, 3))
    labels, classes, waiting = np.empty(total, np.int64), [], set(starts)
    for name, nbytes, read in contents:
        if name == kind.names:
            if nbytes > 2**16:
                raise ValueError(
                    f"{str(source)!r}: {name!r} has {nbytes} bytes: not the names of {kind.classes} classes"
                )
            classes = read().decode("utf-8", "replace").split()
        if name not in starts:
            continue
        split, first = starts[name]
        if name not in waiting:
            raise ValueError(f"{str(source)!r}: {name!r} is there twice")
        if nbytes != kind.size(split):
            raise ValueError(f"{str(source)!r}: {name!r} has {nbytes} bytes in place of {kind.size(split)}")
        waiting.remove(name)
        records = np.frombuffer(read(), np.uint8).reshape(kind.rows[split], -1)
        part = slice(first, first + len(records))
        labels[part] = records[:, kind.label_bytes - 1]  # the last one is the fine one
        nhwc = records[:, kind.label_bytes :].reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
        images[part] = nhwc if size is None else resized_batch(np.ascontiguousarray(nhwc), size)
    if waiting:
        raise ValueError(f"{str(source)!r} is not the binary {kind.name} archive: {sorted(waiting)[0]!r} is missing")
    if len(classes) != kind.classes:
        found = f"{len(classes)} classes" if classes else "no file"
        raise ValueError(f"{str(source)!r}: {kind.names!r} should name {kind.classes} classes; found {found}")
    if labels.max() >= kind.classes:
        raise ValueError(f"{str(source)!r}: label {labels.max()} in a data set of {kind.classes} classes")
    return Contents(labels, classes, splits)
