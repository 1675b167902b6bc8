"""Folders and archives of image files, one folder per class, decoded once into the cache.

train/CLASS/.../image and test/CLASS/.../image (or val/, valid/, validation/), or CLASS/.../image without a split, of
which a share may be held out as test images. One folder around all of it does not matter.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .archive import ARCHIVE_SUFFIXES, is_archive, members
from .cache import Contents, Draft, Entry, cached, file_hash
from .decode import IMAGE_SUFFIXES, open_image, pixels, resized
from .progress import progress

_SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
_DECODER = 1  # goes up when the same file would give other pixels


@dataclass
class _Plan:
    """Where each file's image goes, what it shows, and what the splits are."""

    places: dict[str, int]
    labels: np.ndarray
    classes: list[str]
    splits: dict[str, tuple[int, int]]


def open_tree(source: str | Path, image_size: int | None = None, mode: str = "RGB", hold_out: float = 0.0) -> Entry:
    """The images under a folder or in an archive, from the cache; decoded into it first where they are not there.

    image_size: resize the shorter side to it and crop the middle; None: all images must have one size already. mode:
    "RGB" or "L". hold_out: where there is no split, this share of each class's images is "test"; which ones, a hash of
    their names decides. Raises FileNotFoundError and ValueError in one line naming the file that is wrong.
    """
    import PIL

    source = Path(source)
    if source.is_dir():
        names, origin = _walk(source)
    elif not source.exists():
        raise FileNotFoundError(f"there is no folder or archive {str(source)!r}")
    elif is_archive(source):
        names, origin = None, file_hash(source)
    else:
        raise ValueError(f"{str(source)!r} is neither a folder nor an archive ({', '.join(ARCHIVE_SUFFIXES)})")
    key: dict[str, Any] = {
        "files": origin,
        "image_size": image_size,
        "mode": mode,
        "decoder": _DECODER,
        "pillow": PIL.__version__,
    }

    if hold_out:
        key["hold_out"] = hold_out

    def make(draft: Draft) -> Contents:
        plan = _planned(source, [m.name for m in members(source)] if names is None else names, hold_out)
        files = (
            ((m.name, m.read) for m in members(source))
            if names is None
            else ((name, lambda name=name: source / name) for name in names)
        )
        _decode(source, files, plan, draft, image_size, mode)
        return Contents(plan.labels, plan.classes, plan.splits, list(plan.places))

    return cached(key, make)


def _walk(root: Path) -> tuple[list[str], str]:
    """Names of the image files under a folder, sorted, and a hash of them, their sizes and times of change."""
    digest, names = hashlib.sha256(f"{root.resolve()}\n".encode()), []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if _is_image(name) and not _hidden(name) and path.is_file():
            names.append(name)
            about = path.stat()
            digest.update(f"{name}\0{about.st_size}\0{about.st_mtime_ns}\0{about.st_ctime_ns}\n".encode())
    return names, digest.hexdigest()


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _hidden(name: str) -> bool:
    """.DS_Store, ._photo.jpg, __MACOSX/: what systems add on their own."""
    return any(part[0] == "." or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _planned(source: Path, names: list[str], hold_out: float) -> _Plan:
    files = [(name, PurePosixPath(name).parts) for name in names if not _hidden(name)]
    deep = [parts for _, parts in files if len(parts) > 1 and _is_image(parts[-1])]
    around = 0  # folders around all of it
    while deep and len({parts[around] for parts in deep}) == 1 and deep[0][around].lower() not in _SPLITS:
        if not all(len(parts) > around + 2 for parts in deep):
            break
        around += 1
    split = bool(deep) and all(parts[around].lower() in _SPLITS for parts in deep)
    depth = around + (2 if split else 1)  # parts before the file's own
    rows: list[tuple[str, str, str]] = []  # split, class, name
    for name, parts in files:
        if len(parts) <= depth:
            if _is_image(name):
                raise ValueError(f"{str(source)!r}: the image {name!r} is in no class folder; put it into CLASS/")
            continue  # a README beside the folders
        if not _is_image(name):
            raise ValueError(f"{str(source)!r}: {name!r} is not an image; they end in {', '.join(IMAGE_SUFFIXES)}")
        rows.append((_SPLITS[parts[around].lower()] if split else "train", parts[depth - 1], name))
    if not rows:
        raise ValueError(
            f"{str(source)!r} has no images in class folders; needed are train/CLASS/*.jpg and test/CLASS/*.jpg "
            "(or val/)"
        )
    if source.is_dir():
        for parent in sorted({PurePosixPath(name).parts[: depth - 1] for *_, name in rows}):
            _check_empty(source.joinpath(*parent), {PurePosixPath(name).parts[:depth] for *_, name in rows}, parent)
    if len({name for *_, name in rows}) < len(rows):
        twice = sorted(name for *_, name in rows)
        name = next(a for a, b in itertools.pairwise(twice) if a == b)
        raise ValueError(f"{str(source)!r}: {name!r} is in the archive twice")
    if hold_out and not split:
        rows = _held_out(rows, hold_out)
    order = {"train": 0, "test": 1, "val": 2}
    rows.sort(key=lambda row: (order[row[0]], row[1], row[2]))
    classes = sorted({label for part, label, _ in rows if part == rows[0][0]})
    for part, label, name in rows:
        if label not in classes:
            raise ValueError(f"{str(source)!r}: {label!r} is a class of {part}/ only ({name!r}), not of {rows[0][0]}/")
    splits = {}
    for i, (part, _, _) in enumerate(rows):
        splits[part] = (splits.get(part, (i, i))[0], i + 1)
    number = {label: i for i, label in enumerate(classes)}
    labels = np.array([number[label] for _, label, _ in rows], np.int64)
    return _Plan({name: i for i, (*_, name) in enumerate(rows)}, labels, classes, splits)


def _held_out(rows: list[tuple[str, str, str]], share: float) -> list[tuple[str, str, str]]:
    """The rows (split, class, name), a share of each class moved to "test": at least one image, if two are there, and
    all of them only for a share of 1."""
    found = []
    for label in dict.fromkeys(label for _, label, _ in rows):
        names = [name for _, other, name in rows if other == label]
        names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
        test = len(names) if share == 1 else min(max(1, round(share * len(names))), len(names) - 1)
        found += [("test" if i < test else "train", label, name) for i, name in enumerate(names)]
    return found


def _check_empty(folder: Path, filled: set[tuple[str, ...]], parent: tuple[str, ...]) -> None:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not _hidden(entry.name) and (*parent, entry.name) not in filled:
            raise ValueError(f"no images in the class folder {str(entry)!r}; they end in {', '.join(IMAGE_SUFFIXES)}")


def _decode(
    source: Path, files: Iterator[tuple[str, Callable[[], Any]]], plan: _Plan, draft: Draft, size: int | None, mode: str
) -> None:
    out, first, left = None, "", len(plan.places)
    with progress(f"decoding {source.name}", left) as advance:
        for name, content in files:
            place = plan.places.get(name)
            if place is None:
                continue
            image = open_image(content(), f"{source}/{name}", mode)
            try:
                array = pixels(image if size is None else resized(image, size))
            except ValueError as error:
                raise ValueError(f"{str(source)!r}: {name!r}: {error}") from error
            if out is None:
                out, first = draft.images((left, *array.shape)), name
            if array.shape != out.shape[1:]:
                (h, w), (h0, w0) = array.shape[:2], out.shape[1:3]
                raise ValueError(
                    f"{str(source)!r}: {name!r} is {h}x{w}, but {first!r} is {h0}x{w0}; give image_size to resize them"
                )
            out[place] = array
            advance(1)
