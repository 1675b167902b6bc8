"""Where a computation that is noted (launches.py) has its arrays: `array` is what `memory.empty` asks.

A `Pool` gives the last place that became free, which is in the cache; it suits the launches of inference. A `Plan`
knows beforehand how long each array will live, from a `Needs` that saw them come and go, and places them, the large
ones first, where nothing is that lives at the same time: a training step takes as much memory as it needs at its worst
moment. (ResNet-50, 8 images, float32: 678 MiB live at a time; planned 680, by a pool 933.)
"""

from __future__ import annotations

import contextlib
import weakref
from bisect import bisect
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from .. import memory

_PAGE = 1 << 12  # bytes


class _Blocks:
    """Memory in some pieces."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._blocks: list[np.ndarray] = []  # in the order of their addresses

    def add(self, nbytes: int) -> np.ndarray:
        """A new one, from the start of a page."""
        block = _page_aligned(nbytes)
        at = bisect(self._starts, start := memory.address(block))
        self._starts.insert(at, start)
        self._blocks.insert(at, block)
        return block

    def block_of(self, address: int) -> tuple[np.ndarray, int] | None:
        """The one that this byte is in, and where; None for a byte of others."""
        at = bisect(self._starts, address) - 1
        if at < 0 or (offset := address - self._starts[at]) >= self._blocks[at].nbytes:
            return None
        return self._blocks[at], offset


class Pool(_Blocks):
    """Memory for arrays that come and go: what one gives back the next one takes, the last first. At most so many
    bytes; where they are exceeded arrays are NumPy's from then on."""

    def __init__(self, most_bytes: int):
        super().__init__()
        self.left, self.exceeded = most_bytes, False
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
        return self.add(nbytes)


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
        """Memory for the same computation again. lasting: arrays of it, still living, each to be in a piece of its own,
        which outlives the rest."""
        begins, own = np.arange(len(self.sizes)), set[int]()
        for at in (memory.address(a) for a in lasting if a.size):
            own |= {k for k, start in self._living.items() if start <= at < start + self.sizes[k]}
        shared = np.array([k for k in range(len(self.sizes)) if k not in own], np.int64)
        places = np.full(len(self.sizes), -1)
        places[shared] = _placed(np.array(self.sizes)[shared], begins[shared], np.array(self.ends)[shared])
        return Plan(self.sizes, places.tolist())


class Plan(_Blocks):
    """Memory for a computation whose arrays are known; see `Needs`. exceeded: whether it asked for others."""

    def __init__(self, sizes: list[int], offsets: list[int]):
        """offsets: where they lie in one block, or -1 for a block of their own."""
        super().__init__()
        places = list(zip(offsets, sizes, strict=True))
        common = self.add(max((at + size for at, size in places if at >= 0), default=0))
        self._places = [self.add(size) if at < 0 else common[at : at + size] for at, size in places]
        self._next, self.exceeded = 0, False

    def array(self, shape: tuple[int, ...], dtype: Any, nbytes: int) -> np.ndarray:
        """The next array."""
        place = self._places[self._next] if self._next < len(self._places) else None
        self._next, self.exceeded = self._next + 1, self.exceeded or place is None or place.nbytes != nbytes
        if place is None or self.exceeded:
            return np.empty(shape, dtype)
        return np.ndarray(shape, dtype, np.frombuffer(memoryview(place), np.uint8))


def _page_aligned(nbytes: int) -> np.ndarray:
    """Bytes; what shows them has this array as its base."""
    room = np.empty(nbytes + _PAGE, np.uint8)
    start = -memory.address(room) % _PAGE
    return np.frombuffer(memoryview(room[start : start + nbytes]), np.uint8)


def _placed(sizes: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Where each lies, in bytes: the largest first, each as low as those that live at the same time let it."""
    sizes, offsets, done = -(-sizes // _PAGE) * _PAGE, np.zeros(len(sizes), np.int64), np.zeros(len(sizes), bool)
    for i in np.argsort(-sizes, kind="stable"):
        others = np.flatnonzero(done & (begins < ends[i]) & (ends > begins[i]))
        others = others[np.argsort(offsets[others])]
        after = np.maximum.accumulate(np.append(0, offsets[others] + sizes[others]))  # where gaps begin
        room = np.append(offsets[others], np.iinfo(np.int64).max) - after
        offsets[i], done[i] = after[np.argmax(room >= sizes[i])], True
    return offsets
