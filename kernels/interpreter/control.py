"""Opcodes that change which threads run: bra, ret, exit, bar; and fences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .opcodes import opcode, source, unknown
from .ptx import Immediate, Instruction, Target

CONTROL = "Control Flow Instructions"
SYNCHRONISATION = "Parallel Synchronization and Communication Instructions"


@opcode("bra", CONTROL, control=True)
def _bra(i: Instruction) -> Callable:
    (to,) = i.operands
    if not isinstance(to, Target):
        raise unknown(i)

    def execute(wave: Any, f: Any) -> None:
        f.pc = wave.program.function.labels[to.name]

    return execute


@opcode("ret", CONTROL, control=True)
def _ret(i: Instruction) -> Callable:
    return lambda wave, f: wave.exit(f)


opcode("exit", CONTROL, control=True)(_ret)


@opcode("trap", CONTROL, control=True)
def _trap(i: Instruction) -> Callable:
    def execute(wave: Any, f: Any) -> None:
        raise wave.fault("bad use", f, "it traps", int(np.flatnonzero(f.mask)[0]))

    return execute


@opcode("bar", SYNCHRONISATION, together=32, control=True)
def _bar(i: Instruction) -> Callable:
    """bar.sync and barrier.sync: wait for the block, or for as many of its threads as the second operand says."""
    modifiers = [m for m in i.modifiers if m not in ("cta", "aligned")]
    if modifiers == ["warp", "sync"]:
        return lambda wave, f: wave.order.warp_barrier(f)
    if modifiers[0] not in ("sync", "arrive"):
        raise unknown(i)
    number = source(i.operands[0], "u32")
    count = source(i.operands[1], "u32") if len(i.operands) > 1 else None

    def execute(wave: Any, f: Any) -> bool:
        which = np.unique(f.compact(number(wave, f)))
        if len(which) > 1 or which[0] > 15:
            raise wave.fault("bad use", f, f"barriers {which.tolist()}: there are 0 to 15, one for all of a warp")
        many = None if count is None else int(np.max(count(wave, f)))
        return wave.barriers.arrive(f, int(which[0]), many, wait=modifiers[0] == "sync")

    return execute


opcode("barrier", SYNCHRONISATION, together=32, control=True)(_bar)


def needs_clocks(i: Instruction) -> bool:
    """Whether an instruction orders fewer threads than all of a block."""
    if i.opcode in ("mbarrier", "wgmma") or (i.opcode == "cp" and "bulk" in i.modifiers):
        return True
    if i.opcode not in ("bar", "barrier") or "warp" in i.modifiers:
        return False
    zero = isinstance(i.operands[0], Immediate) and i.operands[0].value == 0
    return "arrive" in i.modifiers or not zero or (len(i.operands) > 1 and "sync" in i.modifiers)


@opcode("fence", SYNCHRONISATION)
def _fence(i: Instruction) -> Callable:
    """fence.proxy.async orders ordinary stores before asynchronous reads; a fence for the GPU is what the atomics after
    it hand on to other blocks. Others only matter beside a barrier or mbarrier, which carries the order here."""
    if i.modifiers[0] == "proxy":
        return (lambda wave, f: wave.shared.shadow.fence(f)) if "async" in i.modifiers[1] else (lambda wave, f: None)
    if {"gpu", "sys", "gl"} & set(i.modifiers):
        return lambda wave, f: wave.globals.fence(f)
    return lambda wave, f: None


opcode("membar", SYNCHRONISATION)(_fence)

for _name in ("setmaxnreg", "griddepcontrol", "nanosleep"):
    opcode(_name, SYNCHRONISATION)(lambda i: lambda wave, f: None)
