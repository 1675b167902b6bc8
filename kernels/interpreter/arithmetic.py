"""Opcodes of arithmetic, bits and comparison: one line or one short function each.

Every function here maps arrays of lanes to an array of lanes, and knows nothing of threads, masks or memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .opcodes import (
    DTYPES,
    F32,
    F64,
    HALVES,
    PACKED,
    TABLE,
    U32,
    U64,
    ByVariant,
    constant,
    directed,
    elementwise,
    immediate,
    kind_of,
    opcode,
    pure,
    rounded,
    source,
    target,
    uniform,
    unknown,
)
from .ptx import Instruction, Vector

# Integer and floating-point arithmetic

ARITHMETIC = "Integer, Floating Point and Half Precision Arithmetic Instructions"


def _arithmetic(fn: Callable) -> ByVariant:
    return ByVariant(lambda i: rounded(i, fn) if directed(i) and kind_of(i) == "f32" else fn)


pure("add", ARITHMETIC, _arithmetic(lambda a, b: a + b))
pure("sub", ARITHMETIC, _arithmetic(lambda a, b: a - b))


@ByVariant
def _divide(i: Instruction) -> Callable:
    if kind_of(i)[0] == "f":
        return rounded(i, lambda a, b: a / b) if directed(i) else lambda a, b: a / b
    return lambda a, b: _quotient(a, b)


def _quotient(a: Any, b: Any) -> Any:
    """Integer division towards zero; of anything by zero, all ones, as the hardware does."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "i":
        q = np.floor_divide(a, safe)
        q = q + ((q < 0) & (q * safe != a))
    else:
        q = a // safe
    return np.where(b == 0, constant(-1, a.dtype), q).astype(a.dtype)


pure("div", ARITHMETIC, _divide)
pure("rem", ARITHMETIC, lambda a, b: np.where(b == 0, a, a - _quotient(a, b) * b))
pure("abs", ARITHMETIC, np.abs)
pure("neg", ARITHMETIC, lambda a: -a)


def _extreme(choose: Callable, propagate: Callable) -> Callable:
    """min or max: of a number and a NaN the number, unless .NaN."""
    return ByVariant(lambda i: propagate if "NaN" in i.modifiers or kind_of(i)[0] in "us" else choose)


def _number(choose: Callable) -> Callable:
    """fmin/fmax of IEEE 754: a NaN only where both are; of two zeros the smaller or larger by sign."""

    def pick(*values: Any) -> Any:
        result = values[0]
        for v in values[1:]:
            zero = np.copysign(result, choose(np.copysign(np.float32(1), result), np.copysign(np.float32(1), v)))
            result = np.where((result == 0) & (v == 0), zero, choose(result, v))
        return result

    return pick


pure("min", ARITHMETIC, _extreme(_number(np.fmin), lambda *v: np.minimum.reduce(np.broadcast_arrays(*v))))
pure("max", ARITHMETIC, _extreme(_number(np.fmax), lambda *v: np.maximum.reduce(np.broadcast_arrays(*v))))


def _fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c in the next wider type: the product is exact, and the sum rounded there and again in the caller."""
    if a.dtype == F64:
        wide = np.longdouble
        return np.asarray(a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(F64)
    return a * b + c


@ByVariant
def _fma(i: Instruction) -> Callable:
    compute = rounded(i, _fused)
    return (lambda a, b, c: np.maximum(compute(a, b, c), F32.type(0))) if "relu" in i.modifiers else compute


pure("fma", ARITHMETIC, _fma)


@opcode("mul", ARITHMETIC)
def _mul(i: Instruction) -> Callable:
    kind = kind_of(i)
    if kind[0] in "fb":
        return uniform(i, _arithmetic(lambda a, b: a * b))
    return elementwise(i, _product(i, kind), [kind] * 2)


@opcode("mad", ARITHMETIC)
def _mad(i: Instruction) -> Callable:
    kind = kind_of(i)
    if kind[0] == "f":
        return TABLE["fma"].build(i)
    product = _product(i, kind)
    third = wider(kind) if "wide" in i.modifiers else kind
    return elementwise(i, lambda a, b, c: product(a, b) + c, [kind, kind, third])


def wider(kind: str) -> str:
    """The integer type of twice the bits."""
    return f"{kind[0]}{2 * int(kind[1:])}"


def _product(i: Instruction, kind: str) -> Callable:
    if "hi" in i.modifiers:
        if kind[1:] == "64":
            return lambda a, b: high_product(a, b)
        wide, bits = DTYPES[wider(kind)], int(kind[1:])
        return lambda a, b: (a.astype(wide) * b.astype(wide) >> wide.type(bits)).astype(DTYPES[kind])
    if "wide" in i.modifiers:
        wide = DTYPES[wider(kind)]
        return lambda a, b: a.astype(wide) * b.astype(wide)
    return lambda a, b: a * b


def high_product(a: Any, b: Any) -> Any:
    """The upper 64 bits of a product of 64-bit numbers, by halves."""
    x, y, mask, half = a.astype(U64), b.astype(U64), U64.type(0xFFFFFFFF), U64.type(32)
    low = (x & mask) * (y & mask)
    mid = (x >> half) * (y & mask) + (low >> half)
    mid2 = (x & mask) * (y >> half) + (mid & mask)
    high = (x >> half) * (y >> half) + (mid >> half) + (mid2 >> half)
    if a.dtype.kind == "i":  # two's complement: a negative number is 2**64 less than what its bits say
        high = high - np.where(a < 0, y, U64.type(0)) - np.where(b < 0, x, U64.type(0))
    return high.astype(a.dtype)


pure("rcp", ARITHMETIC, ByVariant(lambda i: rounded(i, lambda a: 1 / a)))
pure("sqrt", ARITHMETIC, ByVariant(lambda i: rounded(i, np.sqrt)))
pure("rsqrt", ARITHMETIC, ByVariant(lambda i: rounded(i, lambda a: 1 / np.sqrt(a))))
pure("sin", ARITHMETIC, ByVariant(lambda i: rounded(i, np.sin)))
pure("cos", ARITHMETIC, ByVariant(lambda i: rounded(i, np.cos)))
pure("lg2", ARITHMETIC, ByVariant(lambda i: rounded(i, np.log2)))
pure("ex2", ARITHMETIC, ByVariant(lambda i: rounded(i, np.exp2)))
pure("tanh", ARITHMETIC, ByVariant(lambda i: rounded(i, np.tanh)))
pure("copysign", ARITHMETIC, lambda a, b: np.copysign(b, a))
pure("sad", ARITHMETIC, lambda a, b, c: c + np.where(a > b, a - b, b - a))

# Bits


def _bits(a: Any) -> Any:
    """(lanes, bits) of an unsigned or signed integer, the lowest bit first."""
    width = 8 * a.dtype.itemsize
    u = np.atleast_1d(a).view(f"u{a.dtype.itemsize}")
    return (u[:, None] >> np.arange(width, dtype=u.dtype)) & u.dtype.type(1)


def _counted(fn: Callable) -> Callable:
    """A function of the bits, (lanes, bits) -> numbers, as one of integers."""
    return lambda a: fn(_bits(a)).astype(U32).reshape(np.shape(a))[()]


@ByVariant
def _bfind(i: Instruction) -> Callable:
    def find(a: Any) -> Any:
        u = np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a
        bits = _bits(u)[:, ::-1]
        first, none = bits.argmax(1), ~bits.any(1)
        position = first if "shiftamt" in i.modifiers else bits.shape[1] - 1 - first
        return np.where(none, 0xFFFFFFFF, position).astype(U32).reshape(np.shape(a))[()]

    return find


pure("popc", ARITHMETIC, _counted(lambda bits: bits.sum(1)))
pure("clz", ARITHMETIC, _counted(lambda bits: np.where(bits.any(1), bits[:, ::-1].argmax(1), bits.shape[1])))
pure("bfind", ARITHMETIC, _bfind)
pure(
    "brev",
    ARITHMETIC,
    lambda a: (
        (_bits(a)[:, ::-1] << np.arange(8 * a.dtype.itemsize, dtype=a.dtype))
        .sum(1, dtype=a.dtype)
        .reshape(np.shape(a))[()]
    ),
)

LOGIC = "Logic and Shift Instructions"

pure("and", LOGIC, np.bitwise_and)
pure("or", LOGIC, np.bitwise_or)
pure("xor", LOGIC, np.bitwise_xor)
pure("not", LOGIC, np.invert)
pure("cnot", LOGIC, lambda a: (a == 0).astype(a.dtype))


@opcode("shl", LOGIC)
def _shl(i: Instruction) -> Callable:
    kind = "u" + kind_of(i)[1:]
    bits = 8 * DTYPES[kind].itemsize
    return elementwise(i, lambda a, n: np.where(n < bits, a << n.astype(a.dtype), a.dtype.type(0)), [kind, "u32"])


@opcode("shr", LOGIC)
def _shr(i: Instruction) -> Callable:
    kind = kind_of(i)
    bits = 8 * DTYPES[kind].itemsize

    def shift(a: Any, n: Any) -> Any:
        if a.dtype.kind == "i":
            return a >> np.minimum(n, bits - 1).astype(a.dtype)
        return np.where(n < bits, a >> n.astype(a.dtype), a.dtype.type(0))

    return elementwise(i, shift, [kind, "u32"])


@opcode("shf", LOGIC)
def _shf(i: Instruction) -> Callable:
    def shift(low: Any, high: Any, n: Any) -> Any:
        n = np.minimum(n, 32) if "clamp" in i.modifiers else n & 31
        both = high.astype(U64) << U64.type(32) | low.astype(U64)
        n = n.astype(U64)
        return (both >> n if i.modifiers[0] == "r" else both << n >> U64.type(32)).astype(U32)

    return elementwise(i, shift, ["u32"] * 3)


@opcode("lop3", LOGIC)
def _lop3(i: Instruction) -> Callable:
    table = immediate(i.operands[4])

    def logic(a: Any, b: Any, c: Any, _: Any) -> Any:
        result = U32.type(0)
        for k in range(8):
            if table >> k & 1:
                result = result | ((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c))
        return result

    return elementwise(i, logic, ["u32"] * 4)


@opcode("bfe", ARITHMETIC)
def _bfe(i: Instruction) -> Callable:
    kind = kind_of(i)
    if kind not in ("u32", "s32"):
        raise unknown(i)

    def extract(a: Any, at: Any, length: Any) -> Any:
        at, length = (at & 255).astype(np.int64), np.minimum(length & 255, 32).astype(np.int64)
        wide = np.where(at < 32, a.astype(np.int64) >> np.minimum(at, 31), np.where(a < 0, -1, 0))
        wide = wide & ((1 << length) - 1)
        if kind == "s32":
            sign = (wide >> np.maximum(length - 1, 0)) & 1
            wide = wide - (sign << length)
        return wide.astype(DTYPES[kind])

    return elementwise(i, extract, [kind, "u32", "u32"])


@opcode("bfi", ARITHMETIC)
def _bfi(i: Instruction) -> Callable:
    def insert(a: Any, b: Any, at: Any, length: Any) -> Any:
        at, length = (at & 255).astype(U64), np.minimum(length & 255, 32).astype(U64)
        mask = ((U64.type(1) << length) - U64.type(1)) << np.minimum(at, U64.type(63)) & U64.type(0xFFFFFFFF)
        return (b.astype(U64) & ~mask | a.astype(U64) << np.minimum(at, U64.type(63)) & mask).astype(U32)

    if kind_of(i) != "b32":
        raise unknown(i)
    return elementwise(i, insert, ["u32"] * 4)


@opcode("prmt", "Data Movement and Conversion Instructions")
def _prmt(i: Instruction) -> Callable:
    if len(i.modifiers) != 1:
        raise unknown(i)

    def permute(a: Any, b: Any, selector: Any) -> Any:
        both, result = b.astype(U64) << U64.type(32) | a.astype(U64), U64.type(0)
        for k in range(4):
            pick = (selector >> U32.type(4 * k)).astype(U64)
            byte = both >> ((pick & U64.type(7)) * U64.type(8)) & U64.type(255)
            byte = np.where(pick & U64.type(8), np.where(byte & U64.type(128), U64.type(255), U64.type(0)), byte)
            result = result | byte << U64.type(8 * k)
        return result.astype(U32)

    return elementwise(i, permute, ["u32"] * 3)


# Comparison and selection

COMPARISON = "Comparison and Selection Instructions"
_ORDERED = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
COMPARE: dict[str, Callable] = {
    **_ORDERED,
    **{"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
    **{f"{name}u": lambda a, b, fn=fn: fn(a, b) | np.isnan(a) | np.isnan(b) for name, fn in _ORDERED.items()},
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
_COMBINE: dict[str, Callable] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@opcode("setp", COMPARISON)
def _setp(i: Instruction) -> Callable:
    kind, compare = kind_of(i), COMPARE[i.modifiers[0]]
    combine = next((_COMBINE[m] for m in i.modifiers[1:] if m in _COMBINE), None)
    if kind in PACKED:
        raise unknown(i)
    first, second = i.operands[0], None
    if isinstance(first, Vector):
        first, second = first.items
    reads = [source(o, kind) for o in i.operands[1:3]]
    third = source(i.operands[3], "pred") if combine else None

    def execute(wave: Any, f: Any) -> None:
        a, b = (r(wave, f) for r in reads)
        if kind in HALVES:
            a, b = a.astype(F32), b.astype(F32)
        holds = compare(a, b)
        for to, value in ((first, holds), (second, ~holds)):
            if to is not None:
                target(to)(wave, combine(value, third(wave, f)) if combine and third else value, f)

    return execute


@opcode("selp", COMPARISON)
def _selp(i: Instruction) -> Callable:
    kind = kind_of(i)
    return elementwise(i, lambda a, b, p: np.where(p, a, b), [kind, kind, "pred"])


@opcode("set", COMPARISON)
def _set(i: Instruction) -> Callable:
    compare, to, kind = COMPARE[i.modifiers[0]], i.modifiers[-2], i.modifiers[-1]
    if kind in HALVES or to not in ("u32", "s32", "f32"):
        raise unknown(i)
    true = np.float32(1) if to == "f32" else constant(-1, DTYPES[to])
    return elementwise(i, lambda a, b: np.where(compare(a, b), true, true.dtype.type(0)), [kind] * 2)


@opcode("slct", COMPARISON)
def _slct(i: Instruction) -> Callable:
    kind = i.modifiers[-2]
    return elementwise(i, lambda a, b, c: np.where(c >= 0, a, b), [kind, kind, i.modifiers[-1]])


@opcode("testp", ARITHMETIC)
def _testp(i: Instruction) -> Callable:
    tests = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan, "number": lambda a: ~np.isnan(a)}
    if i.modifiers[0] not in tests:
        raise unknown(i)
    return elementwise(i, tests[i.modifiers[0]], [kind_of(i)])
