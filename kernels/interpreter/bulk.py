"""mbarriers, and the bulk copies (TMA) that complete on them.

An mbarrier counts arrivals and bytes; when both are all there its phase is complete, and those who waited know what
those who arrived knew: that is all that orders a producer and its consumers. A copy lands as late as it may (when no
thread can go on, or at random under a schedule), and what touches its destination earlier is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import memory
from .access import PARAM_BASE, address
from .memory import sub_fragment
from .opcodes import opcode, source, unknown
from .ptx import Address, Instruction, Register
from .tensor_map import BYTES, Decoded, decode, swizzled

SYNCHRONISATION = "Parallel Synchronization and Communication Instructions: mbarrier"


@dataclass(eq=False)
class _Barrier:
    """One mbarrier. pending: arrivals still to come in this phase; bytes: of copies still to land. agent: its entry
    in vector clocks, for the copies that complete on it. gathering, released: what is known of this phase's arrivals,
    and to those who have waited."""

    count: int
    pending: int
    agent: int
    gathering: np.ndarray
    released: np.ndarray
    bytes: int = 0
    phase: int = 0


@dataclass(eq=False)
class _Copy:
    block: int
    barrier: tuple[int, int]
    places: np.ndarray
    data: np.ndarray
    granules: np.ndarray
    place: int
    swizzle: int


class Barriers:
    """The mbarriers of a wave, by block and address, and the bulk copies in flight."""

    def __init__(self, wave: Any):
        self.wave = wave
        self.known: dict[tuple[int, int], _Barrier] = {}
        self.flying: list[_Copy] = []

    def init(self, key: tuple[int, int], count: int, f: Any, lane: int) -> None:
        if not 1 <= count < 1 << 20:
            raise self.wave.fault("bad use", f, f"an mbarrier for {count} arrivals", lane)
        clocks = self.wave.order.known
        agent = self.known[key].agent if key in self.known else self.wave.shared.shadow.new_agent(key[0])
        empty = np.zeros(clocks.shape[2], clocks.dtype)
        self.known[key] = _Barrier(count, count, agent, empty, empty.copy())

    def at(self, key: tuple[int, int], f: Any, lane: int) -> _Barrier:
        if key not in self.known:
            raise self.wave.fault("uninitialised", f, "it uses an mbarrier that was never initialised", lane)
        return self.known[key]

    def arrive(self, key: tuple[int, int], lanes: np.ndarray, count: int, expected: int, f: Any) -> None:
        """These lanes of one block arrive, `count` times together, and announce `expected` bytes."""
        b, wave = self.at(key, f, int(lanes[0])), self.wave
        if count > b.pending:
            raise wave.fault("bad use", f, f"more arrivals than the {b.count} of the mbarrier's phase", int(lanes[0]))
        b.bytes += expected
        b.pending -= count
        np.maximum(b.gathering, wave.order.knowledge(key[0], wave.thread[lanes]), out=b.gathering)
        self.complete(b)

    def complete(self, b: _Barrier) -> None:
        """End the phase where nothing is missing."""
        if b.pending == 0 and b.bytes == 0:
            b.phase ^= 1
            b.pending = b.count
            np.maximum(b.released, b.gathering, out=b.released)
            self.wave.wake("mbarrier")

    def progress(self) -> bool:
        """Land a copy: the first, or any under a schedule."""
        if not self.flying:
            return False
        random = self.wave.random
        copy = self.flying.pop(0 if random is None else int(random.integers(len(self.flying))))
        self.land(copy)
        return True

    def land(self, copy: _Copy) -> None:
        wave, b = self.wave, self.known[copy.barrier]
        wave.shared.bytes[copy.places] = copy.data
        wave.shared.swizzle[np.unique(copy.places // 16)] = copy.swizzle
        agent = wave.threads + b.agent
        wave.shared.shadow.landed(copy.granules, np.full(copy.granules.shape, agent, np.int32), copy.place)
        b.gathering[agent] = wave.order.timeline.now
        b.bytes -= len(copy.data)
        self.complete(b)


def _each(wave: Any, f: Any, values: Any) -> list[tuple[int, tuple[int, int], int]]:
    """(lane, (block, address), position) of the fragment's lanes; checks that the addresses are those of mbarriers."""
    places, lanes = wave.shared.locate(values, 8, f)
    at = f.full(values)
    return [(int(n), (int(wave.block[n]), int(at[k])), k) for k, n in enumerate(lanes) if places[k] >= 0]


@opcode("mbarrier", SYNCHRONISATION, control=True)
def _mbarrier(i: Instruction) -> Callable:
    what = i.modifiers[0]
    if what in ("init", "inval"):
        where = address(i.operands[0])
        count = source(i.operands[1], "u32") if what == "init" else None

        def init(wave: Any, f: Any) -> None:
            at = where(wave, f)
            wave.shared.store(at, np.zeros(f.count, np.uint64), 8, f)
            counts = None if count is None else f.full(count(wave, f))
            for lane, key, k in _each(wave, f, at):
                if counts is None:
                    wave.unit(Barriers).known.pop(key, None)
                else:
                    wave.unit(Barriers).init(key, int(counts[k]), f, lane)

        return init
    if what in ("arrive", "expect_tx"):
        return _arrive(i)
    if what in ("try_wait", "test_wait") and "parity" in i.modifiers:
        return _wait(i)
    raise unknown(i)


def _arrive(i: Instruction) -> Callable:
    at = next(k for k, o in enumerate(i.operands) if isinstance(o, Address))
    state = i.operands[0] if at else None
    where, rest = address(i.operands[at]), [source(o, "u32") for o in i.operands[at + 1 :]]
    bytes_too, arrives = "expect_tx" in i.modifiers, "arrive" in i.modifiers

    def execute(wave: Any, f: Any) -> None:
        values, unit = where(wave, f), wave.unit(Barriers)
        extra = [f.full(r(wave, f)).astype(np.int64) for r in rest]
        _touch(wave, f, values)
        for lane, key, k in _each(wave, f, values):
            amount = int(extra[0][k]) if extra else 0
            count = 0 if not arrives else 1 if bytes_too or not extra else amount
            unit.arrive(key, np.array([lane]), count, amount if bytes_too else 0, f)
        if isinstance(state, Register):
            wave.put(state, np.zeros(f.count, np.uint64), f)

    return execute


def _touch(wave: Any, f: Any, at: Any) -> None:
    """Using an mbarrier must be ordered after its initialisation."""
    places, lanes = wave.shared.locate(at, 8, f)
    wave.shared.shadow.read(wave.shared.granules(places, 8), lanes, f)


def _wait(i: Instruction) -> Callable:
    """A lane whose phase is not complete waits here; the others go on with a true predicate."""
    to, where, parity = i.operands[0], address(i.operands[1]), source(i.operands[2], "u32")

    def execute(wave: Any, f: Any) -> bool:
        values, unit = where(wave, f), wave.unit(Barriers)
        wanted = f.full(parity(wave, f))
        _touch(wave, f, values)
        passed = np.zeros(f.count, bool)
        for lane, key, k in _each(wave, f, values):
            passed[k] = unit.at(key, f, lane).phase != int(wanted[k])
            if passed[k]:
                wave.order.learn(key[0], wave.thread[[lane]], unit.known[key].released)
        if isinstance(to, Register):
            wave.put(to, np.ones(f.count, bool), f)
        if passed.all():
            return False
        return wave.part_waits(f, ~passed, "mbarrier")

    return execute


def build(i: Instruction) -> Callable:
    """cp.async.bulk: copies from global to shared memory, plain or of a tensor's tile."""
    modifiers = i.modifiers
    if "global" in modifiers and any(m.startswith("mbarrier::complete_tx") for m in modifiers):
        if (
            any(m in modifiers for m in ("multicast::cluster", "im2col", "gather4"))
            or "shared::cluster" not in modifiers[:5]
        ):
            raise unknown(i)
        if "tensor" in modifiers:
            return _tensor_load(i)
        return _plain_load(i)
    raise unknown(i)


def _plain_load(i: Instruction) -> Callable:
    to, what, size, barrier = (
        address(i.operands[0]),
        address(i.operands[1]),
        source(i.operands[2], "u32"),
        i.operands[3],
    )
    at_barrier = address(barrier)

    def execute(wave: Any, f: Any) -> None:
        sizes = f.full(size(wave, f)).astype(np.int64)
        begins, sources = f.full(to(wave, f)), f.full(what(wave, f))
        for lane, key, k in _each(wave, f, at_barrier(wave, f)):
            n = int(sizes[k])
            if n % 16 or sources[k] % 16 or begins[k] % 16:
                raise wave.fault("misaligned", f, f"a bulk copy of {n} bytes: all are multiples of 16", lane)
            inner = sub_fragment(f, np.arange(f.count) == k)
            offsets = np.arange(0, n, 16)
            data = np.concatenate([wave.globals.load(sources[k : k + 1] + o, 16, inner) for o in offsets])
            _issue(wave, f, lane, key, int(begins[k]) + np.arange(n), data.view(np.uint8).reshape(-1), 0)

    return execute


def _tensor_load(i: Instruction) -> Callable:
    """cp.async.bulk.tensor: the box of a tensor map that begins at the coordinates; zeros outside the tensor."""
    to, what, at_barrier = address(i.operands[0]), i.operands[1], address(i.operands[2])
    if not isinstance(what, Address):
        raise unknown(i)
    map_at = address(what)
    coordinates = [source(c, "s32") for c in what.coordinates]

    def execute(wave: Any, f: Any) -> None:
        begins, maps = f.full(to(wave, f)), f.full(map_at(wave, f))
        coords = np.stack([f.full(c(wave, f)) for c in coordinates]).astype(np.int64)
        for lane, key, k in _each(wave, f, at_barrier(wave, f)):
            tensor = _map(wave, f, int(maps[k]), lane)
            if len(tensor.box) != len(coordinates):
                text = f"{len(coordinates)} coordinates for a tensor map of {len(tensor.box)}"
                raise wave.fault("bad descriptor", f, text, lane)
            align = 128 if tensor.swizzle < 2 else 1 << (7 + tensor.swizzle)
            if begins[k] % align:
                text = f"the destination is no multiple of {align} bytes, as its swizzle needs"
                raise wave.fault("misaligned", f, text, lane)
            data = _tile(wave, tensor, coords[:, k])
            _issue(
                wave,
                f,
                lane,
                key,
                swizzled(int(begins[k]) + np.arange(len(data)), tensor.swizzle),
                data,
                tensor.swizzle,
            )

    return execute


def _map(wave: Any, f: Any, at: int, lane: int) -> Decoded:
    offset = at - PARAM_BASE
    found = None
    if 0 <= offset <= len(wave.parameters) - BYTES:
        if offset % 64:
            raise wave.fault("misaligned", f, "a tensor map lies at a multiple of 64 bytes", lane)
        found = decode(wave.parameters[offset : offset + BYTES])
    if found is None:
        raise wave.fault("bad descriptor", f, "there is no tensor map at that address", lane)
    return found


def _tile(wave: Any, tensor: Decoded, begin: np.ndarray) -> np.ndarray:
    """The bytes of a tile, coordinate 0 fastest."""
    offset, inside = np.zeros((), np.int64), np.ones((), bool)
    axes = zip(tensor.box, tensor.steps, tensor.shape, tensor.strides, begin, strict=True)
    for b, step, size, stride, start in axes:
        index = start + np.arange(b) * step
        offset = (
            index * stride + offset[..., None] if offset.ndim == 0 else offset[None] + _column(index * stride, offset)
        )
        good = (index >= 0) & (index < size)
        inside = good & inside[..., None] if inside.ndim == 0 else inside[None] & _column(good, inside)
    flat = np.where(inside, offset, 0).reshape(-1)
    places = tensor.address - memory.BASE + flat
    rows = wave.arena.bytes[places[:, None] + np.arange(tensor.item)]
    return np.where(inside.reshape(-1, 1), rows, 0).astype(np.uint8).reshape(-1)


def _column(values: np.ndarray, other: np.ndarray) -> np.ndarray:
    return values.reshape(-1, *[1] * other.ndim)


def _issue(wave: Any, f: Any, lane: int, key: tuple[int, int], at: np.ndarray, data: np.ndarray, swizzle: int) -> None:
    """A copy of `data` to the shared addresses `at` is under way."""
    shared, unit = wave.shared, wave.unit(Barriers)
    unit.at(key, f, lane)
    if at.min() < 1024 or at.max() >= shared.limit:
        raise wave.fault("out of bounds", f, "a bulk copy ends outside the block's shared memory", lane)
    places = at + key[0] * shared.stride
    granules = np.unique(places // shared.granule)
    shared.shadow.pending(granules, np.full(granules.shape, lane), f)
    unit.flying.append(_Copy(key[0], key, places, data, granules, f.pc - 1, swizzle))
