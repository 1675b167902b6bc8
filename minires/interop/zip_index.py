"""Where the files lie in a zip archive, if it is one that PyTorch may have written: stored, in order, nothing else.

Zip archives can say one thing at their front and another at their end, overlap, be compressed a thousandfold, or hold
a second file of the same name; which of these a reader believes differs between readers. Here an archive has exactly
one reading, or it is refused: the directory stands at the very end, every entry is stored as it is, under a name of
its own, where its local header repeats what the directory says, and none overlaps another or leaves a gap.

Source: PKWARE's APPNOTE 6.3.10, sections 4.3.7 (local header), 4.3.12 (directory), 4.3.14 to 4.3.16 (its end), 4.5.3.
"""

from __future__ import annotations

from typing import NamedTuple

from .refusal import Cursor

_LOCAL, _ENTRY, _END, _END64, _LOCATOR64 = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"
_END_SIZE, _LOCATOR64_SIZE, _END64_SIZE, _ENTRY_SIZE = 22, 20, 56, 46
_MOST_ENTRIES = 1 << 17
_DESCRIPTOR = 24  # bytes of checksum and sizes that may follow an entry
_FORBIDDEN_FLAGS = 0x1 | 0x20 | 0x40 | 0x2000  # encrypted, patched, strongly encrypted, masked
_IN_64_BITS = 0xFFFFFFFF


class Entry(NamedTuple):
    """A file in the archive: its bytes are data[start:end]; at is where the directory speaks of it."""

    start: int
    end: int
    crc32: int
    at: int


class _Said(NamedTuple):
    """What the directory says of an entry."""

    name: str
    size: int
    crc32: int
    header: int
    flags: int
    at: int


def read_index(data: memoryview, file: str) -> dict[str, Entry]:
    """The entries of an archive by name. CheckpointError says what is wrong, and at which byte."""
    cursor, count = _directory(data, file)
    directory = cursor.at
    said = [_entry(cursor) for _ in range(count)]
    if cursor.at != cursor.end:
        cursor.refuse("the zip directory has another size than its end says")
    said.sort(key=lambda one: one.header)
    found: dict[str, Entry] = {}
    limits = [one.header for one in said[1:]] + [directory]
    free = 0  # the first byte after the entry before
    for one, limit in zip(said, limits, strict=True):
        if one.name in found:
            cursor.refuse(f"two zip entries are named {one.name[:80]!r}", one.at)
        if not free <= one.header < directory:
            cursor.refuse(f"zip entry {one.name[:80]!r} overlaps another, or lies beyond the end", one.at)
        start = _local(Cursor(data, file, one.header, limit), one)
        if start + one.size > limit:
            cursor.refuse(f"zip entry {one.name[:80]!r} overlaps another or the directory", one.at)
        if limit - start - one.size > _DESCRIPTOR or (one.header and not found):
            cursor.refuse(f"zip entry {one.name[:80]!r} stands beside bytes that the directory does not know", one.at)
        free = start + one.size
        found[one.name] = Entry(start, free, one.crc32, one.at)
    return found


def _directory(data: memoryview, file: str) -> tuple[Cursor, int]:
    """(cursor at the directory, up to its end; how many entries it has)."""
    end = Cursor(data, file, max(0, len(data) - _END_SIZE))
    if len(data) < _END_SIZE or bytes(end.take(4)) != _END:
        end.refuse("no zip directory ends where the file ends: it is cut off, or something was appended", len(data))
    where = end.at - 4
    disks = end.number(4)
    count, count_again, size, start, comment = (end.number(n) for n in (2, 2, 4, 4, 2))
    if disks or comment or count != count_again:
        end.refuse("a zip archive in several parts or with a comment", where)
    locator = Cursor(data, file, max(0, where - _LOCATOR64_SIZE))
    if bytes(locator.take(4)) == _LOCATOR64:
        where = locator.at - 4 - _END64_SIZE
        locator.number(4)
        if where < 0 or locator.number(8) != where:
            locator.refuse("the zip64 end is not where its locator says")
        end = Cursor(data, file, where)
        if bytes(end.take(4)) != _END64 or end.number(8) != _END64_SIZE - 12:
            end.refuse("the zip64 end is damaged", where)
        end.take(4)  # versions
        disks, count64, count_again, size64, start64 = (end.number(n) for n in (8, 8, 8, 8, 8))
        if disks or count64 != count_again:
            end.refuse("a zip archive in several parts", where)
        for narrow, wide, full in (
            (count, count64, 0xFFFF),
            (size, size64, _IN_64_BITS),
            (start, start64, _IN_64_BITS),
        ):
            if narrow not in (wide, full):
                end.refuse("the two ends of the zip directory differ", where)
        count, size, start = count64, size64, start64
    if start + size != where or count > min(_MOST_ENTRIES, size // _ENTRY_SIZE):
        end.refuse(f"a zip directory of {count} entries and {size} bytes at byte {start} does not fit", where)
    return Cursor(data, file, start, where), count


def _entry(cursor: Cursor) -> _Said:
    at = cursor.at
    if bytes(cursor.take(4)) != _ENTRY:
        cursor.refuse("no zip directory entry begins here", at)
    cursor.take(4)  # versions
    flags, method = cursor.number(2), cursor.number(2)
    cursor.take(4)  # time and date
    crc32, packed, size, name_size, extra_size, comment_size = (cursor.number(n) for n in (4, 4, 4, 2, 2, 2))
    cursor.take(8)  # disk, attributes
    header = cursor.number(4)
    name = cursor.text(name_size)
    extra = Cursor(cursor.data, cursor.name, cursor.at, cursor.at + extra_size)
    cursor.take(extra_size + comment_size)
    wide = _zip64(extra, [value == _IN_64_BITS for value in (size, packed, header)])
    size, packed, header = (w if w is not None else v for w, v in zip(wide, (size, packed, header), strict=True))
    if method or flags & _FORBIDDEN_FLAGS or packed != size:
        cursor.refuse(f"zip entry {name[:80]!r} is compressed or encrypted; PyTorch stores", at)
    return _Said(name, size, crc32, header, flags, at)


def _zip64(extra: Cursor, wanted: list[bool]) -> list[int | None]:
    """The values of 8 bytes that stand in the extra field for those that do not fit into 4."""
    found: list[int | None] = [None] * len(wanted)
    while extra.end - extra.at >= 4:
        kind, size = extra.number(2), extra.number(2)
        field = Cursor(extra.data, extra.name, extra.at, extra.at + size)
        extra.take(size)
        if kind == 1:
            found = [field.number(8) if want else None for want in wanted]
    if any(want and value is None for want, value in zip(wanted, found, strict=True)):
        extra.refuse("a zip entry of 64 bits without its sizes")
    return found


def _local(cursor: Cursor, said: _Said) -> int:
    """Where the entry's bytes begin, after its local header, which must say what the directory says."""
    at = cursor.at
    if bytes(cursor.take(4)) != _LOCAL:
        cursor.refuse(f"no local header of zip entry {said.name[:80]!r} stands here", at)
    cursor.take(2)  # version
    flags, method = cursor.number(2), cursor.number(2)
    cursor.take(4)  # time and date
    crc32, *sizes = cursor.number(4), cursor.number(4), cursor.number(4)
    name_size, extra_size = cursor.number(2), cursor.number(2)
    # where bit 3 of the flags is set, checksum and sizes follow the entry, and are 0 here; large sizes are elsewhere
    same = flags & 8 or (crc32 == said.crc32 and all(size in (said.size, _IN_64_BITS) for size in sizes))
    if not same or flags != said.flags or method or cursor.text(name_size) != said.name:
        cursor.refuse(f"the local header of zip entry {said.name[:80]!r} says something else than the directory", at)
    cursor.take(extra_size)
    return cursor.at
