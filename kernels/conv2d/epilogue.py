"""What follows a convolution in inference, before its output leaves the registers: act(y + b (+ z)).

An epilogue is four arguments of the convolutions in this folder: the bias (K,), of no numbers where nothing follows; z,
which lies like y (y itself where there is none); whether z is added; the floor of what is written, 0 for a ReLU, else
-inf. Register tiles take it in `multiply_then` (direct_tile.py) and `multiply_gathered_then`, Winograd's outputs,
without z, in `outputs_then`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..cpu.microkernel import INT64, Emitter, Tile, literal
from ..cpu.transforms import grid, transformed
from ..memory import to_nhwc
from . import winograd


def epilogue(y, b=None, z=None, relu=False):
    """The four arguments for an output y (N, P, Q, K); z is logically (N, K, P, Q)."""
    bias = np.zeros(0, y.dtype) if b is None else np.array(b)
    floor = y.dtype.type(0 if relu else -np.inf)
    return bias, y if z is None else to_nhwc(z), z is not None, floor


def raised(emitter: Emitter, value: Any, least: Any) -> Any:
    """max(value, least), of vectors in the code that is being emitted; a NaN stays one. Said so, it is x86's vmaxps."""
    above = emitter.builder.fcmp_ordered(">", least, value)
    return emitter.builder.select(above, least, value)


def _finish(tile: Tile, bias: Any, skips: list[Any], add: Any, floor: Any) -> None:
    """The epilogue of a tile's accumulators; skips: the addresses of its rows of z."""
    builder = tile.builder
    with builder.if_then(builder.icmp_signed("!=", bias, ir.Constant(INT64, 0))):
        for v in range(tile.vectors):
            shift = tile.load(tile.at(bias, v * tile.width), tile.vector)
            for row in tile.slots:
                builder.store(builder.fadd(builder.load(row[v]), shift), row[v])
        with builder.if_then(add):
            for skip, row in zip(skips, tile.slots, strict=True):
                for v, slot in enumerate(row):
                    z = tile.load(tile.at(skip, v * tile.width), tile.vector)
                    builder.store(builder.fadd(builder.load(slot), z), slot)
        least = tile.broadcast(floor)
        for row in tile.slots:
            for slot in row:
                builder.store(raised(tile, builder.load(slot), least), slot)


@intrinsic
def multiply_gathered_then(
    typing_context,
    a,
    b,
    targets,
    column,
    steps,
    accumulate,
    ahead,
    bias,
    skip,
    add,
    floor,
    row,
    rows,
    vectors,
    dtype,
):
    """A tile whose rows of A lie `row` numbers apart (a literal: all rows have one address), and of C anywhere, with
    an epilogue.

    targets: where the addresses of the rows of C are; column: the bytes from there to the tile. B: the steps follow
    one another. Adds to C first, where `accumulate`. ahead: from this address on a line of memory is asked for at each
    step, for later; none where it is 0. bias: of what belongs to the tile's first column; nothing follows
    where it is 0. skip: the bytes from C to z. Rows may be the same, if their A is, too: all is read before the first
    is written.
    """
    if not literal(row, rows, vectors):
        return None  # Numba asks again with literal types

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        a, b, targets, column, steps, accumulate, ahead, bias, skip, add, floor = args[:11]
        tile = Tile(builder, rows.literal_value, vectors.literal_value, dtype.dtype)
        places = []
        for i in range(tile.rows):
            target = builder.inttoptr(builder.add(targets, ir.Constant(INT64, 8 * i)), INT64.as_pointer())
            places.append(builder.add(builder.load(target), column))
        # The lines are on their way while the sum is formed: to wait for them at its end cost a tenth of the time.
        lines = [tile.at(place, v * tile.width) for place in places for v in range(tile.vectors)]
        for place in lines:
            tile.prefetch(place, True)
        with builder.if_then(add):
            for place in lines:
                tile.prefetch(builder.add(place, skip), False)
        step, zero, one = (ir.Constant(INT64, n) for n in (tile.vectors * tile.width, 0, 1))
        line = builder.select(builder.icmp_signed("!=", ahead, zero), ir.Constant(INT64, 64), zero)
        near = builder.select(builder.icmp_signed("!=", ahead, zero), ahead, a)

        def ask(k: Any) -> None:
            tile.prefetch(builder.add(near, builder.mul(k, line)), False)

        tile.multiply(a, ir.Constant(INT64, row.literal_value), one, zero, b, step, zero, steps, one, ask)
        with builder.if_then(accumulate):
            tile.add_rows(places)
        _finish(tile, bias, [builder.add(place, skip) for place in places], add, floor)
        tile.write_rows(places)
        return context.get_dummy_value()

    kinds = [*[types.int64] * 5, types.boolean, *[types.int64] * 3, types.boolean, dtype.dtype]
    return types.void(*kinds, row, rows, vectors, dtype), emit


@intrinsic
def outputs_then(
    typing_context,
    source,
    source_row,
    source_col,
    target,
    target_row,
    target_col,
    bottom,
    right,
    scratch,
    channels,
    bias,
    floor,
    dtype,
):
    """Winograd's transform of M into a tile of y (see `transform_2d`), with an epilogue.

    bottom, right: how much of the tile is inside y. scratch: what is outside is written there. bias: the address of
    what belongs to the tile's first channel. Skips are not added here: read tile by tile, a few pixels of many rows,
    they cost more than a pass over y afterwards (0.6 ms against 0.3 for 128x16x32x32).
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, (y, row, col, bottom, right, scratch, channels, bias, floor) = args[:3], args[3:12]
        emitter, zero, patch = Emitter(builder, dtype.dtype), *(ir.Constant(INT64, n) for n in (0, winograd.PATCH))
        least = emitter.broadcast(floor)
        targets = grid(emitter, winograd.TILE, y, row, col, zero, bottom, zero, right, scratch)
        whole = *source, zero, patch, zero, patch, zero
        with transformed(emitter, winograd.OUTPUT, whole, channels) as (c, results):
            shift = emitter.load(emitter.at(bias, c), emitter.vector)
            for row, places in zip(results, targets, strict=True):
                for result, place in zip(row, places, strict=True):
                    emitter.store(raised(emitter, builder.fadd(result, shift), least), emitter.at(place, c))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11, dtype.dtype, dtype), emit
