"""Where a computation that is noted (launches.py) has its arrays: `array` is what `memory.empty` asks.

A `Pool` gives the last place that became free, which is in the cache; it suits the launches of inference. A `Plan`
knows beforehand how long each array will live, from a `Needs` that saw them come and go, and places them, the large
ones first, where nothing is that lives at the same time: a training step takes as much memory as it needs at its worst
moment. (ResNet-50, 8 images, float32: 678 MiB live at a time; planned 680, by a pool 933.)
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from .. import memory

_PAGE = 1 << 12  # bytes


class Pool:
    """Memory for arrays that come and go: what one gives back the next one takes, the last first. At most so many
    bytes; where they are exceeded arrays are NumPy's from then on."""

    def __init__(self, most_bytes: int):
        self.left, self.exceeded = most_bytes, False
        self.blocks: list[np.ndarray] = []
        self.free: list[np.ndarray] = []
        self._next: np.ndarray | None = None

    def array(self, shape: tuple[int, ...], dtype: Any, nbytes: int) -> np.ndarray:
        """An uninitialised array, which gives its memory back when it and what shows it are gone."""
        if self._next is not None and (self._next.shape, self._next.dtype) == (shape, dtype):
            given, self._next = self._next, None
            return given
        if (block := self._block(-(-nbytes // _PAGE) * _PAGE)) is None:
            return np.empty(shape, dtype)
        owner = np.frombuffer(memoryview(block), np.uint8)  # what shows it has this as its base, and not the block
        weakref.finalize(owner, self.free.append, block).atexit = False
        return np.ndarray(shape, dtype, owner)

    @contextlib.contextmanager
    def next_is(self, given: np.ndarray | None) -> Iterator[None]:
        """Within it the first array of this one's shape and dtype is this one."""
        self._next = given
        try:
            yield
        finally:
            self._next = None

    def _block(self, nbytes: int) -> np.ndarray | None:
        for i in reversed(range(len(self.free))):
            if nbytes <= self.free[i].nbytes <= 4 * nbytes:
                return self.free.pop(i)
        self.left -= nbytes
        self.exceeded = self.exceeded or self.left < 0
        if self.exceeded:
            return None
        room = np.empty(nbytes + _PAGE, np.uint8)
        start = -memory.address(room) % _PAGE
        self.blocks.append(room[start : start + nbytes])
        return self.blocks[-1]


class Needs:
    """NumPy's memory, and a note of when each array is made and when it is gone, counted in arrays."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.ends: list[float] = []
        self._living: dict[int, int] = {}  # by number, where they lie

    def array(self, shape: tuple[int, ...], dtype: Any, nbytes: int) -> np.ndarray:
        """An uninitialised array."""
        number, owner = len(self.sizes), _page_aligned(nbytes)
        self.sizes.append(nbytes)
        self.ends.append(np.inf)
        self._living[number] = memory.address(owner)
        weakref.finalize(owner, self._gone, number).atexit = False
        return np.ndarray(shape, dtype, owner)

    def _gone(self, number: int) -> None:
        self.ends[number] = len(self.sizes)
        del self._living[number]

    def plan(self, lasting: Collection[np.ndarray] = ()) -> Plan:
        """Memory for the same computation again. lasting: arrays of it, still living, whose memory is no other's."""
        begins = np.arange(len(self.sizes), dtype=np.float64)
        for at in (memory.address(a) for a in lasting if a.size):
            for number, start in self._living.items():
                if start <= at < start + self.sizes[number]:
                    begins[number] = -1
        return Plan(self.sizes, _placed(np.array(self.sizes), begins, np.array(self.ends)))


class Plan:
    """Memory for a computation whose arrays are known; see `Needs`. exceeded: whether it asked for others."""

    def __init__(self, sizes: list[int], offsets: list[int]):
        self._places, self._next, self.exceeded = list(zip(offsets, sizes, strict=True)), 0, False
        self.blocks = [_page_aligned(max((at + size for at, size in self._places), default=0))]

    def array(self, shape: tuple[int, ...], dtype: Any, nbytes: int) -> np.ndarray:
        """The next array."""
        at, size = self._places[self._next] if self._next < len(self._places) else (0, -1)
        self._next, self.exceeded = self._next + 1, self.exceeded or size != nbytes
        if self.exceeded:
            return np.empty(shape, dtype)
        return np.ndarray(shape, dtype, np.frombuffer(memoryview(self.blocks[0][at : at + nbytes]), np.uint8))


def _page_aligned(nbytes: int) -> np.ndarray:
    """Bytes; what shows them has this array as its base."""
    room = np.empty(nbytes + _PAGE, np.uint8)
    start = -memory.address(room) % _PAGE
    return np.frombuffer(memoryview(room[start : start + nbytes]), np.uint8)


def _placed(sizes: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> list[int]:
    """Where each lies, in bytes: the largest first, each as low as those that live at the same time let it."""
    sizes, offsets, done = -(-sizes // _PAGE) * _PAGE, np.zeros(len(sizes), np.int64), np.zeros(len(sizes), bool)
    for i in np.argsort(-sizes, kind="stable"):
        others = np.flatnonzero(done & (begins < ends[i]) & (ends > begins[i]))
        others = others[np.argsort(offsets[others])]
        after = np.maximum.accumulate(np.append(0, offsets[others] + sizes[others]))  # where gaps begin
        room = np.append(offsets[others], np.iinfo(np.int64).max) - after
        offsets[i], done[i] = after[np.argmax(room >= sizes[i])], True
    return offsets.tolist()
