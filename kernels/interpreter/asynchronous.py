"""Opcodes of asynchronous copies by threads: cp.async, its groups and their waits.

A copy reads its source when it is issued and lands in shared memory when its thread waits for it, as late as it may;
what touches these bytes earlier is reported. Once waited for, it counts as a write of its thread: others need a
barrier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .access import address
from .memory import sub_fragment
from .opcodes import immediate, opcode, source, unknown
from .ptx import Instruction
from .shared import scatter

ASYNC = "Data Movement and Conversion Instructions: Asynchronous copy"


@dataclass(eq=False)
class _Copy:
    """What some lanes copy with one instruction: 16 or fewer bytes each."""

    lanes: np.ndarray
    group: np.ndarray
    places: np.ndarray
    size: int
    data: np.ndarray


class Copies:
    """The asynchronous copies of a wave that have not been waited for."""

    def __init__(self, wave: Any):
        self.wave = wave
        self.group = np.zeros(wave.size, np.int32)  # the group that a lane's next copy belongs to
        self.waiting: list[_Copy] = []

    def land(self, f: Any, allowed: int, all_issued: bool) -> None:
        """The fragment's lanes wait until at most `allowed` of their groups are left."""
        wave, left = self.wave, []
        for copy in self.waiting:
            limit = self.group[copy.lanes] + all_issued - allowed
            done = f.mask[copy.lanes] & (copy.group < limit)
            if done.any():
                places = copy.places[done]
                scatter(wave.shared.bytes, places, copy.size, copy.data[done])
                granules = wave.shared.granules(places, copy.size)
                wave.shared.shadow.landed(granules, wave.thread[copy.lanes[done]], f.pc - 1)
            if not done.all():
                keep = ~done
                left.append(
                    _Copy(copy.lanes[keep], copy.group[keep], copy.places[keep], copy.size, copy.data[keep])
                    if done.any()
                    else copy
                )
        self.waiting = left


def build(i: Instruction) -> Callable:
    """cp.async and its groups."""
    if "commit_group" in i.modifiers:

        def commit(wave: Any, f: Any) -> None:
            wave.unit(Copies).group[f.lanes] += 1

        return commit
    if "wait_group" in i.modifiers or "wait_all" in i.modifiers:
        everything = "wait_all" in i.modifiers
        allowed = 0 if everything else immediate(i.operands[0])
        return lambda wave, f: wave.unit(Copies).land(f, allowed, everything)
    if "mbarrier" in i.modifiers or not {"ca", "cg"} & set(i.modifiers):
        raise unknown(i)
    to, what, size = address(i.operands[0]), address(i.operands[1]), immediate(i.operands[2])
    given = source(i.operands[3], "u32") if len(i.operands) > 3 else None
    if size not in (4, 8, 16) or "ignore_src" in i.modifiers:
        raise unknown(i)

    def execute(wave: Any, f: Any) -> None:
        places, lanes = wave.shared.locate(to(wave, f), size, f)
        there = np.full(f.count, size) if given is None else f.full(given(wave, f)).astype(np.int64)
        data = _read(wave, f, f.full(what(wave, f)), there, size)
        wave.shared.shadow.pending(wave.shared.granules(places, size), lanes, f)
        copies = wave.unit(Copies)
        copies.waiting.append(_Copy(lanes, copies.group[lanes], places, size, data))

    return execute


def _read(wave: Any, f: Any, at: np.ndarray, there: np.ndarray, size: int) -> np.ndarray:
    """The first `there` bytes at each address and zeros after them, as `gather` returns `size` bytes."""
    if (there > size).any():
        raise wave.fault("bad use", f, f"it copies {int(there.max())} bytes in a copy of {size}")
    rows = np.zeros((f.count, size), np.uint8)
    for length in np.unique(there[there > 0]):
        part = there == length
        inner = sub_fragment(f, part)
        if length == size:
            values = wave.globals.load(at[part], size, inner)
            rows[part] = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)
        else:
            for k in range(int(length)):
                rows[part, k] = wave.globals.load(at[part] + k, 1, inner)
    return rows.view(f"u{size}")[:, 0] if size <= 8 else rows.view("u4")


@opcode("cp", ASYNC)
def _cp(i: Instruction) -> Callable:
    if "bulk" in i.modifiers:
        from . import bulk

        return bulk.build(i)
    return build(i)
