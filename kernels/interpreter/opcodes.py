"""The table of opcodes, and what its entries are made of: operands, types, rounding.

Sections are those of the PTX ISA ("Instructions"). The entries are in arithmetic.py, convert.py, access.py, control.py,
warps.py, matrices.py and asynchronous.py. An opcode or a variant that is not here raises NotImplementedError when the
kernel is prepared, not when it is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .ptx import Immediate, Instruction, Negated, Operand, Register, Special, Symbol

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for names, kind in {
        "pred": bool,
        "b8 u8": "u1",
        "s8": "i1",
        "b16 u16": "u2",
        "s16": "i2",
        "b32 u32 f16x2 bf16x2 tf32": "u4",
        "s32": "i4",
        "b64 u64": "u8",
        "s64": "i8",
        "f16": "f2",
        "f32": "f4",
        "f64": "f8",
    }.items()
    for name in names.split()
}
DTYPES["bf16"] = np.dtype(ml_dtypes.bfloat16)
PACKED = {"f16x2": "f16", "bf16x2": "bf16"}
HALVES = ("f16", "bf16", "f16x2", "bf16x2")
U32, S32, U64, F32, F64 = (DTYPES[t] for t in ("u32", "s32", "u64", "f32", "f64"))


class Opcode(NamedTuple):
    """section: of the PTX ISA. build: from an instruction to what executes it, `(wave, fragment) -> waits`. together:
    how many neighbouring lanes execute it at once, 32 for a warp; 0 where each goes alone. control: whether it may
    change which lanes run."""

    section: str
    build: Callable[[Instruction], Callable]
    together: Callable[[Instruction], int] = lambda i: 0
    control: bool = False


TABLE: dict[str, Opcode] = {}


def opcode(
    name: str, section: str, together: Callable[[Instruction], int] | int = 0, control: bool = False
) -> Callable:
    """Enter the decorated `build(instruction)` into the table."""

    def enter(build: Callable[[Instruction], Callable]) -> Callable[[Instruction], Callable]:
        size = together
        TABLE[name] = Opcode(section, build, size if callable(size) else lambda i: size, control)
        return build

    return enter


def unknown(instruction: Instruction, why: str = "") -> NotImplementedError:
    """The error for an instruction that is not in the table, or a variant of one."""
    return NotImplementedError(f"PTX line {instruction.line}: `{instruction.text}`{': ' + why if why else ''}")


# Operands


def kind_of(instruction: Instruction) -> str:
    """The instruction's type: the last modifier that is one."""
    for modifier in reversed(instruction.modifiers):
        if modifier in DTYPES:
            return modifier
    raise unknown(instruction, "no type")


def source(operand: Operand, kind: str) -> Callable[[Any, Any], Any]:
    """What reads an operand as `kind`: (wave, fragment) -> lanes, or one number for all."""
    dtype = DTYPES[kind]
    if isinstance(operand, Register):
        return lambda wave, fragment: wave.read(operand, dtype, fragment)
    if isinstance(operand, Negated):
        return lambda wave, fragment: ~wave.read(operand.register, dtype, fragment)
    if isinstance(operand, Immediate):
        number = constant(operand.value, dtype)
        return lambda wave, fragment: number
    if isinstance(operand, Special):
        return lambda wave, fragment: wave.special(operand.name, dtype, fragment)
    if isinstance(operand, Symbol):
        return lambda wave, fragment: dtype.type(wave.address_of(operand.name))
    raise TypeError(f"{operand} is not a value")


def constant(value: int | float, dtype: np.dtype) -> Any:
    """A number of the text as one of `dtype`; integers wrap."""
    if dtype.kind in "iu":
        return np.array(int(value) & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}").view(dtype)[()]
    if isinstance(value, int) and dtype.kind != "b":  # the bits of a float
        return np.array(value, f"u{dtype.itemsize}").view(dtype)[()]
    return dtype.type(value)


def immediate(operand: Operand) -> int:
    """The value of an operand that must be a number in the text."""
    if not isinstance(operand, Immediate):
        raise TypeError(f"{operand} is no immediate")
    return int(operand.value)


def target(operand: Operand) -> Callable[[Any, Any, Any], None]:
    """What writes a result into an operand: (wave, value, fragment)."""
    if isinstance(operand, Register):
        return lambda wave, value, fragment: wave.write(operand, value, fragment)
    if isinstance(operand, Special) and operand.name == "_":
        return lambda wave, value, fragment: None
    raise TypeError(f"{operand} takes no result")


def elementwise(instruction: Instruction, fn: Callable, kinds: Sequence[str]) -> Callable:
    """The execution of `fn` on all source operands, read as `kinds`, into the first operand."""
    write = target(instruction.operands[0])
    reads = [source(o, k) for o, k in zip(instruction.operands[1:], kinds, strict=True)]
    if len(reads) == 1:
        (a,) = reads
        return lambda wave, f: write(wave, fn(a(wave, f)), f)
    if len(reads) == 2:
        a, b = reads
        return lambda wave, f: write(wave, fn(a(wave, f), b(wave, f)), f)
    return lambda wave, f: write(wave, fn(*[r(wave, f) for r in reads]), f)


@dataclass(frozen=True)
class ByVariant:
    """build takes the instruction and returns what takes the lanes."""

    build: Callable[[Instruction], Callable]


def pure(name: str, section: str, fn: Callable | ByVariant) -> None:
    """An opcode whose operands and result have its type. fn takes the lanes, or is `ByVariant`: chosen by the
    instruction. Numbers of 16 bits are computed in float32 and rounded."""

    opcode(name, section)(lambda i: uniform(i, fn))


def uniform(i: Instruction, fn: Callable | ByVariant) -> Callable:
    """What `pure` builds."""
    kind, count = kind_of(i), len(i.operands) - 1
    compute = fn.build(i) if isinstance(fn, ByVariant) else fn
    if kind in HALVES:
        return elementwise(i, _in_float32(kind, compute), ["u32" if kind in PACKED else kind] * count)
    return elementwise(i, _finish(i, kind, compute), [kind] * count)


def _in_float32(kind: str, compute: Callable) -> Callable:
    dtype = DTYPES[PACKED.get(kind, kind)]
    if kind not in PACKED:
        return lambda *values: compute(*[np.asarray(v).astype(F32) for v in values]).astype(dtype)

    def packed(*words: Any) -> Any:
        size = max((np.ndim(w) and len(w) for w in words), default=0)
        lanes = [np.array(np.broadcast_to(w, (size or 1,))).view(dtype).astype(F32) for w in words]
        result = compute(*lanes).astype(dtype).view(U32)
        return result if size else result[0]

    return packed


def _finish(i: Instruction, kind: str, compute: Callable) -> Callable:
    """Apply .ftz and .sat."""
    exact = compute
    if "ftz" in i.modifiers and kind == "f32":
        exact = _flushed(compute)
    if "sat" in i.modifiers:
        if kind == "s32":
            return lambda *values: np.clip(exact(*[v.astype(np.int64) for v in values]), -(2**31), 2**31 - 1).astype(
                S32
            )
        return lambda *values: _saturate(exact(*values))
    return exact


def _flushed(compute: Callable) -> Callable:
    return lambda *values: _flush(compute(*map(_flush, values)))


def _flush(v: Any) -> Any:
    return np.where(np.abs(v) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), v), v)


def _saturate(v: Any) -> Any:
    return np.where(np.isnan(v), v.dtype.type(0), np.clip(v, v.dtype.type(0), v.dtype.type(1)))


# Rounding. The exact result is made in a wider type, then rounded once; in float64 only .rn is available.


def rounded(i: Instruction, exact: Callable) -> Callable:
    """exact(values as float64) rounded to float32 as the modifiers say; float64 stays."""

    def compute(*values: Any) -> Any:
        if values[0].dtype == F64:
            return exact(*values)
        return to_float32(exact(*[v.astype(F64) for v in values]), i.modifiers)

    return compute


def to_float32(wide: Any, modifiers: Sequence[str] = ()) -> Any:
    """float64 to float32: to nearest, or .rz, .rm, .rp."""
    near = np.asarray(wide).astype(F32)
    if "rm" in modifiers or "rz" in modifiers or "rp" in modifiers:
        up, down = np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))
        lower = np.where(near > wide, down, near)
        upper = np.where(near < wide, up, near)
        if "rm" in modifiers:
            return lower
        return upper if "rp" in modifiers else np.where(wide < 0, upper, lower)
    return near


def directed(i: Instruction) -> bool:
    return bool({"rz", "rm", "rp"} & set(i.modifiers))
