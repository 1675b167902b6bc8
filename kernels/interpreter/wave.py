"""Lanes: the threads of some blocks of a launch, executed together, one NumPy array a register.

A register holds one number per thread of the wave, or a single number where all threads have the same (a loop
counter, a parameter): arithmetic on those costs next to nothing. A `Fragment` is a set of threads at one place in the
program. Where threads branch apart, a fragment splits; fragments run lowest place first, and merge where they meet.

Arithmetic is computed for all lanes and written to the fragment's; memory is touched by the fragment's lanes only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .faults import Fault
from .memory import Arena, GlobalMemory
from .ptx import SIZES, Function, Instruction, Module, Register
from .shadow import Order
from .shared import Shared

POISON = {1: 0xAD, 2: 0x7FAD, 4: 0x7FC0DEAD, 8: 0x7FF8DEAD0000DEAD}  # a NaN where it is read as a float
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SPARSE = 8  # a fragment of fewer than 1/8 of the lanes computes on its own lanes only
Execute = Callable[["Wave", "Fragment"], Any]


@dataclass(eq=False)
class Step:
    """An instruction, ready to run. together: every lane of a warp must execute it at once (.aligned). control: it
    changes which lanes run, so a guard splits the fragment first."""

    instruction: Instruction
    execute: Execute
    together: int = 0
    control: bool = False


@dataclass(eq=False)
class Program:
    """A kernel, ready to run.

    symbols: addresses of its parameters, shared and local variables, each in its own space. shared_end: the first
    shared address after the static variables. granule, global_granule: the smallest access to shared and to global
    memory, in bytes. fine: some of a block's threads meet without the others, so races need vector clocks. strand: how
    many neighbouring threads a schedule keeps together, 32, or 128 where warpgroups multiply.
    """

    module: Module
    function: Function
    steps: list[Step]
    symbols: dict[str, int]
    shared_end: int
    local_size: int
    granule: int
    global_granule: int
    fine: bool
    strand: int


class Fragment:
    """Threads of a wave that stand at the same instruction."""

    __slots__ = ("_lanes", "count", "mask", "pc", "size", "sparse", "strand", "whole")

    def __init__(self, pc: int, mask: np.ndarray, strand: int = 0):
        self.pc, self.mask, self.strand, self.size = pc, mask, strand, len(mask)
        self.count = int(np.count_nonzero(mask))
        self.whole = self.count == self.size
        self.sparse = self.count * _SPARSE < self.size
        self._lanes: Any = None

    @property
    def lanes(self) -> Any:
        """Index of its lanes: a slice where it is all of them."""
        if self._lanes is None:
            self._lanes = slice(None) if self.whole else np.flatnonzero(self.mask)
        return self._lanes

    def compact(self, value: Any) -> Any:
        """Of a value as arithmetic sees it, the part of this fragment's lanes; what is uniform stays so."""
        return value if self.whole or self.sparse or not np.ndim(value) else value[self.lanes]

    def full(self, value: Any) -> np.ndarray:
        """`compact`, with one number per lane of the fragment even where all are the same."""
        value = self.compact(value)
        return np.broadcast_to(value, (self.count,)) if not np.ndim(value) else value


@dataclass
class Counts:
    """What a launch cost: instructions executed (once per fragment), and lanes that executed one."""

    instructions: int = 0
    lanes: int = 0
    opcodes: dict[str, int] = field(default_factory=dict)


class Wave:
    """Some blocks of a launch.

    block_ids: the x, y, z of each block, shape (blocks, 3). grid, block: (x, y, z). schedule: None runs all warps in
    step; a random generator runs them in bursts, in random order. limit: how many instructions it may take.
    """

    def __init__(
        self,
        program: Program,
        arena: Arena,
        parameters: np.ndarray,
        block_ids: np.ndarray,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        schedule: np.random.Generator | None = None,
        watch: Callable[[Wave, Fragment, Step], None] | None = None,
        limit: int = 1 << 62,
    ):
        self.program, self.arena, self.parameters = program, arena, parameters
        self.threads, self.blocks = int(np.prod(block)), len(block_ids)
        self.size = self.threads * self.blocks
        self.grid, self.block_shape, self.block_ids = grid, block, block_ids
        self.thread = np.tile(np.arange(self.threads, dtype=np.int32), self.blocks)
        self.block = np.repeat(np.arange(self.blocks, dtype=np.int32), self.threads)
        warps = -(-self.threads // 32)
        self.warp = self.block * warps + self.thread // 32  # within the wave
        self.laneid = self.thread % 32
        self.every_lane = np.arange(self.size)
        self.warps = warps * self.blocks
        self.registers: list[Any] = [None] * len(program.function.registers)
        self.order = Order(self)
        self.globals = GlobalMemory(self, arena)
        self.specials: dict[str, Any] = {}
        self.shared = Shared(self, shared_bytes)
        self.local = np.full(self.size * max(program.local_size, 1), POISON[1], np.uint8)
        self.alive = np.ones(self.size, bool)
        self.live = self.size
        self.ready: list[Fragment] = []
        self.parked: list[tuple[str, Fragment]] = []  # what for, and who waits at the instruction
        self.barriers = _Barriers(self)
        self.units: dict[type, Any] = {}  # asynchronous units, by class
        self.busy: dict[int, np.ndarray] = {}  # registers that wgmma holds, and for which lanes
        self.counts = Counts()
        self.watch, self.random, self.limit = watch, schedule, limit
        self._guarded: tuple[Any, Any, Any, Any] = (None, None, None, None)

    # Running

    def run(self) -> None:
        """Run every thread to its end. Raises Fault."""
        if self.random is None:
            self.ready = [Fragment(0, np.ones(self.size, bool))]
        else:
            of_block = self.thread // self.program.strand
            self.ready = [Fragment(0, of_block == w, w) for w in range(int(of_block.max()) + 1)]
        with np.errstate(all="ignore"):
            while self.live:
                if self.random is not None and self.random.random() < 0.1:
                    self._progress()
                if not self.ready and not self._progress():
                    self._stuck()
                if self.ready:
                    self._advance(self._pick())
        self.order.finish()

    def unit(self, kind: type) -> Any:
        """The wave's asynchronous unit of that class."""
        if kind not in self.units:
            self.units[kind] = kind(self)
        return self.units[kind]

    def _progress(self) -> bool:
        """Let an asynchronous unit do something that is due at any time, such as a tensor copy. False if none can."""
        return any(unit.progress() for unit in self.units.values() if hasattr(unit, "progress"))

    def _pick(self) -> Fragment:
        """The fragment to go on with: the lowest place in the program, of a strand chosen by the schedule."""
        strand = 0 if self.random is None else self.random.choice(sorted({f.strand for f in self.ready}))
        mine = [f for f in self.ready if f.strand == strand]
        lowest = min(f.pc for f in mine)
        together = [f for f in mine if f.pc == lowest]
        for fragment in together:
            self.ready.remove(fragment)
        return together[0] if len(together) == 1 else self.merge(together)

    def merge(self, fragments: list[Fragment]) -> Fragment:
        """One fragment of all these, which stand at the same place."""
        mask = np.logical_or.reduce([f.mask for f in fragments])
        return Fragment(fragments[0].pc, mask, fragments[0].strand)

    def _advance(self, fragment: Fragment) -> None:
        """Run a fragment until it ends, waits, splits or meets another one."""
        meets = min((f.pc for f in self.ready if f.strand == fragment.strand), default=1 << 60)
        burst = 1 << 60 if self.random is None else int(self.random.geometric(0.02))
        steps, counts = self.program.steps, self.counts
        while True:
            if fragment.pc >= meets or burst == 0:
                self.ready.append(fragment)
                return
            step = steps[fragment.pc]
            counts.instructions += 1
            counts.lanes += fragment.count
            if counts.instructions > self.limit:
                fragment.pc += 1
                raise self.fault("deadlock", fragment, f"the kernel still runs after {self.limit:,} instructions")
            if self.watch is not None:
                self.watch(self, fragment, step)
            fragment.pc += 1
            burst -= 1
            active = fragment
            if step.instruction.guard is not None:
                active = self._guard(fragment, step.instruction.guard)
                if active is None:
                    continue
                if step.control and active is not fragment:
                    rest = Fragment(fragment.pc, fragment.mask & ~active.mask, fragment.strand)
                    self.ready.append(rest)
                    meets, fragment = min(meets, rest.pc), active
            if step.together:
                together = self._assemble(active, step.together)
                if together is None:
                    return
                active = fragment = together
            if step.execute(self, active):
                return

    def _guard(self, fragment: Fragment, guard: tuple[Register, bool]) -> Fragment | None:
        """The part of the fragment for which the guard holds: all of it, a new fragment, or None."""
        register, negated = guard
        value = self.registers[register.index]
        if not np.ndim(value):
            return fragment if bool(value) != negated else None
        if self._guarded[0] is value and self._guarded[1] is fragment and self._guarded[2] == negated:
            part = self._guarded[3]
        else:
            part = Fragment(fragment.pc, fragment.mask & (~value if negated else value), fragment.strand)
            self._guarded = (value, fragment, negated, part)
        if part.count in (0, fragment.count):
            return fragment if part.count else None
        part.pc = fragment.pc
        return part

    def exit(self, fragment: Fragment) -> bool:
        """The fragment's threads are done."""
        self.alive &= ~fragment.mask
        self.live = int(np.count_nonzero(self.alive))
        self.barriers.complete()
        self._reconsider()
        return True

    def part_waits(self, fragment: Fragment, part: np.ndarray, what: str) -> bool:
        """A part of the fragment's lanes, one truth value for each, waits here for `what`, and runs the instruction
        again when `wake(what)` is called. The others go on."""
        mask = np.zeros(self.size, bool)
        mask[np.arange(self.size)[fragment.lanes][part]] = True
        self.parked.append((what, Fragment(fragment.pc - 1, mask, fragment.strand)))
        rest = Fragment(fragment.pc, fragment.mask & ~mask, fragment.strand)
        if rest.count:
            self.ready.append(rest)
        return True

    def wake(self, what: str) -> None:
        """Those who wait for `what` try again."""
        self.ready += [f for why, f in self.parked if why == what]
        self.parked = [(why, f) for why, f in self.parked if why != what]

    # Warps that must be together

    def _assemble(self, active: Fragment, size: int) -> Fragment | None:
        """For an instruction of whole warps: of the fragment and those who wait here, the warps that are whole. The
        others wait here for their mates. None where no warp is whole."""
        if active.count == self.live:
            return active
        here = active.pc - 1
        mask = active.mask
        for waiting in [f for why, f in self.parked if why == "warp" and f.pc == here and f.strand == active.strand]:
            mask = mask | waiting.mask
            self.parked.remove(("warp", waiting))
        group = self.warp if size == 32 else self.block * 8 + self.thread // size
        partial = np.bincount(group, mask & self.alive) != np.bincount(group, self.alive)
        lonely = mask & partial[group]
        if lonely.any():
            self.parked.append(("warp", Fragment(here, lonely, active.strand)))
            mask = mask & ~lonely
        if mask is active.mask:
            return active
        return Fragment(active.pc, mask, active.strand) if mask.any() else None

    def _reconsider(self) -> None:
        """Lanes have gone: warps that wait for their mates may be whole now."""
        self.wake("warp")

    # Registers

    def read(self, register: Register, dtype: np.dtype, fragment: Fragment) -> Any:
        """A register's lanes (all; the fragment's own where it is sparse), seen as `dtype`."""
        value = self.registers[register.index]
        if self.busy:
            self._check_busy(register, fragment)
        if value is None:
            value = _UNSIGNED[SIZES[register.type]](POISON[SIZES[register.type]])
        if value.dtype != dtype:
            value = view_as(value, dtype)
        return value[fragment.lanes] if fragment.sparse and value.ndim else value

    def write(self, register: Register, value: Any, fragment: Fragment) -> None:
        """Give the fragment's lanes of a register the values that arithmetic made."""
        if fragment.sparse:
            self.put(register, value, fragment)
            return
        if self.busy:
            self._check_busy(register, fragment)
        value = widen(value, register)
        if fragment.count != self.live:
            value = np.where(fragment.mask, value, self._old(register, value.dtype))
        self.registers[register.index] = value

    def put(self, register: Register, value: Any, fragment: Fragment) -> None:
        """Give the fragment's lanes of a register their values, one for each of these lanes."""
        if self.busy:
            self._check_busy(register, fragment)
        value = widen(value, register)
        if not fragment.whole:
            lanes, value = value, np.array(np.broadcast_to(self._old(register, value.dtype), (self.size,)))
            value[fragment.lanes] = lanes
        self.registers[register.index] = value

    def _check_busy(self, register: Register, fragment: Fragment) -> None:
        mask = self.busy.get(register.index)
        if mask is not None and (mask & fragment.mask).any():
            text = f"it touches {register.name}, which wgmma holds until its group is waited for"
            raise self.fault("in flight", fragment, text, lane_of(mask & fragment.mask))

    def _old(self, register: Register, dtype: np.dtype) -> Any:
        old = self.registers[register.index]
        if old is None:
            old = _UNSIGNED[SIZES[register.type]](POISON[SIZES[register.type]])
        return old if old.dtype == dtype else view_as(old, dtype)

    def special(self, name: str, dtype: np.dtype, fragment: Fragment) -> Any:
        """A special register ("Special Registers" of the PTX ISA)."""
        if name not in self.specials:
            self.specials[name] = _special(self, name)
        value = self.specials[name]
        value = value[fragment.lanes] if fragment.sparse and value.ndim else value
        return view_as(value, dtype)

    def address_of(self, name: str) -> int:
        """The address of a variable or parameter."""
        return self.program.symbols[name] if name in self.program.symbols else self.arena.symbols[name]

    # Faults

    def fault(self, kind: str, fragment: Fragment, text: str, lane: int | None = None) -> Fault:
        """The exception for something that lane `lane` of the wave does at the fragment's instruction."""
        who = "" if lane is None else f"{self.name(lane)}: "
        return Fault(kind, f"{who}{text}, in {self.place(fragment.pc - 1)}")

    def place(self, pc: int) -> str:
        """An instruction, and its source line."""
        instruction = self.program.steps[pc].instruction
        text = instruction.text if len(instruction.text) <= 90 else instruction.text[:89] + "…"
        return f"`{text}` ({self.program.module.where(instruction)})"

    def name(self, lane: int) -> str:
        """A thread and its block, in the coordinates of the launch."""
        x, y, _ = self.block_shape
        t = int(self.thread[lane])
        block = tuple(int(b) for b in self.block_ids[self.block[lane]])
        return f"thread ({t % x}, {t // x % y}, {t // (x * y)}) of block {block}"

    def _stuck(self) -> None:
        """Nobody can go on: say who waits for what."""
        where = [(why, f.pc, f.mask) for why, f in self.parked]
        where += [(f"barrier {b}", pc, mask) for b, pc, mask in self.barriers.waiting()]
        lines = [f"{int(m.sum())} threads wait ({why}) at {self.place(pc)}" for why, pc, m in where]
        split = any(why == "warp" for why, _, _ in where)
        raise Fault("divergent" if split else "deadlock", "; ".join(lines))


class _Barriers:
    """bar.sync and its kin: who waits at which of a block's 16 barriers."""

    def __init__(self, wave: Wave):
        self.wave = wave
        self.at = np.full(wave.size, -1, np.int16)  # the barrier that a lane waits at
        self.resume = np.zeros(wave.size, np.int32)
        self.strand = np.zeros(wave.size, np.int32)
        self.expected = np.zeros((wave.blocks, 16), np.int64)  # 0: all threads of the block that are alive
        self.results: dict[int, Callable] = {}

    def arrive(self, fragment: Fragment, number: int, count: int | None, wait: bool = True) -> bool:
        """The fragment arrives; True where it has to wait."""
        wave = self.wave
        if count is None and wait and fragment.count == wave.live and (self.at < 0).all():
            wave.order.barrier(np.ones(wave.blocks, bool))
            return False
        if (self.at[fragment.mask] >= 0).any():
            raise wave.fault("deadlock", fragment, "it waits at a barrier already")
        self.at[fragment.mask] = number
        self.resume[fragment.mask] = fragment.pc
        self.strand[fragment.mask] = fragment.strand
        self.expected[np.unique(wave.block[fragment.mask]), number] = 0 if count is None else count
        self.complete()
        return True

    def complete(self) -> None:
        """Let those go whose barrier has all its threads."""
        wave = self.wave
        for number in np.unique(self.at[self.at >= 0]):
            here = self.at == number
            arrived = np.bincount(wave.block, here, wave.blocks)
            alive = np.bincount(wave.block, wave.alive, wave.blocks)
            wanted = np.where(self.expected[:, number] == 0, alive, self.expected[:, number])
            done = (arrived >= wanted) & (arrived > 0)
            if done.any():
                released = here & done[wave.block]
                wave.order.barrier(done, released)
                self.at[released] = -1
                keys = zip(self.resume[released].tolist(), self.strand[released].tolist(), strict=True)
                for pc, strand in sorted(set(keys)):
                    mask = released & (self.resume == pc) & (self.strand == strand)
                    wave.ready.append(Fragment(pc, mask, strand))

    def waiting(self) -> list[tuple[int, int, np.ndarray]]:
        """(barrier, instruction, lanes) of all that wait."""
        pairs = {(int(b), int(p)) for b, p in zip(self.at, self.resume, strict=True) if b >= 0}
        return [(b, p - 1, (self.at == b) & (self.resume == p)) for b, p in sorted(pairs)]


def _special(wave: Wave, name: str) -> Any:
    kind, _, axis = name.partition(".")
    if axis in ("x", "y", "z"):
        k = "xyz".index(axis)
        x, y, _ = wave.block_shape
        steps = (1, x, x * y)
        values = {
            "%tid": lambda: wave.thread // steps[k] % wave.block_shape[k],
            "%ntid": lambda: wave.block_shape[k],
            "%ctaid": lambda: wave.block_ids[wave.block, k],
            "%nctaid": lambda: wave.grid[k],
            "%cluster_ctaid": lambda: 0,
            "%cluster_nctaid": lambda: 1,
        }
        if kind in values:
            value = np.asarray(values[kind]()).astype(np.uint32)
            return value.flat[0] if value.ndim and (value == value.flat[0]).all() else value[()]
    simple = {
        "%laneid": lambda: wave.laneid,
        "%warpid": lambda: wave.thread // 32,
        "%smid": lambda: 0,
        "%nsmid": lambda: 1,
        "%clock": lambda: wave.counts.instructions,
        "%cluster_ctarank": lambda: 0,
        "%lanemask_eq": lambda: 1 << wave.laneid.astype(np.int64),
        "%lanemask_lt": lambda: (1 << wave.laneid.astype(np.int64)) - 1,
        "%lanemask_le": lambda: (2 << wave.laneid.astype(np.int64)) - 1,
        "%lanemask_ge": lambda: 0xFFFFFFFF & ~((1 << wave.laneid.astype(np.int64)) - 1),
        "%lanemask_gt": lambda: 0xFFFFFFFF & ~((2 << wave.laneid.astype(np.int64)) - 1),
    }
    if name not in simple:
        raise NotImplementedError(f"the special register {name}")
    return np.asarray(simple[name]()).astype(np.uint32)[()]


def lane_of(mask: np.ndarray) -> int:
    """The first lane of a mask."""
    return int(np.flatnonzero(mask)[0])


def view_as(value: Any, dtype: np.dtype) -> Any:
    """The same bits as another type; of a wider register, its low bits; of a narrower one, zeros above."""
    if "b" in (value.dtype.kind, dtype.kind):
        return value.astype(dtype)
    if value.dtype.itemsize != dtype.itemsize:
        value = value.view(_UNSIGNED[value.dtype.itemsize]).astype(_UNSIGNED[dtype.itemsize])
    return value.view(dtype)


def widen(value: Any, register: Register) -> Any:
    """A result as wide as the register that takes it: signed numbers keep their sign."""
    size = SIZES[register.type]
    if value.dtype.itemsize != size:
        signed = value.dtype.kind == "i"
        value = value.astype(np.dtype(f"{'i' if signed else 'u'}{size}"))
    return value
