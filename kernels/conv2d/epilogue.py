"""What follows a convolution in inference, before its output leaves the registers or the cache: act(y + b (+ z)).

An epilogue is four arguments of the convolutions in this folder: the bias (K,), of no numbers where nothing follows; z,
which lies like y (y itself where there is none); whether z is added; the floor of what is written, 0 for a ReLU, else
-inf. Direct tiles take it in `multiply_then` (direct_tile.py), gathered rows in `finish`, Winograd's outputs in
`outputs_then`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..cpu.bfloat16 import bits, computed
from ..cpu.casts import cast
from ..cpu.microkernel import INT64, Emitter
from ..cpu.transforms import transformed
from ..memory import to_nhwc
from .winograd import FORMS


def epilogue(y, b=None, z=None, relu=False):
    """The four arguments for an output y (N, P, Q, K), of uint16 for bfloat16; z is logically (N, K, P, Q). With z
    there is a bias, if only of zeros."""
    dtype = computed(y.dtype)
    bias = np.zeros(0 if z is None else y.shape[3], dtype) if b is None else cast(b, dtype)
    return bias, y if z is None else bits(to_nhwc(z)), z is not None, dtype.type(0 if relu else -np.inf)


def raised(emitter: Emitter, value: Any, least: Any) -> Any:
    """max(value, least), of vectors in the code that is being emitted; a NaN stays one. Said so, it is x86's vmaxps."""
    above = emitter.builder.fcmp_ordered(">", least, value)
    return emitter.builder.select(above, least, value)


@intrinsic
def finish(typing_context, source, bias, skip, add, floor, target, count, dtype):
    """target[i] = max(source[i] + bias[i] (+ skip[i], where `add`), floor) for i < count, a whole number of vectors; a
    copy where bias is 0. All of them are addresses."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, bias, skip, add, floor, target, count = args[:7]
        emitter, zero = Emitter(builder, dtype.dtype), ir.Constant(INT64, 0)
        step, least = ir.Constant(INT64, emitter.width), emitter.broadcast(floor)
        follows = builder.icmp_signed("!=", bias, zero)
        skips, alone = builder.and_(follows, add), builder.and_(follows, builder.not_(add))
        for chosen, terms in (builder.not_(follows), []), (alone, [bias]), (skips, [bias, skip]):
            with (
                builder.if_then(chosen),
                cgutils.for_range_slice(builder, zero, count, step, intp=INT64) as (i, _),
            ):
                value = emitter.load(emitter.at(source, i), emitter.vector)
                for term in terms:
                    value = builder.fadd(value, emitter.load(emitter.at(term, i), emitter.vector))
                emitter.store(raised(emitter, value, least) if terms else value, emitter.at(target, i))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3, types.boolean, dtype.dtype, *[types.int64] * 2, dtype), emit


@intrinsic
def outputs_then(
    typing_context,
    source,
    source_row,
    source_col,
    target,
    target_row,
    target_col,
    channels,
    bias,
    skip,
    add,
    floor,
    sides,
    source_dtype,
    target_dtype,
):
    """Winograd's transform of M into a tile of y (see `transform_2d`), with an epilogue.

    bias: the address of what belongs to the tile's first channel, in the source's dtype; skip: of what is added to its
    first pixel, in a grid like the target.
    """

    matrix = FORMS[sides.count].output

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        target, (bias, skip, add, floor) = args[3], args[7:11]
        reads, writes = (Emitter(builder, dtype.dtype) for dtype in (source_dtype, target_dtype))
        least, further = reads.broadcast(floor), builder.sub(skip, target)
        with builder.if_else(add) as branches:
            for skips, branch in zip((True, False), branches, strict=True):
                with branch, transformed(reads, writes, matrix, *args[:7]) as (c, results):
                    shift = reads.load(reads.at(bias, c), reads.vector)
                    for result, place in results:
                        value = builder.fadd(result, shift)
                        if skips:
                            value = builder.fadd(value, writes.load(builder.add(place, further), writes.vector))
                        writes.store(raised(reads, value, least), place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9, types.boolean, source_dtype.dtype, sides, source_dtype, target_dtype), emit
