"""A launch, instruction by instruction: what each lane computed, and what shared memory held. For study.

The launch is recorded whole, so that one can go back as well as forward, and past a fault to what led to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .faults import Fault
from .launch import run
from .opcodes import DTYPES
from .shared import BASE
from .wave import Fragment, Step, Wave, view_as

EXAMPLE = Path(__file__).parent / "examples" / "block_sum.ptx"


@dataclass(eq=False)
class Moment:
    """One instruction, and the state after it.

    instruction: its text. where: its source line. lanes: which threads executed it, numbered through the blocks that
    run together. written: by name of the register, one number per thread. shared: the bytes of shared memory, (blocks,
    bytes). registers: of all that were written so far, by name. fault: what went wrong in it, or None.
    """

    instruction: str
    where: str
    line: int
    lanes: np.ndarray
    kind: str
    written: dict[str, np.ndarray] = field(default_factory=dict)
    registers: dict[str, np.ndarray] = field(default_factory=dict)
    shared: np.ndarray = field(default_factory=lambda: np.zeros((1, 0), np.uint8))
    shared_changed: bool = False
    fault: Fault | None = None

    def as_type(self, name: str, kind: str = "") -> np.ndarray:
        """A register as a PTX type such as "f32"; by default that of the instruction. KeyError for an unknown one."""
        if name not in self.registers:
            raise KeyError(f"{name} was not written yet; there are {', '.join(self.registers) or 'none'}")
        value = self.registers[name]
        dtype = DTYPES.get(kind or self.kind, value.dtype)
        return value if value.dtype == bool or dtype.itemsize != value.itemsize else view_as(value, dtype)


def record(
    text: str,
    name: str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    shared_bytes: int = 0,
    **settings,
) -> list[Moment]:
    """Run a kernel as `launch.run` does and return every instruction that was executed, with the state after it.

    A Fault ends the record, in its last moment, and is not raised. For small launches: a few thousand instructions.
    """
    recorder = _Recorder()
    try:
        run(text, name, grid, block, args, shared_bytes, watch=recorder.watch, **settings)
    except Fault as fault:
        recorder.close()
        if not recorder.moments:
            raise
        recorder.moments[-1].fault = fault
    recorder.close()
    return recorder.moments


class _Recorder:
    """Sees the state before each instruction, which is the one after the instruction before it."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []
        self.before: list[Any] = []
        self.names: list[str] = []
        self.wave: Wave | None = None
        self.memory = np.zeros((1, 0), np.uint8)

    def watch(self, wave: Wave, fragment: Fragment, step: Step) -> None:
        self.close()
        if wave is not self.wave:
            self.wave, self.memory = wave, self._shared(wave)
            self.before = [None] * len(wave.registers)
            self.names = wave.program.function.register_names
        instruction = step.instruction
        where = wave.program.module.where(instruction)
        line = instruction.loc.line if instruction.loc else 0
        kind = next((m for m in reversed(instruction.modifiers) if m in DTYPES), "")
        self.moments.append(Moment(instruction.text, where, line, fragment.mask.copy(), kind))

    def close(self) -> None:
        """Complete the last moment."""
        if self.wave is None or not self.moments:
            return
        wave, moment = self.wave, self.moments[-1]
        earlier = self.moments[-2].registers if len(self.moments) > 1 else {}
        for index, value in enumerate(wave.registers):
            if value is not self.before[index]:
                moment.written[self.names[index]] = np.array(np.broadcast_to(value, wave.size))
                self.before[index] = value
        moment.registers = {**earlier, **moment.written}
        now = self._shared(wave)
        moment.shared_changed = not np.array_equal(now, self.memory)
        self.memory = now if moment.shared_changed else self.memory
        moment.shared = self.memory

    @staticmethod
    def _shared(wave: Wave) -> np.ndarray:
        rows = wave.shared.bytes.reshape(wave.blocks, wave.shared.stride)
        return rows[:, BASE : wave.shared.limit].copy()


def show(moment: Moment, number: int, source: Sequence[str] = (), watched: dict[str, str] | None = None) -> str:
    """A moment as text. source: lines of the CUDA source. watched: registers to show besides those just written, by
    name, with the type to show them in ("" for the instruction's)."""
    text = source[moment.line - 1].strip() if 0 < moment.line <= len(source) else ""
    lines = [
        f"{number:4}  {moment.where:20} {text}",
        f"      {moment.instruction}",
        f"      lanes {ranges(moment.lanes)}",
    ]
    shown = dict.fromkeys(moment.written, "") | (watched or {})
    for name, kind in shown.items():
        if name in moment.registers:
            mark = "=" if name in moment.written else ":"
            lines.append(f"      {name} {mark} {numbers(moment.as_type(name, kind), moment.lanes)}")
    if moment.shared_changed:
        lines += [f"      shared memory of block {b}: {words(row)}" for b, row in enumerate(moment.shared)]
    if moment.fault is not None:
        lines.append(f"      FAULT {moment.fault}")
    return "\n".join(lines)


def ranges(lanes: np.ndarray) -> str:
    """The numbers of the lanes, as ranges: 0-31, 40."""
    index = np.flatnonzero(lanes)
    parts = np.split(index, np.flatnonzero(np.diff(index) > 1) + 1)
    return ", ".join(f"{p[0]}" if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts if len(p)) or "none"


def numbers(values: np.ndarray, lanes: np.ndarray, most: int = 12) -> str:
    """The values of the first lanes that are active, or one number where all have the same."""
    active = values[lanes]
    if len(active) and (active == active[0]).all():
        return f"{_number(active[0])}{' in every lane' if len(active) > 1 else ''}"
    rest = f" … ({len(active)} lanes)" if len(active) > most else ""
    return " ".join(_number(v) for v in active[:most]) + rest


def words(row: np.ndarray, most: int = 12) -> str:
    """Shared memory as float32, `·` where nobody wrote."""
    values = row[: len(row) // 4 * 4].view(np.float32)
    unwritten = row[: len(row) // 4 * 4].view(np.uint32) == 0xFFFFFFFF
    shown = ["·" if u else f"{v:.6g}" for v, u in zip(values[:most], unwritten[:most], strict=True)]
    return " ".join(shown) + (f" … ({len(values)} words)" if len(values) > most else "")


def _number(value: Any) -> str:
    """Floats short, addresses in hexadecimal."""
    if np.asarray(value).dtype.kind == "f":
        return f"{value:.6g}"
    return f"{int(value):#x}" if value.dtype == np.uint64 and value >= 1 << 32 else str(value)
