"""Winograd weight gradient on the CPU: the adjoint of `winograd_kernels.py`, with its V and its two orders.

D[e, t, k]  tiles of dy, transformed
dU[e, c, k] = sum over t of V[e, t, c] * D[e, t, k]
dw          dU transformed back

by tiles    few channels: each share of the tiles has a dU of its own, to which it adds block after block of them;
            the shares are summed at the end
by filters  many channels: all of V and D is made first; each thread takes a panel of filters and some channels,
            and its dU stays in the cache until it is dw
"""

from __future__ import annotations

import numpy as np

from ..cpu.bfloat16 import bits, computed
from ..cpu.casts import cast
from ..cpu.features import simd
from ..cpu.jit import helper
from ..cpu.microkernel import lines_of, multiply_fetching, multiply_tile
from ..cpu.parallel import parallel
from ..memory import contiguous, empty, to_nhwc, zeros
from .packing import add_transposed, aligned, panel_width
from .problem import CONV2D_WGRAD
from .winograd import F2, F4, TAPS, supports
from .winograd_kernels import (
    GRADIENT,
    UPSTREAM,
    corner,
    fetch_tile,
    patches,
    plane,
    rank_of,
    seen,
    tiles_of_block,
    transform,
    winograd_kernel,
    with_whole_vectors,
)

_VECTOR_BYTES = simd().vector_bytes
_BY_FILTERS = 1 << 15  # C * K from which there is one dU
_BLOCK_BYTES = 3 << 20  # of V and D of a block: more than the cache, as dU is read and written once per block
_SHARES = 1 << 20  # numbers that the shares' dU may take, but at least four of them
_CHUNK = 64  # channels of a dU that stays in the cache
_AT_ONCE = 1 << 23  # numbers of V and D that are made at once


def _supports(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    return supports(kernel_hw, stride, dilation, groups) and x.size > 0 and dy.size > 0


def _rank(form):
    return lambda x, dy, **_: rank_of(form, dy.shape[1], x.shape[1], dy.shape[2:], x.dtype)


@winograd_kernel(
    CONV2D_WGRAD,
    supports=_supports,
    rank=_rank(F4),
    error_scale=F4.wgrad_scale,
    note="Winograd F(4x4, 3x3), its adjoint: a quarter of the products",
)
def wgrad_winograd(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    return _correlate(F4, x, dy, padding)


@winograd_kernel(
    CONV2D_WGRAD,
    supports=_supports,
    rank=_rank(F2),
    error_scale=F2.wgrad_scale,
    note="Winograd F(2x2, 3x3), its adjoint, for the smallest images",
)
def wgrad_winograd_2x2(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    return _correlate(F2, x, dy, padding)


def _correlate(form, x, dy, padding):
    (k, c), given, dtype = (dy.shape[1], x.shape[1]), x.dtype, computed(x.dtype)
    x, dy = bits(with_whole_vectors(to_nhwc(x), 3)), bits(with_whole_vectors(to_nhwc(dy), 3))
    (n, p, q, wide), deep = dy.shape, x.shape[3]
    tiles, width, sides = n * form.tiles_of(p) * form.tiles_of(q), panel_width(wide, dtype), form.sides
    places = form.patch**2
    dw = zeros((wide, deep, TAPS, TAPS), dtype)
    if deep * wide < _BY_FILTERS:
        # Shared out by shape alone, never by threads: the same bits on any machine.
        most = max(4, min(16, _SHARES // (places * deep * wide)))
        block = min(tiles_of_block(form, deep + wide, dtype, _BLOCK_BYTES), max(16, -(-tiles // most) // 16 * 16))
        blocks = -(-tiles // block)
        shares = min(blocks, most)
        du = empty((shares, places, plane(deep, wide)), dtype)
        _by_tiles(len(du), x, dy, du, padding, tiles, block, width, sides)
        _sum_shares(places, du, deep * wide)
        _write_panels(len(dw) // width, du, dw, width, sides)
    else:
        at_once = max(16, _AT_ONCE // (places * (deep + wide)) // 16 * 16)
        v, d = (empty((places, plane(min(tiles, at_once), channels)), dtype) for channels in (deep, wide))
        for first in range(0, tiles, at_once):
            count = min(at_once, tiles - first)
            _transform_both(-(-count // 8), x, dy, v, d, padding, first, count, sides)
            _by_filters(len(dw) // width * -(-dw.shape[1] // _CHUNK), v, d, dw, count, width, sides)
    dw = dw if (k, c) == (wide, deep) else contiguous(dw[:k, :c])
    return dw if dtype == given else cast(dw, given)


@helper()
def _upstream(dy, d, d_plane, first, count, sides, like):
    """D, in the dtype of `like`, for the tiles from `first` on."""
    (_, p, q, k), patch, tile = dy.shape, len(sides), len(sides) - TAPS + 1
    down, across = (p + tile - 1) // tile, (q + tile - 1) // tile
    border, zeros = aligned(tile * tile * k, dy), np.zeros(k, dy.dtype)
    for t in range(first, first + count):
        fetch_tile(dy, t, down, across, tile, 0, 0, 0, k)
        n, top, left = corner(t, down, across, tile)
        source, row, column = seen(dy, n, top, left, tile, 0, k, zeros, border)
        transform(
            source, row, column, d + (t - first) * k * like.itemsize, patch * d_plane, d_plane,
            k, UPSTREAM, sides, dy.dtype, like.dtype,
        )  # fmt: skip


@helper()
def _products(
    v, v_plane, v_row, d, d_plane, d_row, du, du_plane, rows, columns, width, count, accumulate, asks, sides, like
):
    """dU (+)= V' D for `count` tiles: `rows` channels, in whole register tiles, by panels of `columns` filters.

    asks: whether tiles ask for what the next place needs; for one panel, or each would ask for the same.
    """
    size = like.itemsize
    for e in range(len(sides) ** 2):
        next_v, next_d = v + (e + 1) * v_plane * size, d + (e + 1) * d_plane * size
        for j in range(0, columns, width):
            b = d + (e * d_plane + j) * size
            for i in range(0, rows, 16):
                a, out = v + (e * v_plane + i) * size, du + (e * du_plane + i * columns + j) * size
                if width * size > _VECTOR_BYTES:
                    for half in range(0, 16, 8):
                        ahead, run, apart = np.int64(0), np.int64(0), np.int64(0)
                        if asks:
                            ahead, run, apart = _coming(
                                next_v, v_row * size, rows * size, next_d, d_row * size, width * size, count, i + half
                            )  # fmt: skip
                        multiply_fetching(
                            a + half * size, 1, v_row, b, d_row, out + half * columns * size, columns, count,
                            accumulate, ahead, run, apart, 8, 2, like.dtype,
                        )  # fmt: skip
                else:
                    multiply_tile(a, 1, v_row, b, d_row, out, columns, count, accumulate, 16, 1, like.dtype)


@helper(inline=True)
def _coming(v, v_row, v_bytes, d, d_row, d_bytes, count, i):
    """What the tile with the channels from i on asks for (`ahead`, `run`, `apart` of `multiply_fetching`).

    A tile has time for as many lines as there are steps, so the first ones take `count` rows of V between them, the
    next ones those of D. *_row: bytes between rows, *_bytes: of a row.
    """
    tile, v_run, d_run = i // 8, lines_of(v_bytes), lines_of(d_bytes)
    if tile < 1 << v_run:
        return v + tile * (count >> v_run) * v_row, v_run, v_row
    tile -= 1 << v_run
    if tile < 1 << d_run:
        return d + tile * (count >> d_run) * d_row, d_run, d_row
    return 0, 0, 0


@helper()
def _write(du, start, du_plane, du_row, channels, width, dw, first_k, first_c, sides):
    """Add dU, from its number `start` on and transformed back, to dw (K, C, 3, 3)."""
    n, c, patch = TAPS * TAPS, dw.shape[1], len(sides)
    taps = aligned(channels * n * width, dw)
    for i in range(channels):
        transform(
            du.ctypes.data + (start + i * du_row) * dw.itemsize, patch * du_plane, du_plane,
            taps.ctypes.data + i * n * width * dw.itemsize, TAPS * width, width,
            width, GRADIENT, sides, dw.dtype, dw.dtype,
        )  # fmt: skip
    add_transposed(taps, channels * n, width, dw, (first_k * c + first_c) * n, c * n)


@parallel()
def _by_tiles(t, x, dy, du, padding, tiles, block, width, sides):
    shares, blocks = du.shape[0], (tiles + block - 1) // block
    first, last = blocks * t // shares, blocks * (t + 1) // shares
    _share(x, dy, du[t], padding, tiles, block, first, last, width, sides)


@helper()
def _share(x, dy, du, padding, tiles, block, first, last, width, sides):
    c, k, places = x.shape[3], dy.shape[3], len(sides) ** 2
    v_plane, d_plane = plane(block, c), plane(block, k)
    v, d = aligned(places * v_plane, du), aligned(places * d_plane, du)
    for b in range(first, last):
        count = min(block, tiles - b * block)
        patches(x, v.ctypes.data, v_plane, padding, dy.shape[1], dy.shape[2], b * block, count, sides, v)
        _upstream(dy, d.ctypes.data, d_plane, b * block, count, sides, d)
        _products(
            v.ctypes.data, v_plane, c, d.ctypes.data, d_plane, k, du.ctypes.data, du.shape[1], c, k, width, count,
            b > first, False, sides, v,
        )  # fmt: skip


@parallel()
def _sum_shares(e, du, count):
    for s in range(1, du.shape[0]):
        _add(du[0, e, :count], du[s, e, :count])


@helper()
def _add(total, share):
    total += share


@parallel()
def _write_panels(j, du, dw, width, sides):
    k, c = dw.shape[:2]
    first = j * width
    _write(du.reshape(-1), first, du.shape[2], k, c, width, dw, first, 0, sides)


@parallel()
def _transform_both(b, x, dy, v, d, padding, first, count, sides):
    start = b * 8
    n = min(8, count - start)
    at, to = start * x.shape[3] * v.itemsize, start * dy.shape[3] * d.itemsize
    patches(x, v.ctypes.data + at, v.shape[1], padding, dy.shape[1], dy.shape[2], first + start, n, sides, v)
    _upstream(dy, d.ctypes.data + to, d.shape[1], first + start, n, sides, d)


@parallel()
def _by_filters(task, v, d, dw, count, width, sides):
    chunks = (dw.shape[1] + _CHUNK - 1) // _CHUNK
    j, i = divmod(task, chunks)
    _chunk(v, d, dw, j * width, width, i * _CHUNK, count, sides)


@helper()
def _chunk(v, d, dw, first_k, width, first_c, count, sides):
    k, c = dw.shape[:2]
    n = min(_CHUNK, c - first_c)
    du_plane, size = plane(n, width), v.itemsize
    du = aligned(len(sides) ** 2 * du_plane, v)
    _products(
        v.ctypes.data + first_c * size, v.shape[1], c, d.ctypes.data + first_k * size, d.shape[1], k,
        du.ctypes.data, du_plane, n, width, width, count, False, True, sides, v,
    )  # fmt: skip
    _write(du, 0, du_plane, width, n, width, dw, first_k, first_c, sides)
