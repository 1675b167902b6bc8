"""Reading bytes that nobody vouches for: lengths are checked against what is left, refusals name their place."""

from __future__ import annotations

from typing import NoReturn

from ..serialization import CheckpointError


class Cursor:
    """A place in the bytes of a file. name: the file's, for messages. at, end: the next byte, and one past the last."""

    def __init__(self, data: memoryview, name: str, at: int = 0, end: int | None = None):
        self.data, self.name, self.at = data, name, at
        self.end = len(data) if end is None else end

    def take(self, n: int) -> memoryview:
        """The next n bytes, as a view."""
        if n > self.end - self.at:
            self.refuse(f"{n} bytes are announced, {self.end - self.at} are left")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, n: int, signed: bool = False) -> int:
        """An integer of n bytes, little-endian."""
        return int.from_bytes(self.take(n), "little", signed=signed)

    def text(self, n: int) -> str:
        """n bytes of UTF-8."""
        start = self.at
        try:
            return str(self.take(n), "utf-8")
        except UnicodeDecodeError:
            self.refuse("a text that is not UTF-8", start)

    def line(self, longest: int = 256) -> str:
        """A text up to the next line feed, which is passed over."""
        start, end = self.at, min(self.end, self.at + longest)
        length = bytes(self.data[start:end]).find(b"\n")
        if length < 0:
            self.refuse("a line that does not end")
        text = self.text(length)
        self.at += 1
        return text

    def refuse(self, why: str, at: int | None = None) -> NoReturn:
        """CheckpointError: the file, the offset in it (by default of the next byte), and why."""
        raise CheckpointError(f"{self.name}: refused at byte {self.at if at is None else at}: {why}")
