"""Images decoded once: uint8 arrays in the cache folder, mapped into memory by every run after the first.

An entry is a folder named after a hash of its key (the source's own hash, and all that decoding depends on):

    images.npy   (N, H, W, C) uint8        labels.npy  (N,) int64
    paths.json   the file of every image   entry.json  key, classes, splits, and the CRC-32 of each file

It is written under another name, synced and renamed, so that it is whole or not there. Opening it checks every
checksum (0.1 s per 100 MB); what is damaged is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_FORMAT = 1
_FILES = ("images.npy", "labels.npy", "paths.json")
_BLOCK = 2**22


def cache_folder(part: str) -> Path:
    """`part` of `$MINIRES_CACHE`, else of the user's cache folder."""
    if own := os.environ.get("MINIRES_CACHE"):
        return Path(own) / part
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minires" / part


@dataclass
class Contents:
    """What goes into an entry beside the images. splits: name -> (first, one past the last) image."""

    labels: np.ndarray
    classes: list[str]
    splits: dict[str, tuple[int, int]]
    paths: list[str] | None = None


@dataclass
class Entry:
    """An entry of the cache, as it was when it was opened. Pickled without the images, which are mapped again."""

    folder: Path
    labels: np.ndarray
    classes: list[str]
    splits: dict[str, tuple[int, int]]
    paths: list[str] | None
    _images: np.ndarray | None = field(default=None, repr=False)

    @property
    def images(self) -> np.ndarray:
        """(N, H, W, C) uint8, read-only, mapped."""
        if self._images is None:
            self._images = np.asarray(np.load(self.folder / "images.npy", mmap_mode="r"))
        return self._images

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}


class Draft:
    """An entry in the making."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.array: np.ndarray | None = None

    def images(self, shape: tuple[int, int, int, int]) -> np.ndarray:
        """The array (N, H, W, C) uint8 to be filled, mapped; room on the disk is taken at once.

        (A mapped file that outgrows its disk would kill the process at some later write.) Raises OSError without room.
        """
        path = self.folder / "images.npy"
        header = np.lib.format.header_data_from_array_1_0(np.empty((0, *shape[1:]), np.uint8)) | {"shape": shape}
        with _writing(self.folder.parent), path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            start, size = file.tell(), int(np.prod(shape, dtype=np.int64))
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, start + size)
            else:
                file.truncate(start + size)
        self.array = np.memmap(path, np.uint8, "r+", start, shape)
        return self.array


def cached(key: Mapping[str, Any], make: Callable[[Draft], Contents]) -> Entry:
    """The entry of `key` (what JSON can hold); where there is none, or a damaged one, `make` fills it first.

    `make` asks the draft for the array of images, fills it and returns the rest. Raises OSError naming the folder and
    the remedy where nothing can be written; then, and where `make` raises, no trace is left.
    """
    key = {"format": _FORMAT, **key}
    text = json.dumps(key, sort_keys=True)
    folder = cache_folder("data")
    final = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
    if (entry := _opened(final, text)) is not None:
        return entry
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        draft = folder / f"{_owner()}{os.getpid()}-{secrets.token_hex(4)}.tmp"
        draft.mkdir()
    try:
        work = Draft(draft)
        contents = make(work)
        with _writing(folder):
            _write(draft, work, contents, key)
            _publish(draft, final, text)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if (entry := _opened(final, text)) is None:
        raise OSError(f"the cache entry {str(final)!r} cannot be read back; check the disk, or set MINIRES_CACHE")
    return entry


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Puts what to do about it into errors of a disk that is full or not ours."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's: a message of our own
            raise
        raise OSError(
            f"cannot keep decoded images in {str(folder)!r}: {error.strerror}; "
            "make room, or set MINIRES_CACHE to another folder"
        ) from error


def _write(draft: Path, work: Draft, contents: Contents, key: Mapping[str, Any]) -> None:
    images = work.array
    if images is None or len(images) != len(contents.labels):
        raise ValueError("a cache entry needs as many images as labels")
    images.flush()  # type: ignore[attr-defined]
    np.save(draft / "labels.npy", np.asarray(contents.labels, np.int64))
    (draft / "paths.json").write_text(json.dumps(contents.paths), encoding="utf-8")
    meta = {
        "key": key,
        "classes": contents.classes,
        "splits": contents.splits,
        "crc32": {name: _checksum(draft / name) for name in _FILES},
    }
    meta["check"] = _check(meta)
    (draft / "entry.json").write_text(json.dumps(meta), encoding="utf-8")
    for path in (*(draft / name for name in (*_FILES, "entry.json")), draft):
        _sync(path)


def _publish(draft: Path, final: Path, text: str) -> None:
    """Rename the draft to its final name, unless another process has just done so with its own."""
    if final.exists():
        if _opened(final, text) is not None:
            return
        os.rename(final, draft.with_suffix(".old.tmp"))  # damaged
        shutil.rmtree(draft.with_suffix(".old.tmp"), ignore_errors=True)
    try:
        os.rename(draft, final)
    except OSError:
        if _opened(final, text) is None:
            raise
    _sync(final.parent)


def _opened(final: Path, text: str) -> Entry | None:
    """The entry, or None where it is missing or anything about it is wrong."""
    try:
        meta = json.loads((final / "entry.json").read_text(encoding="utf-8"))
        check = meta.pop("check")
        if check != _check(meta) or json.dumps(meta["key"], sort_keys=True) != text:
            return None
        if any(_checksum(final / name) != meta["crc32"][name] for name in _FILES):
            return None
        labels = np.load(final / "labels.npy")
        paths = json.loads((final / "paths.json").read_text(encoding="utf-8"))
        splits = {name: (first, last) for name, (first, last) in meta["splits"].items()}
        return Entry(final, labels, meta["classes"], splits, paths)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _check(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _owner() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8] + "-"


def _sweep(folder: Path) -> None:
    """Remove drafts of processes of this machine that are no more."""
    for draft in folder.glob(f"{_owner()}*.tmp"):
        try:
            os.kill(int(draft.name.split("-")[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(draft, ignore_errors=True)
        except (ValueError, OSError):
            pass


def file_hash(path: str | Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits. Raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
