"""What orders two accesses, and the shadow of memory that finds those which nothing orders.

Every access that an instruction makes is an event with a number, its tick; `Timeline.places` remembers the instruction.
Shadow memory keeps, per granule (the smallest size that the kernel accesses), who wrote last and when. An access by
another thread is a race unless a barrier lies between the two:

    every access before `Order.floor[block]` happened before a barrier of the whole block;
    within a warp, every access before `Order.warp_floor[warp]` before a bar.warp.sync;
    `Order.known[block, thread, other]`, in kernels with named barriers or mbarriers, is a vector clock: up to where
    `thread` knows of the accesses of `other`.

The verdict does not depend on the order in which warps happened to run: what counts is whether something orders them.
Reads are checked at once against earlier writes; against later writes at the next barrier (`Intervals`) or when the
write comes (`Clocks`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .faults import Fault

if TYPE_CHECKING:
    from .wave import Fragment, Wave

NEVER = 2**31 - 1  # the tick of a granule that nobody wrote
PENDING = 2**31 - 2  # of one that an asynchronous copy is going to write
_MBARRIERS = 32  # the most that a block may have here
ATOMIC = -2  # the writer, where the last writes were atomic operations


class Timeline:
    """The ticks of a launch: places[tick] is the instruction of that event."""

    def __init__(self) -> None:
        self.places: list[int] = []

    def tick(self, place: int) -> int:
        """The number of a new event."""
        self.places.append(place)
        return len(self.places) - 1

    @property
    def now(self) -> int:
        """The tick that the next event gets."""
        return len(self.places)


class Order:
    """What the threads of a wave know of each other's accesses."""

    def __init__(self, wave: Wave):
        self.wave, self.timeline = wave, wave.arena.timeline
        self.floor = np.full(wave.blocks, self.timeline.now, np.int32)
        self.lowest = self.timeline.now  # of all floors
        self.warp_floor = np.full(wave.warps, self.timeline.now, np.int32)
        self.known: Any = None  # vector clocks; only in kernels that need them

    def start_clocks(self, agents: int) -> None:
        """Keep vector clocks, for the threads of each block and `agents` asynchronous units."""
        wave = self.wave
        self.known = np.full((wave.blocks, wave.threads, wave.threads + agents), self.timeline.now, np.int32)

    def barrier(self, blocks: np.ndarray, lanes: np.ndarray | None = None) -> None:
        """The threads of these blocks have met; `lanes` where it was only some of them."""
        wave = self.wave
        if lanes is not None and not np.array_equal(lanes, wave.alive & blocks[wave.block]):
            for b in np.flatnonzero(blocks):
                self._meet(int(b), wave.thread[lanes & (wave.block == b)])
            return
        wave.shared.shadow.close()
        self.floor[blocks] = self.timeline.now
        self.lowest = int(self.floor.min())

    def warp_barrier(self, fragment: Fragment) -> None:
        """The lanes of each warp of the fragment have met."""
        wave = self.wave
        wave.shared.shadow.close()
        warps = np.unique(wave.warp[fragment.lanes])
        self.warp_floor[warps] = self.timeline.now
        if self.known is not None:
            for warp in warps:
                mates = fragment.mask & (wave.warp == warp)
                self._meet(int(wave.block[mates][0]), wave.thread[mates])

    def _meet(self, block: int, threads: np.ndarray) -> None:
        """Each of these threads learns what any of them knows."""
        if self.known is None:
            raise NotImplementedError("a barrier of some of a block's threads, in a kernel without vector clocks")
        self.learn(block, threads, self.knowledge(block, threads))

    def knowledge(self, block: int, threads: np.ndarray) -> np.ndarray:
        """What these threads know together, of their own accesses too."""
        known = self.known[block]
        known[threads, threads] = self.timeline.now
        return known[threads].max(axis=0)

    def learn(self, block: int, threads: np.ndarray, knowledge: np.ndarray) -> None:
        """These threads now also know that."""
        self.known[block, threads] = np.maximum(self.known[block, threads], knowledge)

    def before(self, other: np.ndarray, tick: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Whether an access of thread `other` of the same block at `tick` happened before what `lanes` do now."""
        wave = self.wave
        block, thread, warp = wave.block[lanes], wave.thread[lanes], wave.warp[lanes]
        ordered = (tick < self.floor[block]) | (other == thread)
        mates = (other // 32 == thread // 32) & (other >= 0) & (other < wave.threads)
        ordered |= mates & (tick < self.warp_floor[warp])
        if self.known is not None:
            ordered |= (other >= 0) & (tick < self.known[block, thread, other])
        return ordered

    def finish(self) -> None:
        """The wave has ended."""
        self.wave.shared.shadow.close()


class Shadow:
    """Shadow of the shared memory of a wave's blocks. Granules are numbered through all blocks.

    `read` and `write` take granules of shape (lanes,) or (parts, lanes), and the lanes as an index into the wave.
    """

    def __init__(self, wave: Wave, granules: int):
        self.wave, self.order = wave, wave.order
        self.tick = np.full(granules, NEVER, np.int32)
        self.writer = np.full(granules, -1, np.int32)

    def read(self, granules: np.ndarray, lanes: np.ndarray, fragment: Fragment, atomic: bool = False) -> None:
        """Lanes read granules. Raises Fault: uninitialised, in flight, race."""
        ticks = self.tick[granules]
        if ticks.max(initial=0) >= self.order.lowest:
            self._check(granules, ticks, lanes, fragment, reading=True, atomic=atomic)
        self.note_read(self.order.timeline.tick(fragment.pc - 1), granules, lanes)

    def write(
        self, granules: np.ndarray, lanes: np.ndarray, fragment: Fragment, atomic: bool = False, same: Any = None
    ) -> None:
        """Lanes write granules. same(): whether all lanes that write one place write the same value. Raises Fault."""
        ticks = self.tick[granules]
        if ticks.max(initial=0) >= self.order.lowest:
            self._check(granules, ticks, lanes, fragment, reading=False, atomic=atomic)
        self.check_readers(granules, lanes, fragment)
        threads = np.broadcast_to(self.wave.thread[lanes], granules.shape)
        self.tick[granules] = self.order.timeline.tick(fragment.pc - 1)
        self.writer[granules] = ATOMIC if atomic else threads
        if not atomic and (clash := self.writer[granules] != threads).any() and not (same is not None and same()):
            lane = np.broadcast_to(lanes, granules.shape)[clash][0]
            text = f"it and thread {self.writer[granules][clash][0]} write the same bytes in one instruction"
            raise self.wave.fault("race", fragment, text, lane)

    def pending(self, granules: np.ndarray, lanes: np.ndarray, fragment: Fragment) -> None:
        """An asynchronous copy that these lanes issued is going to write granules. Raises Fault."""
        self.write(granules, lanes, fragment)
        self.tick[granules] = PENDING

    def landed(self, granules: np.ndarray, threads: np.ndarray, place: int) -> None:
        """The copy has been waited for by `threads`, and counts as their write of this moment."""
        self.tick[granules] = self.order.timeline.tick(place)
        self.writer[granules] = threads

    def _check(self, granules: Any, ticks: Any, lanes: Any, fragment: Fragment, reading: bool, atomic: bool) -> None:
        lanes = np.broadcast_to(lanes, granules.shape)
        recent = ticks >= self.order.floor[self.wave.block[lanes]]
        if not reading:
            recent &= ticks != NEVER
        granules, ticks, lanes = granules[recent], ticks[recent], lanes[recent]
        writers = self.writer[granules]
        bad = ~self.order.before(writers, ticks, lanes) | (ticks >= PENDING)
        if atomic:
            bad &= writers != ATOMIC
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            lane, tick, writer = int(lanes[first]), int(ticks[first]), int(writers[first])
            verb = "reads" if reading else "writes"
            if tick == NEVER:
                raise self.wave.fault("uninitialised", fragment, "it reads shared memory that nobody wrote", lane)
            if tick == PENDING:
                text = f"it {verb} shared memory that an asynchronous copy of thread {writer} is still to write"
                raise self.wave.fault("in flight", fragment, text, lane)
            self.race(lane, verb, writer, "wrote", tick, fragment)

    def race(self, lane: int, verb: str, other: int, did: str, tick: int, fragment: Fragment) -> None:
        """Raise the Fault for a race with what `other` did at an earlier tick."""
        who = "an atomic operation" if other == ATOMIC else self.describe(other)
        place = self.wave.place(self.order.timeline.places[tick])
        text = f"it {verb} what {who} {did} in {place}, and nothing orders the two"
        raise self.wave.fault("race", fragment, text, lane)

    def describe(self, agent: int) -> str:
        return f"thread {agent}" if agent < self.wave.threads else "an asynchronous unit"

    def note_read(self, tick: int, granules: np.ndarray, lanes: np.ndarray) -> None:
        raise NotImplementedError

    def check_readers(self, granules: np.ndarray, lanes: np.ndarray, fragment: Fragment) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """A barrier is about to pass."""

    def fence(self, fragment: Fragment) -> None:
        """fence.proxy.async, which matters to asynchronous units only."""


class Intervals(Shadow):
    """For kernels whose only barriers are those of whole blocks and warps.

    Reads of the current interval are kept in a list; where a write came after them in the same interval, the list is
    compared with the writers when the interval ends.
    """

    def __init__(self, wave: Wave, granules: int):
        super().__init__(wave, granules)
        self.reads: list[tuple[int, np.ndarray, np.ndarray]] = []
        self.last_write = -1

    def note_read(self, tick: int, granules: np.ndarray, lanes: np.ndarray) -> None:
        self.reads.append((tick, granules, lanes))

    def check_readers(self, granules: np.ndarray, lanes: np.ndarray, fragment: Fragment) -> None:
        self.last_write = self.order.timeline.now

    def close(self) -> None:
        wave, order = self.wave, self.order
        for tick, granules, lanes in self.reads:
            if tick > self.last_write:
                break
            ticks = self.tick[granules]
            late = (ticks > tick) & (ticks != NEVER)
            if not late.any():
                continue
            lanes = np.broadcast_to(lanes, granules.shape)[late]
            writers, ticks = self.writer[granules[late]], ticks[late]
            same_interval = order.floor[wave.block[lanes]] <= tick
            same_warp = (writers // 32 == wave.thread[lanes] // 32) & (tick < order.warp_floor[wave.warp[lanes]])
            bad = same_interval & ~same_warp & (writers != wave.thread[lanes])
            if bad.any():
                first = int(np.flatnonzero(bad)[0])
                self._late_write(tick, int(lanes[first]), int(writers[first]), int(ticks[first]))
        if self.order.lowest > 0 and self.reads:
            self.reads = [] if wave.blocks == 1 else [r for r in self.reads if r[0] >= order.lowest]
        self.last_write = -1 if not self.reads else self.last_write

    def _late_write(self, tick: int, lane: int, writer: int, written: int) -> None:
        wave, places = self.wave, self.order.timeline.places
        who = "an atomic operation" if writer == ATOMIC else f"thread {writer}"
        place = "" if written == PENDING else f" in {wave.place(places[written])}"
        text = f"it reads what {who} overwrites{place} before a barrier, in {wave.place(places[tick])}"
        raise Fault("race", f"{wave.name(lane)}: {text}")


class Clocks(Shadow):
    """For kernels with named barriers, mbarriers or wgmma: every reader of a granule is kept, thread by thread."""

    def __init__(self, wave: Wave, granules: int):
        super().__init__(wave, granules)
        agents = _MBARRIERS + -(-wave.threads // 128)
        self.order.start_clocks(agents)
        self.mbarriers = [0] * wave.blocks
        self.fenced = np.full((wave.blocks, wave.threads), -1, np.int32)  # when a thread last did fence.proxy.async
        self.read_at = np.zeros((granules, wave.threads + agents), np.int32)  # tick + 1; committed where touched

    def new_agent(self, block: int) -> int:
        """The entry, after those of the threads, for the copies that complete on another mbarrier of a block."""
        if self.mbarriers[block] == _MBARRIERS:
            raise NotImplementedError(f"more than {_MBARRIERS} mbarriers in a block")
        self.mbarriers[block] += 1
        return self.mbarriers[block] - 1

    def warpgroup_agent(self, thread: int) -> int:
        """The entry of the tensor core of a thread's warpgroup."""
        return self.wave.threads + _MBARRIERS + thread // 128

    def unit_reads(self, granules: np.ndarray, lanes: np.ndarray, fragment: Fragment) -> None:
        """The tensor core of the warpgroup `lanes` reads granules from now until it is waited for. What it reads must
        be known to all its threads. Raises Fault."""
        wave, order = self.wave, self.order
        block, threads = int(wave.block[lanes[0]]), wave.thread[lanes]
        order.known[block, threads, threads] = order.timeline.now
        known = np.maximum(order.known[block, threads].min(axis=0), order.floor[block])
        ticks, writers = self.tick[granules], self.writer[granules]
        bad = ticks >= np.where(writers >= 0, known[writers], order.floor[block])
        if bad.any():
            self._check(granules[bad], ticks[bad], lanes[:1], fragment, reading=True, atomic=False)
            first = int(np.flatnonzero(bad)[0])
            self.race(int(lanes[0]), "multiplies", int(writers[first]), "wrote", int(ticks[first]), fragment)
        ordinary = (writers >= 0) & (writers < wave.threads)
        fence = np.maximum(self.fenced[block, np.where(ordinary, writers, 0)], self.fenced[block, threads].max())
        if (unseen := ordinary & (fence <= ticks)).any():
            writer = int(writers[np.flatnonzero(unseen)[0]])
            text = f"it multiplies what thread {writer} stored, with no fence.proxy.async between"
            raise wave.fault("race", fragment, text, int(lanes[0]))
        self.read_at[granules, self.warpgroup_agent(int(threads[0]))] = order.timeline.tick(fragment.pc - 1) + 1

    def fence(self, fragment: Fragment) -> None:
        """fence.proxy.async: asynchronous units may read what the fragment's threads stored or have learnt of."""
        lanes = fragment.lanes
        self.fenced[self.wave.block[lanes], self.wave.thread[lanes]] = self.order.timeline.now

    def note_read(self, tick: int, granules: np.ndarray, lanes: np.ndarray) -> None:
        self.read_at[granules, np.broadcast_to(self.wave.thread[lanes], granules.shape)] = tick + 1

    def check_readers(self, granules: np.ndarray, lanes: np.ndarray, fragment: Fragment) -> None:
        wave, order = self.wave, self.order
        lanes = np.broadcast_to(lanes, granules.shape).ravel()
        granules = granules.ravel()
        for part in np.array_split(np.arange(len(lanes)), max(1, len(lanes) * self.read_at.shape[1] >> 22)):
            block, thread = wave.block[lanes[part]], wave.thread[lanes[part]]
            limit = np.maximum(order.known[block, thread], order.floor[block][:, None])
            limit[np.arange(len(part)), thread] = NEVER
            read = self.read_at[granules[part]]
            bad = read > limit
            if bad.any():
                i, other = (int(x) for x in np.argwhere(bad)[0])
                mates = other // 32 == thread[i] // 32 and read[i, other] <= order.warp_floor[wave.warp[lanes[part]][i]]
                if mates and other < wave.threads:
                    continue
                self.race(int(lanes[part][i]), "overwrites", other, "reads", int(read[i, other]) - 1, fragment)


__all__ = ["NEVER", "PENDING", "Clocks", "Intervals", "Order", "Shadow", "Timeline"]
