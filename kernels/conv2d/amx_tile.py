"""Blocks of sums on AMX tiles, of bfloat16, or of float32 in three parts (bf16x3).

A float32 has 24 bits, three bfloat16 have as many: x = x0 + x1 + x2, each the rounded rest of those before. Of the nine
products of two such sums the six of x0 y0, x0 y1, x1 y0, x1 y1, x0 y2, x2 y0 are formed; what is left out is at most
2^-23 of |x y|, float32's eps. At their peaks, six products on tiles take 0.4 of the time of one of float32 on vectors.
What is not finite becomes NaN, whose second part is.

Source: Henry, Tang, Heinecke: "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
Computations" (2019).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..cpu.amx import tile_dot, tile_load, tile_store, tile_zero
from ..cpu.bfloat16 import BFLOAT
from ..cpu.jit import helper
from ..cpu.microkernel import INT64, Emitter
from ..registry import kernel
from .packing import aligned

STEP = 16  # pairs of a step, the most that the rows of a tile hold
_HALF, _WHOLE = ir.IntType(16), ir.IntType(32)


def amx_kernel(problem, *, supports, rank, rank_float32, note, exact=True):
    """`kernel`, twice: of bfloat16, and of float32 in three parts, which is no kernel for an Inf."""
    common = dict(device="cpu", step=6, supports=supports)

    def register(fn):
        kernel(
            problem,
            **common,
            rank=rank_float32,
            dtypes=("float32",),
            exact=False,
            note=f"{note}; float32 in three parts, six products",
            name=f"{fn.__name__}_bf16x3",
        )(fn)
        return kernel(problem, **common, rank=rank, dtypes=("bfloat16",), exact=exact, note=note)(fn)

    return register


def parts_of(dtype) -> int:
    """How many bfloat16 a number is taken for."""
    return 1 if np.dtype(dtype).itemsize == 2 else 3


@helper()
def numbers(n):
    """n uninitialised bfloat16, from the start of a cache line."""
    return aligned(n, np.empty(0, np.uint16))


@helper()
def multiply(
    state, a, a_too, a_row, a_outer, a_part, b, b_row, b_part, pairs, outer, parts, c, c_too, c_row, more, wide
):  # fmt: skip
    """Sums of 16 rows at c and 16 more at c_too, of 32 columns where `wide`, else 16; added to what is there if `more`.

    a, a_too: the first factors, rows of pairs, for each of `outer` runs a_outer bytes further; b: the second, rows of
    a pair for all columns, one run after the other; of each of the parts a_part and b_part bytes further. `pairs` of a
    run are whole steps. All are addresses, strides are bytes.
    """
    if more:
        tile_load(state, 0, c, c_row)
        tile_load(state, 2, c_too, c_row)
        if wide:
            tile_load(state, 1, c + 64, c_row)
            tile_load(state, 3, c_too + 64, c_row)
    else:
        tile_zero(state, 0)
        tile_zero(state, 1)
        tile_zero(state, 2)
        tile_zero(state, 3)
    for o in range(outer):
        for i in range(0, pairs, STEP):
            for p in range(parts):
                at = o * a_outer + 4 * i + p * a_part
                tile_load(state, 4, a + at, a_row)
                tile_load(state, 5, a_too + at, a_row)
                for q in range(parts - p):
                    right = b + (o * pairs + i) * b_row + q * b_part
                    tile_load(state, 6, right, b_row)
                    tile_dot(state, 0, 4, 6)
                    tile_dot(state, 2, 5, 6)
                    if wide:
                        tile_load(state, 7, right + 64, b_row)
                        tile_dot(state, 1, 4, 7)
                        tile_dot(state, 3, 5, 7)
    tile_store(state, 0, c, c_row)
    tile_store(state, 2, c_too, c_row)
    if wide:
        tile_store(state, 1, c + 64, c_row)
        tile_store(state, 3, c_too + 64, c_row)


def _parts(builder: ir.IRBuilder, value: Any, count: int) -> list[Any]:
    """A vector of float32 as three, each with what is left rounded to bfloat16: vectors of their 16 bits."""
    found = []
    for _ in range(count):
        rounded = builder.fptrunc(value, ir.VectorType(BFLOAT, value.type.count))
        bits = builder.bitcast(rounded, ir.VectorType(_HALF, value.type.count))
        found.append(bits)
        wide = builder.zext(bits, ir.VectorType(_WHOLE, value.type.count))
        upper = builder.shl(wide, ir.Constant(wide.type, [16] * value.type.count))
        value = builder.fsub(value, builder.bitcast(upper, value.type))
    return found


def _stored(builder: ir.IRBuilder, vector: Any, address: Any) -> None:
    builder.store(vector, builder.inttoptr(address, vector.type.as_pointer())).align = 2


@intrinsic
def split(typing_context, source, target, part, count):
    """The three parts of `count` float32, to target, target + part and target + 2 * part, all addresses."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, target, part, count = args
        emitter = Emitter(builder, types.float32)
        lanes, zero = emitter.width, ir.Constant(INT64, 0)

        def some(first: Any, number: int) -> None:
            vector = ir.VectorType(ir.FloatType(), number)
            place = builder.add(target, builder.mul(first, ir.Constant(INT64, 2)))
            for bits in _parts(builder, emitter.load(emitter.at(source, first), vector), 3):
                _stored(builder, bits, place)
                place = builder.add(place, part)

        whole = builder.and_(count, ir.Constant(INT64, -lanes))
        with cgutils.for_range_slice(builder, zero, whole, ir.Constant(INT64, lanes), intp=INT64) as (i, _):
            some(i, lanes)
        while lanes := lanes // 2:  # the rest: half a vector, a quarter, ...
            before = builder.and_(count, ir.Constant(INT64, -2 * lanes))
            left = builder.and_(count, ir.Constant(INT64, lanes))
            with builder.if_then(builder.icmp_signed("!=", left, zero)):
                some(before, lanes)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


@intrinsic
def interleave_parts(typing_context, first, second, target, part, count):
    """`interleave`, of float32: pairs of parts, those of each part `part` bytes after the ones before."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        emitter = Emitter(builder, types.float32)
        step, whole = ir.Constant(INT64, emitter.width), ir.VectorType(_WHOLE, emitter.width)
        with cgutils.for_range_slice(builder, ir.Constant(INT64, 0), args[4], step, intp=INT64) as (i, _):
            pairs = (_parts(builder, emitter.load(emitter.at(base, i), emitter.vector), 3) for base in args[:2])
            place = emitter.at(args[2], i)
            for low, high in zip(*pairs, strict=True):
                upper = builder.shl(builder.zext(high, whole), ir.Constant(whole, [16] * emitter.width))
                _stored(builder, builder.or_(builder.zext(low, whole), upper), place)
                place = builder.add(place, args[3])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), emit
