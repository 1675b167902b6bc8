"""Opcodes that move and convert values: mov, cvt, cvta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import shared
from .opcodes import (
    DTYPES,
    F32,
    F64,
    U32,
    U64,
    constant,
    elementwise,
    kind_of,
    opcode,
    source,
    target,
    to_float32,
    unknown,
)
from .ptx import SIZES, Address, Instruction, Register, Symbol, Vector

MOVEMENT = "Data Movement and Conversion Instructions"
LOCAL_WINDOW = 1 << 41  # generic addresses of local memory


@opcode("mov", MOVEMENT)
def _mov(i: Instruction) -> Callable:
    to, what = i.operands
    kind = kind_of(i)
    if isinstance(what, Address):  # mov.u64 %rd, variable+8
        base, offset = source(what.base, kind), constant(what.offset, DTYPES[kind])
        write = target(to)
        return lambda wave, f: write(wave, base(wave, f) + offset, f)
    if isinstance(what, Vector):
        return _pack(i, to, what, kind)
    if isinstance(to, Vector):
        return _unpack(to, what, kind)
    return elementwise(i, lambda a: a, [kind])


def _pack(i: Instruction, to: Any, parts: Vector, kind: str) -> Callable:
    """mov.b32 %r, {%rs1, %rs2}: the first part is the lowest."""
    whole, part = DTYPES["u" + kind[1:]], "u" + str(8 * SIZES[kind] // len(parts.items))
    reads, bits = [source(p, part) for p in parts.items], 8 * SIZES[part]
    write = target(to)

    def execute(wave: Any, f: Any) -> None:
        value = whole.type(0)
        for k, read in enumerate(reads):
            value = value | read(wave, f).astype(whole) << whole.type(k * bits)
        write(wave, value, f)

    return execute


def _unpack(to: Vector, what: Any, kind: str) -> Callable:
    """mov.b32 {%rs1, %rs2}, %r."""
    whole, part = "u" + kind[1:], DTYPES["u" + str(8 * SIZES[kind] // len(to.items))]
    read, writes, bits = source(what, whole), [target(t) for t in to.items], 8 * part.itemsize
    shift = DTYPES[whole].type

    def execute(wave: Any, f: Any) -> None:
        value = read(wave, f)
        for k, write in enumerate(writes):
            write(wave, (value >> shift(k * bits)).astype(part), f)

    return execute


@opcode("cvt", MOVEMENT)
def _cvt(i: Instruction) -> Callable:
    to, kind = i.modifiers[-2], i.modifiers[-1]
    if to in ("bf16x2", "f16x2") and kind == "f32" and len(i.operands) == 3:
        half = DTYPES[to[:-2]]
        _nearest_only(i)

        def pair(high: Any, low: Any) -> Any:
            words = [np.asarray(v).astype(half).view("u2").astype(U32) for v in (high, low)]
            return words[0] << U32.type(16) | words[1]

        return elementwise(i, pair, ["f32"] * 2)
    if to == "tf32" and "rna" in i.modifiers:  # ties away from zero: add half of the last bit that stays, cut the rest
        return elementwise(i, lambda a: (a + U32.type(0x1000)) & U32.type(0xFFFFE000), ["u32"])
    if to not in DTYPES or kind not in DTYPES or to == "tf32":
        raise unknown(i)
    return elementwise(i, conversion(i, to, kind), [kind])


def _nearest_only(i: Instruction) -> None:
    if not {"rn", "rni"} & set(i.modifiers):
        raise unknown(i, "another rounding than .rn")


def conversion(i: Instruction, to: str, kind: str) -> Callable:
    """lanes of `kind` -> lanes of `to`, with the rounding and the saturation of the instruction."""
    dtype, floating = DTYPES[to], {"f": True, "b": to == "bf16"}.get(to[0], False)
    modifiers = i.modifiers
    if kind[0] in "us" and not floating:
        if "sat" in modifiers:
            low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
            wide = np.int64 if kind != "u64" else np.uint64
            return lambda a: np.clip(a.astype(wide), max(low, 0) if wide == np.uint64 else low, high).astype(dtype)
        return lambda a: a.astype(dtype)
    if not floating:
        return lambda a: _to_integer(np.asarray(a).astype(F64), dtype, modifiers)
    if kind[0] in "us" or kind == "f64":
        directed = {"rm", "rp", "rz"} & set(modifiers)
        if directed and (to != "f32" or (kind[1:] == "64" and kind[0] != "f")):
            raise unknown(i)
        if directed:
            return lambda a: to_float32(np.asarray(a).astype(F64), modifiers)
        return lambda a: np.asarray(a).astype(dtype)
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    rounding = next((whole[m] for m in modifiers if m in whole), None)
    narrows = DTYPES[kind].itemsize > dtype.itemsize
    if narrows:
        _nearest_only(i)

    def to_float(a: Any) -> Any:
        a = np.asarray(a)
        a = rounding(a.astype(F32) if a.dtype.itemsize == 2 else a) if rounding else a
        if "relu" in modifiers:
            a = np.where(a > 0, a, a.dtype.type(0))
        if "sat" in modifiers:
            a = np.where(np.isnan(a), a.dtype.type(0), np.clip(a, a.dtype.type(0), a.dtype.type(1)))
        return a.astype(dtype)

    return to_float


def _to_integer(a: Any, dtype: np.dtype, modifiers: tuple[str, ...]) -> Any:
    """Rounded as the modifiers say; a number outside the range becomes the nearest end of it, a NaN 0."""
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    a = next(whole[m] for m in modifiers if m in whole)(a)
    info = np.iinfo(dtype)
    low, high = float(info.min), float(info.max)
    inside = np.where(np.isnan(a) | (a <= low) | (a >= high), 0.0, a).astype(dtype)
    result = np.where(a <= low, dtype.type(info.min), np.where(a >= high, dtype.type(info.max), inside))
    return np.where(np.isnan(a), dtype.type(0), result)


@opcode("cvta", MOVEMENT)
def _cvta(i: Instruction) -> Callable:
    window = {"shared": shared.WINDOW, "shared::cta": shared.WINDOW, "local": LOCAL_WINDOW}
    space = next((m for m in i.modifiers if m not in ("to", "u64", "u32")), "")
    offset = U64.type(window.get(space, 0))
    if space not in ("global", "const", "param", *window):
        raise unknown(i)
    if "to" in i.modifiers:
        return elementwise(i, lambda a: a - offset, ["u64"])
    what = i.operands[1]
    if isinstance(what, Symbol | Register):
        return elementwise(i, lambda a: a + offset, ["u64"])
    raise unknown(i)
