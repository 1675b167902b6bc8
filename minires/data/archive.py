"""The files in a .tar (also .gz, .xz, .bz2) or .zip archive, one by one, in memory; nothing is ever extracted.

Archives come from anywhere, so nothing in them is believed: names must stay inside, entries must be plain files or
folders (no links, devices or sparse files), sizes have a limit, and an archive that ends early is an error.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn

_OPENERS: dict[tuple[str, ...], Callable[[Path], Any]] = {
    (".tar.gz", ".tgz"): lambda path: gzip.open(path, "rb"),
    (".tar.xz", ".txz"): lambda path: lzma.open(path, "rb"),
    (".tar.bz2", ".tbz2"): lambda path: bz2.open(path, "rb"),
    (".tar",): lambda path: path.open("rb"),
}
ARCHIVE_SUFFIXES = (*(suffix for suffixes in _OPENERS for suffix in suffixes), ".zip")
LARGEST = 2**26  # bytes of a member, unless the caller expects larger ones
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, lzma.LZMAError, zlib.error, OSError, NotImplementedError)


@dataclass
class Member:
    """A file in an archive. name: its path in there, without "./". size: bytes. read: its content, while it is the one
    that `members` has just given."""

    name: str
    size: int
    read: Callable[[], bytes]


def is_archive(path: str | Path) -> bool:
    """Whether the name ends as that of an archive which `members` reads."""
    return str(path).lower().endswith(ARCHIVE_SUFFIXES)


def members(path: str | Path, largest: int = LARGEST) -> Iterator[Member]:
    """The files in the archive, in its order.

    Raises FileNotFoundError where it is missing, and ValueError in one line for an archive that is damaged or cut off,
    or holds what a data set has no use for: absolute paths, "..", links, devices, files of more than `largest` bytes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no archive {str(path)!r}")
    if not is_archive(path):
        raise ValueError(f"{str(path)!r} is not an archive; known are {', '.join(ARCHIVE_SUFFIXES)}")
    inside = (_zip_members if path.name.lower().endswith(".zip") else _tar_members)(path, largest)
    while (member := _or_damaged(path, lambda: next(inside, None))) is not None:
        yield Member(member.name, member.size, lambda read=member.read: _or_damaged(path, read))


def _or_damaged(path: Path, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except _DAMAGE as error:
        raise ValueError(f"{str(path)!r} is damaged or not an archive of its kind: {error}") from error


def _tar_members(path: Path, largest: int) -> Iterator[Member]:
    opener = next(opener for suffixes, opener in _OPENERS.items() if path.name.lower().endswith(suffixes))
    with opener(path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # they would add up to a gigabyte for ImageNet
            name = _checked(path, info.name)
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                kind = "a link" if info.issym() or info.islnk() else "a sparse file" if info.issparse() else "a device"
                _refuse(path, info.name, f"is {kind}, not a plain file")
            _check_size(path, info.name, info.size, largest)
            yield Member(name, info.size, lambda info=info: _content(tar, info))
        _check_end(stream, tar.offset)


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    content = b"" if file is None else file.read()
    if len(content) != info.size:
        raise EOFError(f"it ends within {info.name!r}")
    return content


def _check_end(stream: IO[bytes], offset: int) -> None:
    """`tarfile` takes a header that it cannot read for the end; the real end is a block of zeros."""
    stream.seek(offset)
    block = stream.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise EOFError(f"it ends, or cannot be read, after {offset} bytes")
    while stream.read(1 << 20):  # to the very end, where gzip and xz keep the checksum of what was unpacked
        pass


def _zip_members(path: Path, largest: int) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = _checked(path, info.filename)
            if info.is_dir():
                continue
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                _refuse(path, info.filename, f"is {'a link' if kind == stat.S_IFLNK else 'a device'}, not a plain file")
            if info.flag_bits & 1:
                _refuse(path, info.filename, "is encrypted")
            _check_size(path, info.filename, info.file_size, largest)
            yield Member(name, info.file_size, lambda info=info: archive.read(info))


def _checked(archive: Path, name: str) -> str:
    """The name without "./", if it stays inside."""
    if name.startswith(("/", "\\")) or name[1:2] == ":":
        _refuse(archive, name, "has an absolute path")
    if ".." in name.replace("\\", "/").split("/"):
        _refuse(archive, name, "leads out of the archive")
    if "\0" in name or "\n" in name:
        _refuse(archive, name, "has a name that no file can have")
    return str(PurePosixPath(name))


def _check_size(archive: Path, name: str, size: int, largest: int) -> None:
    if size > largest:
        _refuse(archive, name, f"has {size} bytes, more than {largest} for one file")


def _refuse(archive: Path, name: str, why: str) -> NoReturn:
    raise ValueError(f"{str(archive)!r}: {name!r} {why}; the archive is refused")
