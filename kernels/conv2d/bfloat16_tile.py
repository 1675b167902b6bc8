"""The register tile of bfloat16 convolutions: products of pairs, and what follows, before a tile leaves the registers.

    y[m, k] = act(sum over o, i of A[m, o, i, 0] * B[o, i, k, 0] + A[m, o, i, 1] * B[o, i, k, 1]  (+ bias[k] + z[m, k]))

A tile has two vectors of filters (`tile_rows` says how many pixels), or one. Where one instruction multiplies pairs,
any of these reaches the speed of the multipliers, from the second-level cache too; 28 sums and two vectors of B just
fit into 32 registers, and 14 or 7 pixels divide the rows of a ResNet's images. The lines of the next tile's output and
skip are asked for while this one's products are summed: 1x1 layers from 64 to 256 channels took 1.5 times as long.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..cpu.bfloat16 import load_bfloat16, store_bfloat16
from ..cpu.features import has_bfloat16_products
from ..cpu.jit import helper
from ..cpu.microkernel import INT64, PairTile, lanes, literal
from .epilogue import raised

LANES = lanes(np.float32)
MOST_ROWS = 16
_NARROW_ROWS = 16  # of a tile of one vector: as many sums under way
_CHOICES = (14, 8, 7) if has_bfloat16_products() else (8,)  # widening takes registers, and so do narrower vectors


def tile_rows(pixels: int, width: int) -> int:
    """Of how many pixels the tiles of a row of so many pixels are, for panels of `width` filters: least of them idle,
    then the largest."""
    if width == LANES:
        return _NARROW_ROWS
    return min(_CHOICES, key=lambda rows: (-(-pixels // rows) * rows, -rows))


@intrinsic
def multiply_pairs_then(
    typing_context,
    a,
    a_row,
    a_outer,
    b,
    b_outer,
    y,
    y_row,
    steps,
    outer,
    bias,
    z,
    z_row,
    add,
    floor,
    count,
    rows,
    vectors,
):
    """A tile of which the first `count` rows are written, rounded to bfloat16.

    a, b, y, bias, z: addresses; bias is float32, nothing is added where it is 0; z, bfloat16, is read where `add` says
    so. a_row, a_outer: strides of A in pairs, whose steps lie side by side; b_outer: that of B, whose steps are rows of
    `vectors` vectors; y_row, z_row: in numbers. floor: the least that is written, 0 for a ReLU, else -inf.
    """
    if not literal(rows, vectors):
        return None  # Numba asks again with literal types

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        a, a_row, a_outer, b, b_outer, y, y_row, steps, outer, bias, z, z_row, add, floor, count = args[:15]
        tile = PairTile(builder, rows.literal_value, vectors.literal_value, types.float32)
        one, panel = (ir.Constant(INT64, n) for n in (1, tile.vectors * tile.width))
        for i in range(2 * tile.rows, 3 * tile.rows):
            tile.prefetch(_places(tile, y, y_row, ir.Constant(INT64, i))[0], True)
        with builder.if_then(add):
            for i in range(2 * tile.rows, 3 * tile.rows):
                tile.prefetch(_places(tile, z, z_row, ir.Constant(INT64, i))[0], False)
        tile.multiply(a, a_row, one, a_outer, b, panel, b_outer, steps, outer)
        with builder.if_then(builder.icmp_signed("!=", bias, ir.Constant(INT64, 0))):
            for v in range(tile.vectors):
                shift = tile.load(tile.at(bias, v * tile.width), tile.vector)
                for row in tile.slots:
                    builder.store(builder.fadd(builder.load(row[v]), shift), row[v])
        least = tile.broadcast(floor)
        for i, row in enumerate(tile.slots):
            index = ir.Constant(INT64, i)
            with builder.if_then(builder.icmp_signed("<", index, count)):
                with builder.if_then(add):
                    for slot, place in zip(row, _places(tile, z, z_row, index), strict=True):
                        skip = load_bfloat16(builder, place, tile.width)
                        builder.store(builder.fadd(builder.load(slot), skip), slot)
                for slot, place in zip(row, _places(tile, y, y_row, index), strict=True):
                    store_bfloat16(builder, raised(tile, builder.load(slot), least), place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 12, types.boolean, types.float32, types.int64, rows, vectors), emit


def _places(tile: PairTile, base: Any, row: Any, index: Any) -> list[Any]:
    """Addresses of a row's vectors in memory of bfloat16."""
    builder, size = tile.builder, ir.Constant(INT64, 2)
    start = builder.add(base, builder.mul(builder.mul(row, index), size))
    return [builder.add(start, ir.Constant(INT64, v * tile.width * 2)) for v in range(tile.vectors)]


@helper()
def tile(rows, a, a_row, a_outer, b, b_outer, y, y_row, steps, outer, bias, z, z_row, add, floor, count):
    """`multiply_pairs_then` with so many rows; see `tile_rows`."""
    if rows == 16:
        multiply_pairs_then(
            a, a_row, a_outer, b, b_outer, y, y_row, steps, outer, bias, z, z_row, add, floor, count, 16, 1
        )  # fmt: skip
    elif rows == 8:
        multiply_pairs_then(
            a, a_row, a_outer, b, b_outer, y, y_row, steps, outer, bias, z, z_row, add, floor, count, 8, 2
        )  # fmt: skip
    elif rows == 14:
        multiply_pairs_then(
            a, a_row, a_outer, b, b_outer, y, y_row, steps, outer, bias, z, z_row, add, floor, count, 14, 2
        )  # fmt: skip
    else:
        multiply_pairs_then(
            a, a_row, a_outer, b, b_outer, y, y_row, steps, outer, bias, z, z_row, add, floor, count, 7, 2
        )  # fmt: skip
