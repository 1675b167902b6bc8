"""The register tile of direct convolutions: products, and what follows, before a tile leaves the registers.

    y[m, k] = act(sum over o, i of A[m, o, i] * B[o, i, k]  (+ bias[k] + z[m, k]))

of float32 and float64; of bfloat16 in pairs, A[m, o, i, 0] * B[o, i, k, 0] + A[m, o, i, 1] * B[o, i, k, 1]. A tile has
two vectors of filters (`tile_rows` says how many pixels), or one. With 32 registers any of these comes near the speed
of the multipliers, from the second-level cache too; 28 sums and two vectors of B just fit, and 14 or 7 pixels divide
the rows of a ResNet's images. The lines that the tile after the next writes, and adds as a skip, are asked for while
this one's products are summed: 1x1 layers from 64 to 256 channels took 1.5 times as long.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..cpu.bfloat16 import load_bfloat16, store_bfloat16
from ..cpu.features import has_bfloat16_products, simd
from ..cpu.jit import helper
from ..cpu.microkernel import INT64, LINE, literal, tile_of
from .epilogue import raised

MOST_ROWS = 16
_MANY_REGISTERS = simd().tile_rows == 12


def tile_rows(pixels: int, vectors: int, in_pairs: bool) -> int:
    """Of how many pixels the tiles of a row of so many pixels are, for panels of one vector or two: least of them idle,
    then the largest."""
    if not _MANY_REGISTERS or (in_pairs and not has_bfloat16_products()):  # widening takes registers, too
        return 8
    if vectors == 1:
        return MOST_ROWS  # as many sums under way
    return min((14, 8, 7), key=lambda rows: (-(-pixels // rows) * rows, -rows))


@intrinsic
def multiply_then(
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
    dtype,
):
    """A tile of which the first `count` rows are written, as `dtype`, y's.

    a, b, y, bias, z: addresses; bias is of the sums' dtype, nothing is added where it is 0; z, which is like y, is read
    where `add` says so. a_row, a_outer: strides of A in numbers, or pairs, whose steps lie side by side; b_outer: that
    of B, whose steps are rows of `vectors` vectors; y_row, z_row: in numbers. floor: the least that is written, 0 for a
    ReLU, else -inf.
    """
    if not literal(rows, vectors):
        return None  # Numba asks again with literal types
    pairs = dtype.dtype == types.uint16  # of bfloat16
    number = types.float32 if pairs else dtype.dtype

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        a, a_row, a_outer, b, b_outer, y, y_row, steps, outer, bias, z, z_row, add, floor, count = args[:15]
        tile = tile_of(builder, rows.literal_value, vectors.literal_value, dtype.dtype)
        size = 2 if pairs else tile.size

        def places(base: Any, row: Any, i: int) -> list[Any]:
            start = builder.add(base, builder.mul(row, ir.Constant(INT64, i * size)))
            return [builder.add(start, ir.Constant(INT64, v * tile.width * size)) for v in range(tile.vectors)]

        def ask(base: Any, row: Any, write: bool) -> None:
            for i in range(2 * tile.rows, 3 * tile.rows):
                for place in places(base, row, i)[:: LINE // (tile.width * size) or 1]:
                    tile.prefetch(place, write)

        ask(y, y_row, True)
        with builder.if_then(add):
            ask(z, z_row, False)
        one, panel = (ir.Constant(INT64, n) for n in (1, tile.vectors * tile.width))
        tile.multiply(a, a_row, one, a_outer, b, panel, b_outer, steps, outer)
        with builder.if_then(builder.icmp_signed("!=", bias, ir.Constant(INT64, 0))):
            for v in range(tile.vectors):
                shift = tile.load(tile.at(bias, v * tile.width), tile.vector)
                for row in tile.slots:
                    builder.store(builder.fadd(builder.load(row[v]), shift), row[v])
        least = tile.broadcast(floor)
        for i, row in enumerate(tile.slots):
            with builder.if_then(builder.icmp_signed("<", ir.Constant(INT64, i), count)):
                with builder.if_then(add):
                    for slot, place in zip(row, places(z, z_row, i), strict=True):
                        skip = load_bfloat16(builder, place, tile.width) if pairs else tile.load(place, tile.vector)
                        builder.store(builder.fadd(builder.load(slot), skip), slot)
                for slot, place in zip(row, places(y, y_row, i), strict=True):
                    value = raised(tile, builder.load(slot), least)
                    if pairs:
                        store_bfloat16(builder, value, place)
                    else:
                        tile.store(value, place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 12, types.boolean, number, types.int64, rows, vectors, dtype), emit


@helper()
def tile(
    rows, vectors, a, a_row, a_outer, b, b_outer, y, y_row, steps, outer, bias, z, z_row, add, floor, count, dtype
):
    """`multiply_then` with so many rows and vectors, as `tile_rows` has it."""
    if vectors == 1:
        if rows == 16:
            multiply_then(
                a, a_row, a_outer, b, b_outer, y, y_row, steps, outer, bias, z, z_row, add, floor, count, 16, 1, dtype
            )  # fmt: skip
        else:
            multiply_then(
                a, a_row, a_outer, b, b_outer, y, y_row, steps, outer, bias, z, z_row, add, floor, count, 8, 1, dtype
            )  # fmt: skip
    elif rows == 8:
        multiply_then(
            a, a_row, a_outer, b, b_outer, y, y_row, steps, outer, bias, z, z_row, add, floor, count, 8, 2, dtype
        )  # fmt: skip
    elif rows == 14:
        multiply_then(
            a, a_row, a_outer, b, b_outer, y, y_row, steps, outer, bias, z, z_row, add, floor, count, 14, 2, dtype
        )  # fmt: skip
    else:
        multiply_then(
            a, a_row, a_outer, b, b_outer, y, y_row, steps, outer, bias, z, z_row, add, floor, count, 7, 2, dtype
        )  # fmt: skip
