"""Winograd convolution on the CPU, forward and data gradient (the arithmetic is in `winograd.py`).

    V[e, t, c]  the patches of x, transformed         e: one of the 36 places of a patch, t: a tile of 4x4 outputs
    U[e, c, k]  the filters, transformed
    M[e, t, k] = sum over c of V[e, t, c] * U[e, c, k]        36 products of matrices, by the register tile
    y           M transformed back, 4x4 outputs for each tile

Transforms go over channels, in vectors. Two orders, by how many filters there are:

    by tiles    few channels, large images: all of U is made first; each thread takes a block of tiles, and its V and M
                stay in the second-level cache from x to y
    by filters  many channels, small images, where U is larger than any cache: all of V is made first; each thread
                takes a panel of filters, and makes the part of U that it needs next
"""

from __future__ import annotations

import numpy as np
from numba import prange

from ..cpu.features import simd
from ..cpu.jit import njit
from ..cpu.microkernel import lanes, multiply_tile
from ..cpu.transforms import transform_2d
from ..memory import empty_nhwc, to_nhwc
from ..registry import kernel
from . import winograd
from .problem import CONV2D_DGRAD, CONV2D_FPROP, out_hw

PLACES = winograd.PATCH**2
INPUT, FILTER, OUTPUT, UPSTREAM, GRADIENT = range(5)
transform = transform_2d((winograd.INPUT, winograd.FILTER, winograd.OUTPUT, winograd.UPSTREAM, winograd.GRADIENT))
_TILE, _PATCH, _TAPS = winograd.TILE, winograd.PATCH, winograd.TAPS
_VECTOR_BYTES, _LINE = simd().vector_bytes, 64
_CACHE_BYTES = 1 << 20  # what V and M of a block of tiles may take
_BY_FILTERS = 3 << 14  # C * K from which U is made in parts
_CHUNK = 64  # channels of such a part


def fprop_supports(x, w, *, stride, padding, dilation, groups):
    return winograd.supports(w.shape[2:], stride, dilation, groups)


def _dgrad_supports(dy, w, *, stride, padding, dilation, groups, input_hw):
    return winograd.supports(w.shape[2:], stride, dilation, groups)


@kernel(
    CONV2D_FPROP,
    device="cpu",
    step=5,
    supports=fprop_supports,
    error_scale=winograd.fprop_scale,
    error_factor=4.0,  # the scale is generous: what is seen stays below 1
    exact=False,
    note="Winograd F(4x4, 3x3): a quarter of the products",
)
def fprop_winograd(x, w, *, stride, padding, dilation, groups):
    return convolve(x, w, padding, out_hw(x.shape[2:], w.shape[2:], stride, padding, dilation))


@kernel(
    CONV2D_DGRAD,
    device="cpu",
    step=5,
    supports=_dgrad_supports,
    error_scale=winograd.dgrad_scale,
    error_factor=4.0,  # the scale is generous: what is seen stays below 1
    exact=False,
    note="Winograd F(4x4, 3x3) over dy, the filter turned round",
)
def dgrad_winograd(dy, w, *, stride, padding, dilation, groups, input_hw):
    turned = w.swapaxes(0, 1)[:, :, ::-1, ::-1]
    return convolve(dy, turned, (_TAPS - 1 - padding[0], _TAPS - 1 - padding[1]), input_hw)


def convolve(x, w, padding, hw):
    """x (N, C, H, W), w (K, C, 3, 3) -> (N, K, *hw). Negative padding leaves out what is at the border."""
    dtype, k = x.dtype, w.shape[0]
    x, w = with_whole_vectors(to_nhwc(x), 3), with_whole_vectors(with_whole_vectors(w, 0), 1)
    (n, _, _, c), wide = x.shape, w.shape[0]
    y, memory = empty_nhwc(n, wide, *hw, dtype)
    width = panel_width(wide, dtype)
    tiles = n * winograd.tiles_of(hw[0]) * winograd.tiles_of(hw[1])
    if c * wide < _BY_FILTERS:
        block = max(16, min(128, _CACHE_BYTES // (PLACES * (c + width) * dtype.itemsize) // 16 * 16))
        panels = np.empty((wide // width, PLACES, c, width), dtype)
        _transform_filters(w, panels)
        _by_tiles(x, panels, memory, padding, tiles, block)
    else:
        block = 64
        v = np.empty((PLACES, plane(tiles, c)), dtype)
        _transform_patches(x, v, memory, padding, tiles)
        _by_filters(w, v, memory, tiles, block, width)
    return y if wide == k else y[:, :k]


def panel_width(k, dtype):
    """Channels of a panel of filters: two vectors where they divide k, else one."""
    return lanes(dtype) * (2 if k % (2 * lanes(dtype)) == 0 else 1)


def with_whole_vectors(a, axis):
    """`a`, with zeros up to a whole number of vectors along an axis."""
    missing = -a.shape[axis] % lanes(a.dtype)
    if not missing:
        return a
    return np.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)])


def plane(tiles, channels):
    """Numbers between the planes of V: no multiple of 4096 bytes, where all 36 would meet in the same cache sets."""
    return -(-tiles // 16) * 16 * channels + 16


@njit(inline=True)
def aligned(n, like):
    """n uninitialised numbers of the dtype of `like`, from the start of a cache line."""
    numbers = _LINE // like.itemsize
    memory = np.empty(n + numbers, like.dtype)
    first = (-memory.ctypes.data % _LINE) // like.itemsize
    return memory[first : first + n]


@njit(parallel=True)
def _transform_filters(w, panels):
    for j in prange(panels.shape[0]):
        _filters(w, np.int64(j) * panels.shape[3], 0, panels[j])


@njit()
def _filters(w, first_k, first_c, panel):
    """panel (36, C', width) = the filters from first_k on, their channels from first_c on."""
    _, c, width = panel.shape
    taps = np.empty((_TAPS, _TAPS, width), w.dtype)
    for i in range(c):
        for l in range(width):
            for r in range(_TAPS):
                for s in range(_TAPS):
                    taps[r, s, l] = w[first_k + l, first_c + i, r, s]
        transform(
            taps.ctypes.data, _TAPS * width, width, 0, _TAPS, 0, _TAPS, 0,
            panel.ctypes.data + i * width * w.itemsize, _PATCH * c * width, c * width, 0, _PATCH, 0, _PATCH, 0,
            width, FILTER, w.dtype,
        )  # fmt: skip


@njit()
def patches(x, v, v_plane, padding, p, q, first, count):
    """V for the tiles from `first` on."""
    _, h, w, c = x.shape
    down, across = (p + _TILE - 1) // _TILE, (q + _TILE - 1) // _TILE
    zeros = np.zeros(c, x.dtype)
    for t in range(count):
        n, at = divmod(first + t, down * across)
        top, left = at // across * _TILE - padding[0], at % across * _TILE - padding[1]
        transform(
            x.ctypes.data + ((n * h + top) * w + left) * c * x.itemsize, w * c, c, -top, h - top, -left, w - left,
            zeros.ctypes.data,
            v + t * c * x.itemsize, _PATCH * v_plane, v_plane, 0, _PATCH, 0, _PATCH, 0,
            c, INPUT, x.dtype,
        )  # fmt: skip


@njit()
def _outputs(m, m_plane, y, channel, width, first, count):
    """y, from M for the tiles from `first` on and the filters from `channel` on."""
    _, p, q, k = y.shape
    down, across = (p + _TILE - 1) // _TILE, (q + _TILE - 1) // _TILE
    scratch = np.empty(width, y.dtype)
    for t in range(count):
        n, at = divmod(first + t, down * across)
        top, left = at // across * _TILE, at % across * _TILE
        transform(
            m + t * width * y.itemsize, _PATCH * m_plane, m_plane, 0, _PATCH, 0, _PATCH, 0,
            y.ctypes.data + (((n * p + top) * q + left) * k + channel) * y.itemsize, q * k, k,
            0, p - top, 0, q - left, scratch.ctypes.data,
            width, OUTPUT, y.dtype,
        )  # fmt: skip


@njit()
def _products(v, v_plane, v_row, panel, m, m_plane, count, accumulate):
    """M (+)= V U for `count` tiles and one panel of filters; whole register tiles, so M has room for 15 rows more."""
    _, c, width = panel.shape
    for e in range(PLACES):
        u = panel.ctypes.data + e * c * width * panel.itemsize
        a, out = v + e * v_plane * panel.itemsize, m + e * m_plane * panel.itemsize
        if width * panel.itemsize > _VECTOR_BYTES:
            for t in range(0, count, 8):
                multiply_tile(
                    a + t * v_row * panel.itemsize, v_row, 1, u, width,
                    out + t * width * panel.itemsize, width, c, accumulate, 8, 2, panel.dtype,
                )  # fmt: skip
        else:
            for t in range(0, count, 16):
                multiply_tile(
                    a + t * v_row * panel.itemsize, v_row, 1, u, width,
                    out + t * width * panel.itemsize, width, c, accumulate, 16, 1, panel.dtype,
                )  # fmt: skip


@njit(parallel=True)
def _by_tiles(x, panels, y, padding, tiles, block):
    for b in prange((tiles + block - 1) // block):
        first = np.int64(b) * block
        _tile_block(x, panels, y, padding, first, min(block, tiles - first))


@njit()
def _tile_block(x, panels, y, padding, first, count):
    n_panels, _, c, width = panels.shape
    room = (count + 15) // 16 * 16
    v_plane, m_plane = room * c + 16, room * width + 16
    v, m = aligned(PLACES * v_plane, x), aligned(PLACES * m_plane, x)
    patches(x, v.ctypes.data, v_plane, padding, y.shape[1], y.shape[2], first, count)
    for j in range(n_panels):
        _products(v.ctypes.data, v_plane, c, panels[j], m.ctypes.data, m_plane, count, False)
        _outputs(m.ctypes.data, m_plane, y, j * width, width, first, count)


@njit(parallel=True)
def _transform_patches(x, v, y, padding, tiles):
    for b in prange((tiles + 7) // 8):
        first = np.int64(b) * 8
        at = v.ctypes.data + first * x.shape[3] * x.itemsize
        patches(x, at, v.shape[1], padding, y.shape[1], y.shape[2], first, min(8, tiles - first))


@njit(parallel=True)
def _by_filters(w, v, y, tiles, block, width):
    blocks = (tiles + block - 1) // block
    for task in prange(w.shape[0] // width * blocks):
        j, b = divmod(np.int64(task), blocks)
        _filter_panel(w, v, y, j * width, width, b * block, min(block, tiles - b * block))


@njit()
def _filter_panel(w, v, y, channel, width, first, count):
    c = w.shape[1]
    m_plane = (count + 15) // 16 * 16 * width + 16
    u, m = aligned(PLACES * _CHUNK * width, v), aligned(PLACES * m_plane, v)
    for start in range(0, c, _CHUNK):
        n = min(_CHUNK, c - start)
        panel = u[: PLACES * n * width].reshape(PLACES, n, width)
        _filters(w, channel, start, panel)
        at = v.ctypes.data + (first * c + start) * v.itemsize
        _products(at, v.shape[1], c, panel, m.ctypes.data, m_plane, count, start > 0)
    _outputs(m.ctypes.data, m_plane, y, channel, width, first, count)
