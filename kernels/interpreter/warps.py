"""Opcodes through which the lanes of a warp exchange values: shfl, vote, match, redux, activemask, elect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .opcodes import DTYPES, U32, constant, kind_of, opcode, source, target, unknown
from .ptx import Immediate, Instruction, Operand, Vector

SHUFFLE = "Data Movement and Conversion Instructions"
SYNCHRONISATION = "Parallel Synchronization and Communication Instructions"


class Warps:
    """The lanes of a fragment as a matrix: a row per warp, 32 columns. Lanes that are not there are False in `here`."""

    def __init__(self, wave: Any, fragment: Any):
        self.wave, self.fragment = wave, fragment
        self.lanes = wave.every_lane if fragment.whole else fragment.lanes
        warps, self.row = np.unique(wave.warp[self.lanes], return_inverse=True)
        self.column, self.rows = wave.laneid[self.lanes], len(warps)
        self.here = np.zeros((self.rows, 32), bool)
        self.here[self.row, self.column] = True

    def matrix(self, value: Any, fill: Any = 0) -> np.ndarray:
        """A value of the fragment's lanes, warp by warp."""
        value = self.fragment.full(value)
        result = np.full((self.rows, 32), fill, value.dtype)
        result[self.row, self.column] = value
        return result

    def lanewise(self, matrix: np.ndarray) -> np.ndarray:
        """Back to one value per lane of the fragment."""
        return matrix[self.row, self.column]

    def members(self, mask: Any) -> np.ndarray:
        """The lanes that a member mask names, (warps, 32). Raises Fault where lanes of a warp that are here give
        different masks, do not name themselves, or name a live lane that is elsewhere."""
        if not np.ndim(mask) and mask == 0xFFFFFFFF and self.fragment.whole and self.here.all():
            return self.here
        words = self.matrix(mask)
        named = (words[:, :, None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool)  # warp, lane, lane that it names
        own = named[:, np.arange(32), np.arange(32)]
        first = named[np.arange(self.rows), self.here.argmax(1)]
        odd = self.here & ~own | self.here & (named != first[:, None]).any(2)
        alive = np.zeros((self.wave.warps, 32), bool)
        alive[self.wave.warp, self.wave.laneid] = self.wave.alive
        warps = np.unique(self.wave.warp[self.lanes])
        absent = first & alive[warps] & ~self.here
        if odd.any() or absent.any():
            w = int(np.flatnonzero((odd | absent).any(1))[0])
            lane = int(self.lanes[self.row == w][0])
            text = f"the lanes here do not agree with their member mask {int(words[w, self.here[w].argmax()]):#x}"
            raise self.wave.fault("divergent", self.fragment, text, lane)
        return first


def _is_all(operand: Operand) -> bool:
    return isinstance(operand, Immediate) and int(operand.value) & 0xFFFFFFFF == 0xFFFFFFFF


def _together(i: Instruction) -> int:
    return 32 if "sync" in i.modifiers else 0


@opcode("shfl", SHUFFLE, together=_together, control=True)
def _shfl(i: Instruction) -> Callable:
    """shfl.sync: a value from another lane; where that is none of its segment, the lane's own."""
    if "sync" not in i.modifiers:
        raise unknown(i, "without .sync")
    mode = i.modifiers[1]
    to, inside = i.operands[0].items if isinstance(i.operands[0], Vector) else (i.operands[0], None)
    value, distance, clamp, mask = (source(o, "u32") for o in i.operands[1:5])
    choose = {
        "idx": lambda lane, b, low, high: low | b & ~low,
        "up": lambda lane, b, low, high: lane - b,
        "down": lambda lane, b, low, high: lane + b,
        "bfly": lambda lane, b, low, high: lane ^ b,
    }[mode]

    def execute(wave: Any, f: Any) -> None:
        warps = Warps(wave, f)
        members = warps.members(mask(wave, f))
        values, lane = warps.matrix(value(wave, f)), np.arange(32)
        b = warps.matrix(distance(wave, f)).astype(np.int64) & 31
        c = warps.matrix(clamp(wave, f)).astype(np.int64)
        segment, bound = c >> 8 & 31, c & 31
        low, high = lane & segment, lane & segment | bound & ~segment
        if mode == "idx":
            other = low | b & ~segment
        else:
            other = choose(lane, b, low, high)
        valid = other >= high if mode == "up" else other <= high
        other = np.where(valid, other, lane)
        row = np.arange(warps.rows)[:, None]
        gone = warps.here & ~(members & warps.here)[row, other]
        if gone.any():
            w, at = (int(n) for n in np.argwhere(gone)[0])
            own = warps.lanes[(warps.row == w) & (warps.column == at)][0]
            raise wave.fault(
                "bad use", f, f"it takes a value from lane {int(other[w, at])}, which is not there", int(own)
            )
        wave.put(to, warps.lanewise(values[row, other]), f)
        if inside is not None:
            wave.put(inside, warps.lanewise(valid), f)

    return execute


@opcode("vote", SYNCHRONISATION, together=_together, control=True)
def _vote(i: Instruction) -> Callable:
    mode = i.modifiers[1]
    if "sync" not in i.modifiers or mode not in ("all", "any", "uni", "ballot"):
        raise unknown(i)
    to, holds, mask = i.operands[0], source(i.operands[1], "pred"), source(i.operands[2], "u32")

    def execute(wave: Any, f: Any) -> None:
        warps = Warps(wave, f)
        members = warps.members(mask(wave, f)) & warps.here
        votes = warps.matrix(holds(wave, f)) & members
        if mode == "ballot":
            result = (votes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(U32)
        else:
            every, some = (votes == members).all(1), votes.any(1)
            result = {"all": every, "any": some, "uni": every | ~some}[mode]
        wave.put(to, result[warps.row], f)

    return execute


@opcode("match", SYNCHRONISATION, together=_together, control=True)
def _match(i: Instruction) -> Callable:
    mode, kind = i.modifiers[0], kind_of(i)
    if mode not in ("any", "all"):
        raise unknown(i)
    to, same = i.operands[0].items if isinstance(i.operands[0], Vector) else (i.operands[0], None)
    value, mask = source(i.operands[1], kind), source(i.operands[2], "u32")

    def execute(wave: Any, f: Any) -> None:
        warps = Warps(wave, f)
        members = warps.members(mask(wave, f)) & warps.here
        values = warps.matrix(value(wave, f))
        equal = (values[:, :, None] == values[:, None, :]) & members[:, None, :]
        words = (equal.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(2).astype(U32)
        if mode == "all":
            every = equal.sum(2) == members.sum(1)[:, None]
            words = np.where(every, words, U32.type(0))
            if same is not None:
                wave.put(same, warps.lanewise(every), f)
        wave.put(to, warps.lanewise(words), f)

    return execute


@opcode("redux", SYNCHRONISATION, together=32, control=True)
def _redux(i: Instruction) -> Callable:
    op, kind = i.modifiers[1], kind_of(i)
    reduce = {"add": np.add, "min": np.minimum, "max": np.maximum}
    reduce |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    if op not in reduce or kind == "f32":
        raise unknown(i)
    info = np.iinfo(DTYPES[kind])
    neutral = {"min": info.max, "max": info.min, "and": constant(-1, DTYPES[kind])}.get(op, 0)
    to, value, mask = i.operands[0], source(i.operands[1], kind), source(i.operands[2], "u32")

    def execute(wave: Any, f: Any) -> None:
        warps = Warps(wave, f)
        members = warps.members(mask(wave, f)) & warps.here
        values = np.where(members, warps.matrix(value(wave, f)), DTYPES[kind].type(neutral))
        wave.put(to, reduce[op].reduce(values, axis=1, dtype=values.dtype)[warps.row], f)

    return execute


@opcode("activemask", SYNCHRONISATION)
def _activemask(i: Instruction) -> Callable:
    write = i.operands[0]

    def execute(wave: Any, f: Any) -> None:
        warps = Warps(wave, f)
        words = (warps.here.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(U32)
        wave.put(write, words[warps.row], f)

    return execute


@opcode("elect", SYNCHRONISATION, together=32, control=True)
def _elect(i: Instruction) -> Callable:
    """elect.sync d|p, mask: one lane of the warp, here the first that the mask names."""
    leader, chosen = i.operands[0].items  # type: ignore[union-attr]
    mask, write = source(i.operands[1], "u32"), target(leader)

    def execute(wave: Any, f: Any) -> None:
        warps = Warps(wave, f)
        first = (warps.members(mask(wave, f)) & warps.here).argmax(1)
        wave.put(chosen, warps.column == first[warps.row], f)
        write(wave, U32.type(0), f) if warps.rows == 0 else _put_if_register(wave, leader, first[warps.row], f)

    return execute


def _put_if_register(wave: Any, operand: Operand, value: np.ndarray, f: Any) -> None:
    if hasattr(operand, "index"):
        wave.put(operand, value.astype(np.uint32), f)
