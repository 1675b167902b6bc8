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

from ..cpu.amx import ROWS, tile_dot, tile_load, tile_store, tile_zero
from ..cpu.jit import helper
from ..cpu.microkernel import INT64, Emitter
from ..cpu.vectors import load, splat, store_as, where
from ..registry import kernel
from .packing import aligned

CHANNELS = 32  # or whatever is summed over: numbers of a step, the most that a row of a tile holds
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
def multiply(state, a, a_too, strides, b, b_row, b_part, steps, outer, parts, c, c_too, c_row, more, to, to_row, wide):
    """Sums of 16 rows and of 16 more, of 32 columns where `wide`, else 16, to the addresses `to`; if `more`, added to
    those at c and c_too, whose rows are c_row apart.

    a, a_too: the first factors, rows of pairs; their strides, in bytes: from row to row, from step to step, from part
    to part, and from one of `outer` runs of steps to the next. b: the second, rows of a pair for all columns, step by
    step and run by run; of each of the parts b_part further. All are addresses.
    """
    a_row, a_step, a_part, a_outer = strides
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
        for i in range(steps):
            for p in range(parts):
                at = o * a_outer + i * a_step + p * a_part
                tile_load(state, 4, a + at, a_row)
                tile_load(state, 5, a_too + at, a_row)
                for q in range(parts - p):
                    right = b + (o * steps + i) * ROWS * b_row + q * b_part
                    tile_load(state, 6, right, b_row)
                    tile_dot(state, 0, 4, 6)
                    tile_dot(state, 2, 5, 6)
                    if wide:
                        tile_load(state, 7, right + 64, b_row)
                        tile_dot(state, 1, 4, 7)
                        tile_dot(state, 3, 5, 7)
    first, second = to
    tile_store(state, 0, first, to_row)
    tile_store(state, 2, second, to_row)
    if wide:
        tile_store(state, 1, first + 64, to_row)
        tile_store(state, 3, second + 64, to_row)


def _finish_of(width):
    """`finish`, of a tile so many filters wide."""

    @helper(inline=True)
    def finish(sums, bias, out, out_pixel, skip, skip_pixel, add, floor, count, dtype, out_dtype):
        if bias:
            shift, least = load(bias, width, dtype), splat(floor, width, dtype)
            for i in range(count):
                v = load(sums + i * width * 4, width, dtype) + shift
                if add:
                    v = v + load(skip + i * skip_pixel, width, out_dtype)
                store_as(out + i * out_pixel, where(v <= least, least, v), out_dtype)  # a NaN stays
        else:
            for i in range(count):
                store_as(out + i * out_pixel, load(sums + i * width * 4, width, dtype), out_dtype)

    return finish


_finish_wide, _finish_narrow = _finish_of(2 * ROWS), _finish_of(ROWS)


@helper()
def finish(sums, width, bias, out, out_pixel, skip, skip_pixel, add, floor, count, dtype, out_dtype):
    """y = max(sums + bias + z, floor), rounded, for so many pixels one after the other; all are addresses, bias may be
    0, strides are bytes."""
    if width > ROWS:
        _finish_wide(sums, bias, out, out_pixel, skip, skip_pixel, add, floor, count, dtype, out_dtype)
    else:
        _finish_narrow(sums, bias, out, out_pixel, skip, skip_pixel, add, floor, count, dtype, out_dtype)


def _parts(builder: ir.IRBuilder, value: Any) -> list[Any]:
    """A vector of float32 as three, with 8 bits of it each: vectors of 32 bits, whose upper halves are bfloat16."""
    kind = ir.VectorType(_WHOLE, value.type.count)
    half, upper = (ir.Constant(kind, [bits] * kind.count) for bits in (0x8000, -0x10000))
    found = []
    for _ in range(2):
        rounded = builder.and_(builder.add(builder.bitcast(value, kind), half), upper)
        found.append(rounded)
        value = builder.fsub(value, builder.bitcast(rounded, value.type))
    return [*found, builder.bitcast(value, kind)]  # what is left has 8 bits


def _upper_halves(builder: ir.IRBuilder, vectors: list[Any]) -> Any:
    """Of one or two vectors of 32 bits, as one vector of 16 bits."""
    halves = [builder.bitcast(v, ir.VectorType(_HALF, 2 * v.type.count)) for v in (vectors[0], vectors[-1])]
    odd = list(range(1, len(vectors) * halves[0].type.count, 2))
    return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(_WHOLE, len(odd)), odd))


def _stored(builder: ir.IRBuilder, vector: Any, address: Any) -> None:
    builder.store(vector, builder.inttoptr(address, vector.type.as_pointer())).align = 2


@intrinsic
def split(typing_context, source, target, part, count):
    """The three parts of `count` float32, to target, target + part and target + 2 * part, all addresses."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, target, part, count = args
        emitter = Emitter(builder, types.float32)
        lanes, zero = emitter.width, ir.Constant(INT64, 0)

        def some(first: Any, number: int, vectors: int = 1) -> None:
            vector = ir.VectorType(ir.FloatType(), number)
            places = [builder.add(first, ir.Constant(INT64, i * number)) for i in range(vectors)]
            loaded = [_parts(builder, emitter.load(emitter.at(source, place), vector)) for place in places]
            place = builder.add(target, builder.mul(first, ir.Constant(INT64, 2)))
            for of_part in zip(*loaded, strict=True):
                _stored(builder, _upper_halves(builder, list(of_part)), place)
                place = builder.add(place, part)

        whole = builder.and_(count, ir.Constant(INT64, -2 * lanes))
        with cgutils.for_range_slice(builder, zero, whole, ir.Constant(INT64, 2 * lanes), intp=INT64) as (i, _):
            some(i, lanes, 2)
        lanes *= 2
        while lanes := lanes // 2:  # the rest: a vector, half a vector, ...
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
            pairs = (_parts(builder, emitter.load(emitter.at(base, i), emitter.vector)) for base in args[:2])
            place = emitter.at(args[2], i)
            for low, high in zip(*pairs, strict=True):
                right = builder.lshr(low, ir.Constant(whole, [16] * emitter.width))
                left = builder.and_(high, ir.Constant(whole, [-0x10000] * emitter.width))
                _stored(builder, builder.or_(right, left), place)
                place = builder.add(place, args[3])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), emit
