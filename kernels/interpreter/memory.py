"""Global memory of a launch: the arrays that a kernel may touch, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .faults import Fault
from .shadow import Timeline
from .shared import gather, scatter

if TYPE_CHECKING:
    from .wave import Fragment, Wave

BASE = 0x7_0000_0000  # the first address: beyond 32 bits, so that address arithmetic in 32 bits is caught
_GAP = 256  # bytes between arrays; also the alignment of each, as cudaMalloc's
_NOBODY, _SEVERAL = 0, -1  # no reader; readers in several blocks


@dataclass(eq=False)
class Allocation:
    """One array in the arena. source: what it was copied from and is copied back to. constant: whether the kernel
    read it as constant (ld.global.nc), written: whether it wrote there."""

    name: str
    offset: int
    size: int
    source: np.ndarray | None
    constant: bool = False
    written: bool = False
    shadow: GlobalShadow | None = None


class Arena:
    """The arrays of a launch, copied into one buffer, in which a lane's address is an index.

    `add` all arrays, then `close()`; run; then `copy_back()`. granule: the smallest access of the kernel to global
    memory, in bytes: what races are told apart by.
    """

    def __init__(self, granule: int = 4) -> None:
        self.granule, self.timeline = granule, Timeline()
        self.allocations: list[Allocation] = []
        self.symbols: dict[str, int] = {}
        self.blocks = Blocks()
        self.size = 0
        self.bytes = np.zeros(0, np.uint8)

    def add(self, array: np.ndarray, name: str) -> int:
        """Place a C-contiguous array; returns its address. The same memory twice gets one address."""
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} is not C-contiguous: a kernel gets the address of a dense array")
        at = array.__array_interface__["data"][0]
        for known in self.allocations:
            if known.source is not None and array.size:
                begin = known.source.__array_interface__["data"][0]
                if begin <= at and at + array.nbytes <= begin + known.size:
                    return BASE + known.offset + at - begin
                if begin < at + array.nbytes and at < begin + known.size:
                    raise ValueError(f"{name} and {known.name} overlap: pass the larger one first")
        return self._place(Allocation(name, 0, array.nbytes, array))

    def add_bytes(self, data: bytes, size: int, name: str) -> int:
        """Place a variable of the module; returns its address."""
        return self._place(Allocation(name, 0, size, None), data)

    def _place(self, allocation: Allocation, data: bytes = b"") -> int:
        allocation.offset = self.size
        self.size += -(-(allocation.size + _GAP) // _GAP) * _GAP
        self.allocations.append(allocation)
        self.bytes = np.concatenate([self.bytes, np.full(self.size - len(self.bytes), 0xCB, np.uint8)])
        values = np.frombuffer(data, np.uint8) if allocation.source is None else _bytes_of(allocation.source)
        self.bytes[allocation.offset : allocation.offset + len(values)] = values
        return BASE + allocation.offset

    def copy_back(self) -> None:
        """Write what the kernel wrote into the arrays that it was given."""
        for a in self.allocations:
            if a.written and a.source is not None:
                if not a.source.flags.writeable:
                    raise ValueError(f"the kernel writes into {a.name}, which is a read-only array")
                _bytes_of(a.source)[:] = self.bytes[a.offset : a.offset + a.size]

    def locate(
        self, address: Any, size: int, wave: Wave, fragment: Fragment, verb: str
    ) -> tuple[Allocation, np.ndarray, np.ndarray]:
        """Addresses of a fragment's lanes -> (the array, places in `bytes`, lanes). Raises Fault.

        Lanes that touch several arrays at once are served by `split`.
        """
        places = fragment.full(address).astype(np.int64) - BASE
        lanes = wave.every_lane if fragment.whole else fragment.lanes
        low, high = int(places.min()), int(places.max()) + size
        if (wrong := places & (size - 1)).any():
            first = int(np.flatnonzero(wrong)[0])
            text = f"it {verb} {size} bytes at {self.describe(int(places[first]))}, which is no multiple of {size}"
            raise wave.fault("misaligned", fragment, text, lanes[first])
        array = self._find(low)
        if array is None or high > array.offset + array.size:
            bad = np.array([self._outside(int(p), size, array) for p in places])
            if not bad.any():
                raise _SeveralArrays
            first = int(np.flatnonzero(bad)[0])
            raise wave.fault("out of bounds", fragment, self._describe(int(places[first]), size, verb), lanes[first])
        return array, places, lanes

    def split(self, address: Any, fragment: Fragment) -> list[np.ndarray]:
        """Masks over the fragment's lanes, one for each array that they touch."""
        places = fragment.full(address).astype(np.int64) - BASE
        owner = np.searchsorted([a.offset for a in self.allocations], places, "right")
        return [owner == o for o in np.unique(owner)]

    def _find(self, place: int) -> Allocation | None:
        for a in self.allocations:
            if a.offset <= place < a.offset + a.size:
                return a
        return None

    def _outside(self, place: int, size: int, guess: Allocation | None) -> bool:
        a = guess if guess is not None and guess.offset <= place < guess.offset + guess.size else self._find(place)
        return a is None or place + size > a.offset + a.size

    def _describe(self, place: int, size: int, verb: str) -> str:
        """Where an address outside every array lies."""
        near = min(self.allocations, key=lambda a: max(a.offset - place, place - a.offset - a.size + 1), default=None)
        if near is None or not -(1 << 32) < place < self.size + (1 << 32):
            return f"it {verb} {size} bytes at address {place + BASE:#x}, where no array is"
        text = f"it {verb} {size} bytes at byte {place - near.offset} of {near.name}, which has {near.size}"
        if near.source is not None:
            text += f" ({near.source.dtype}, shape {near.source.shape})"
        return text

    def describe(self, place: int) -> str:
        """A place in `bytes`, as an element of an array."""
        a = self._find(place)
        return f"address {place + BASE:#x}" if a is None else f"byte {place - a.offset} of {a.name}"


class _SeveralArrays(Exception):
    """Lanes of one instruction touch several arrays."""


class Blocks:
    """What blocks know of each other ("the last block sums up").

    Who makes an atomic operation learns of all that those who made one there before did before their last fence. A
    fence counts for the whole block, whose threads meet at a barrier.
    """

    def __init__(self) -> None:
        self.fenced: dict[int, int] = {}  # block -> tick of its last fence
        self.known: dict[int, dict[int, int]] = {}  # block -> block -> tick
        self.left: dict[int, dict[int, int]] = {}  # what was known to those who were at a place

    def meet(self, place: int, block: int) -> None:
        """A block makes an atomic operation at a place."""
        known, left = self.known.setdefault(block, {}), self.left.setdefault(place, {})
        for other, tick in left.items():
            known[other] = max(known.get(other, -1), tick)
        left.update(known)
        left[block] = self.fenced.get(block, -1)

    def before(self, others: np.ndarray, ticks: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Whether what `others` did at `ticks` happened before what `blocks` do now."""
        triples = zip(others.tolist(), ticks.tolist(), blocks.tolist(), strict=True)
        return np.array([tick < self.known.get(block, {}).get(other, -1) for other, tick, block in triples], bool)


class GlobalShadow:
    """Who wrote and read each granule of an array in this launch. (0: nobody; else 1 + number of the thread.)"""

    def __init__(self, granules: int):
        self.writer = np.zeros(granules, np.int64)
        self.written_at = np.zeros(granules, np.int32)
        self.atomic = np.zeros(granules, bool)
        self.reader = np.zeros(granules, np.int64)  # thread, or -(2 + block): several of a block, or _SEVERAL
        self.read_at = np.zeros(granules, np.int32)


class GlobalMemory:
    """Loads, stores and the race check of one wave in an arena."""

    def __init__(self, wave: Wave, arena: Arena):
        self.wave, self.arena = wave, arena
        ids, grid = wave.block_ids.astype(np.int64), wave.grid
        self.block = (ids[:, 0] + grid[0] * (ids[:, 1] + grid[1] * ids[:, 2]))[wave.block]  # of each lane, in the grid
        self.me = 1 + self.block * wave.threads + wave.thread

    def load(self, address: Any, size: int, fragment: Fragment, constant: bool = False, strong: bool = False) -> Any:
        """`size` bytes at each lane's address, as `gather` returns them."""
        try:
            array, places, lanes = self.arena.locate(address, size, self.wave, fragment, "reads")
        except _SeveralArrays:
            return self._in_parts(address, fragment, lambda a, f: self.load(a, size, f, constant, strong))
        if constant:
            array.constant = True
            if array.written:
                raise self._constant(array, fragment, lanes)
        else:
            self._note_read(array, places, size, lanes, fragment, strong)
        return gather(self.arena.bytes, places, size)

    def store(self, address: Any, value: Any, size: int, fragment: Fragment, strong: bool = False) -> None:
        """Write one number, or row of words, per lane."""
        try:
            array, places, lanes = self.arena.locate(address, size, self.wave, fragment, "writes")
        except _SeveralArrays:
            for part in self.arena.split(address, fragment):
                f = sub_fragment(fragment, part)
                self.store(fragment.full(address)[part], value[part], size, f, strong)
            return
        scatter(self.arena.bytes, places, size, value)
        self.note_write(array, places, size, lanes, fragment, strong, value)

    def _in_parts(self, address: Any, fragment: Fragment, load: Any) -> np.ndarray:
        parts, address, result = self.arena.split(address, fragment), fragment.full(address), None
        for part in parts:
            values = load(address[part], sub_fragment(fragment, part))
            if result is None:
                result = np.zeros((fragment.count, *values.shape[1:]), values.dtype)
            result[part] = values
        assert result is not None
        return result

    def _constant(self, array: Allocation, fragment: Fragment, lanes: np.ndarray) -> Fault:
        text = f"{array.name} is read through ld.global.nc (const __restrict__) and written in the same launch"
        return self.wave.fault("race", fragment, text, int(lanes[0]))

    def _granules(self, array: Allocation, places: np.ndarray, size: int) -> tuple[np.ndarray, GlobalShadow]:
        granule = self.arena.granule
        if array.shadow is None:
            array.shadow = GlobalShadow(-(-array.size // granule))
        first, parts = (places - array.offset) // granule, max(1, size // granule)
        return (first if parts == 1 else first + np.arange(parts)[:, None]), array.shadow

    def _note_read(self, array: Allocation, places: Any, size: int, lanes: Any, fragment: Fragment, strong: bool):
        wave = self.wave
        g, shadow = self._granules(array, places, size)
        lanes = np.broadcast_to(lanes, g.shape)
        me, block = self.me[lanes], self.block[lanes]
        if array.written:
            self._check_writer(shadow, g, me, lanes, fragment, "reads", strong)
        old = shadow.reader[g]
        floor = wave.order.floor[wave.block[lanes]]
        owner = np.where(old > 0, (old - 1) // wave.threads, -2 - old)
        mine = (old == _NOBODY) | (old == me) | ((owner == block) & (shadow.read_at[g] < floor) & (old != _SEVERAL))
        new = np.where(mine, me, np.where((owner == block) & (old != _SEVERAL), -2 - block, _SEVERAL))
        shadow.reader[g] = new
        lost = shadow.reader[g] != new  # several lanes read one granule in this instruction
        if lost.any():
            winner = shadow.reader[g[lost]]
            owner = np.where(winner > 0, (winner - 1) // wave.threads, -2 - winner)
            shadow.reader[g[lost]] = np.where((owner == block[lost]) & (winner != _SEVERAL), -2 - owner, _SEVERAL)
        shadow.read_at[g] = wave.arena.timeline.tick(fragment.pc - 1)

    def note_write(
        self, array: Allocation, places: Any, size: int, lanes: Any, fragment: Fragment, atomic: bool, value: Any = None
    ) -> None:
        """Check and remember a write. value: what was written, where two lanes may write the same to one place."""
        wave = self.wave
        array.written = True
        if array.constant:
            raise self._constant(array, fragment, lanes)
        g, shadow = self._granules(array, places, size)
        lanes = np.broadcast_to(lanes, g.shape)
        me, block = self.me[lanes], self.block[lanes]
        self._check_writer(shadow, g, me, lanes, fragment, "writes", atomic)
        old, read_at = shadow.reader[g], shadow.read_at[g]
        owner = np.where(old > 0, (old - 1) // wave.threads, -2 - old)
        local = (owner == block) & (old != _SEVERAL)
        by_barrier = local & (read_at < wave.order.floor[wave.block[lanes]])
        mates = (old - 1) % wave.threads // 32 == wave.thread[lanes] // 32
        same_warp = local & (old > 0) & mates & (read_at < wave.order.warp_floor[wave.warp[lanes]])
        bad = (old != _NOBODY) & (old != me) & ~by_barrier & ~same_warp
        if self.arena.blocks.known and (far := bad & ~local & (old > 0)).any():
            bad[far] = ~self.arena.blocks.before(owner[far], read_at[far], block[far])
        if bad.any():
            first = tuple(np.argwhere(bad)[0])
            place = wave.place(wave.arena.timeline.places[int(read_at[first])])
            text = f"it writes {array.name} where another thread reads, in {place}, and nothing orders the two"
            raise wave.fault("race", fragment, text, int(lanes[first]))
        shadow.writer[g] = me
        winner = shadow.writer[g]
        clash = winner != me
        if not atomic and clash.any():
            elsewhere = (winner - 1) // wave.threads != block
            differ = value is None or not (gather(self.arena.bytes, places, size) == value).all()
            if differ or elsewhere.any():
                first = tuple(np.argwhere(clash)[0])
                text = f"it and another thread write the same bytes of {array.name} in one instruction"
                raise wave.fault("race", fragment, text, int(lanes[first]))
        shadow.written_at[g] = wave.arena.timeline.tick(fragment.pc - 1)
        shadow.atomic[g] = atomic
        shadow.reader[g] = _NOBODY

    def atomic(self, array: Allocation, places: Any, size: int, lanes: Any, fragment: Fragment) -> None:
        """Check and remember an atomic operation."""
        self.note_write(array, places, size, lanes, fragment, atomic=True)
        if self.arena.blocks.fenced:
            for place, block in dict.fromkeys(zip(places.tolist(), self.block[lanes].tolist(), strict=True)):
                self.arena.blocks.meet(place, block)

    def fence(self, fragment: Fragment) -> None:
        """The blocks of the fragment execute a fence for all of the GPU."""
        for block in np.unique(self.block[fragment.lanes]).tolist():
            self.arena.blocks.fenced[block] = self.arena.timeline.now

    def _check_writer(self, shadow: GlobalShadow, g: Any, me: Any, lanes: Any, fragment: Fragment, verb: str, strong):
        wave = self.wave
        writer = shadow.writer[g]
        bad = (writer != 0) & (writer != me)
        if strong:
            bad &= ~shadow.atomic[g]
        if not bad.any():
            return
        lanes, writer, ticks = lanes[bad], writer[bad] - 1, shadow.written_at[g][bad]
        here = writer // wave.threads == self.block[lanes]
        wrong = ~here | ~wave.order.before(np.where(here, writer % wave.threads, -1), ticks, lanes)
        if self.arena.blocks.known and (far := wrong & ~here).any():
            wrong[far] = ~self.arena.blocks.before(writer[far] // wave.threads, ticks[far], self.block[lanes[far]])
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            other, place = int(writer[first]), wave.place(wave.arena.timeline.places[int(ticks[first])])
            who = f"thread {other % wave.threads} of block {other // wave.threads} (in order of the grid)"
            text = f"it {verb} what {who} wrote in {place}, and nothing orders the two"
            raise wave.fault("race", fragment, text, int(lanes[first]))


def sub_fragment(fragment: Fragment, part: np.ndarray) -> Fragment:
    """The lanes of a fragment that `part`, one truth value per lane of it, names; computing on its own lanes only."""
    from .wave import Fragment

    mask = np.zeros(fragment.size, bool)
    mask[np.arange(fragment.size)[fragment.lanes][part]] = True
    result = Fragment(fragment.pc, mask, fragment.strand)
    result.sparse = True
    return result


def _bytes_of(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)
