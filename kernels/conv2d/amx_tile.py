"""Blocks of sums on AMX tiles: two tiles of the first factor, times one or two of the second."""

from __future__ import annotations

from ..cpu.amx import tile_dot, tile_load, tile_store, tile_zero
from ..cpu.jit import helper

STEP = 16  # pairs of a step, the most that the rows of a tile hold


@helper()
def multiply(state, a, a_too, a_row, a_outer, b, b_row, pairs, outer, c, c_too, c_row, more, wide):
    """Sums of 16 rows at c and 16 more at c_too, of 32 columns where `wide`, else 16; added to what is there if `more`.

    a, a_too: the first factors, rows of pairs, for each of `outer` runs a_outer bytes further; b: the second, rows of
    a pair for all columns, one run after the other. `pairs` of a run are whole steps. All are addresses, strides are bytes.
    """
    if wide:
        if more:
            tile_load(state, 0, c, c_row)
            tile_load(state, 1, c + 64, c_row)
            tile_load(state, 2, c_too, c_row)
            tile_load(state, 3, c_too + 64, c_row)
        else:
            tile_zero(state, 0)
            tile_zero(state, 1)
            tile_zero(state, 2)
            tile_zero(state, 3)
        for o in range(outer):
            for i in range(0, pairs, STEP):
                at, right = o * a_outer + 4 * i, b + (o * pairs + i) * b_row
                tile_load(state, 4, a + at, a_row)
                tile_load(state, 6, right, b_row)
                tile_load(state, 7, right + 64, b_row)
                tile_load(state, 5, a_too + at, a_row)
                tile_dot(state, 0, 4, 6)
                tile_dot(state, 1, 4, 7)
                tile_dot(state, 2, 5, 6)
                tile_dot(state, 3, 5, 7)
        tile_store(state, 0, c, c_row)
        tile_store(state, 1, c + 64, c_row)
        tile_store(state, 2, c_too, c_row)
        tile_store(state, 3, c_too + 64, c_row)
    else:
        if more:
            tile_load(state, 0, c, c_row)
            tile_load(state, 2, c_too, c_row)
        else:
            tile_zero(state, 0)
            tile_zero(state, 2)
        for o in range(outer):
            for i in range(0, pairs, STEP):
                at = o * a_outer + 4 * i
                tile_load(state, 4, a + at, a_row)
                tile_load(state, 6, b + (o * pairs + i) * b_row, b_row)
                tile_load(state, 5, a_too + at, a_row)
                tile_dot(state, 0, 4, 6)
                tile_dot(state, 2, 5, 6)
        tile_store(state, 0, c, c_row)
        tile_store(state, 2, c_too, c_row)
