"""Pooling on the CPU with a panel of channels in registers: the largest so far and where it lies, or the sum, over a
window.

Backward gathers: each pixel looks at the windows that saw it, and adds the dy of those whose maximum it was, or its
share of each. Nothing is added in 16 bits, and bfloat16 needs no pass to widen it.
"""

from __future__ import annotations

import numpy as np

from ..cpu.bfloat16 import bits
from ..cpu.jit import helper
from ..cpu.parallel import parallel
from ..cpu.transforms import fetch
from ..cpu.vectors import PANEL, load, splat, store, store_as, where
from ..memory import empty_nhwc, to_nhwc
from ..registry import kernel
from .numba_kernels import windows
from .numpy_kernels import divisors
from .problem import AVGPOOL2D_BWD, AVGPOOL2D_FPROP, MAXPOOL2D_BWD, MAXPOOL2D_FPROP, pooled_hw

_DTYPES = ("float32", "bfloat16")


def _fprop_supports(x, **_):
    return x.shape[1] % PANEL == 0


def _bwd_supports(dy, indices, *, dilation, **_):
    return dy.shape[1] % PANEL == 0 and dilation == (1, 1) and indices.dtype == np.int32


@kernel(
    MAXPOOL2D_FPROP,
    device="cpu",
    step=3,
    supports=_fprop_supports,
    dtypes=_DTYPES,
    note="the maximum and where it is stay in registers over a window",
)
def maxpool_fprop_vectors(x, *, kernel, stride, padding, dilation, ceil_mode):
    n, c, *hw = x.shape
    pq = pooled_hw(hw, kernel, stride, padding, dilation, ceil_mode)
    (y, best), (indices, places) = empty_nhwc(n, c, *pq, x.dtype), empty_nhwc(n, c, *pq, np.int32)
    _max_rows(n * pq[0], bits(to_nhwc(x)), bits(best), places, kernel, stride, padding, dilation)
    return y, indices


@parallel()
def _max_rows(row, x, y, places, kernel, stride, padding, dilation):
    n, p = divmod(row, y.shape[1])
    _max_row(x[n], y[n, p], places[n, p], kernel, stride, p * stride[0] - padding[0], padding[1], dilation)


@helper()
def _max_row(x, y, places, kernel, stride, top, left, dilation):
    height, width, channels = x.shape
    least, nowhere = splat(np.float32(-np.inf), PANEL, np.float32), splat(np.int32(-1), PANEL, places.dtype)
    below = top + (kernel[0] - 1) * dilation[0] + 1  # the rows that the next row of windows sees for the first time
    for q in range(y.shape[0]):
        for h in range(below, min(below + stride[0], height)):
            fetch(x.ctypes.data + (h * width + q * stride[1]) * x.strides[1], stride[1] * x.strides[1])
        for c in range(0, channels, PANEL):
            best, place = least, nowhere
            for r in range(kernel[0]):
                h = top + r * dilation[0]
                for s in range(kernel[1]):
                    w = q * stride[1] - left + s * dilation[1]
                    if 0 <= h < height and 0 <= w < width:
                        v = load(x.ctypes.data + ((h * width + w) * channels + c) * x.itemsize, PANEL, x.dtype)
                        wins = (v > best) | (v != v) | (place == nowhere)
                        best = where(wins, v, best)
                        place = where(wins, splat(np.int32(h * width + w), PANEL, places.dtype), place)
            store_as(y.ctypes.data + (q * channels + c) * y.itemsize, best, y.dtype)
            store(places.ctypes.data + (q * channels + c) * 4, place)


@kernel(
    MAXPOOL2D_BWD,
    device="cpu",
    step=3,
    supports=_bwd_supports,
    dtypes=_DTYPES,
    note="each pixel adds up, in registers, the windows whose maximum it was",
)
def maxpool_bwd_vectors(dy, indices, *, kernel, stride, padding, dilation, ceil_mode, input_hw):
    dx, memory = empty_nhwc(*dy.shape[:2], *input_hw, dy.dtype)
    _gather_rows(dx.shape[0] * dx.shape[2], bits(to_nhwc(dy)), to_nhwc(indices), bits(memory), kernel, stride, padding)
    return dx


@parallel()
def _gather_rows(row, dy, places, dx, kernel, stride, padding):
    n, h = divmod(row, dx.shape[1])
    _gather_row(dy[n], places[n], dx[n, h], h, kernel, stride, padding)


@helper()
def _gather_row(dy, places, dx, h, kernel, stride, padding):
    (down, across, channels), width = dy.shape, dx.shape[0]
    zero = splat(np.float32(0), PANEL, np.float32)
    p_first, p_last = windows(h, down, kernel[0], stride[0], padding[0])
    for w in range(width):
        q_first, q_last = windows(w, across, kernel[1], stride[1], padding[1])
        pixel = splat(np.int32(h * width + w), PANEL, places.dtype)
        for c in range(0, channels, PANEL):
            total = zero
            for p in range(p_first, p_last + 1):
                for q in range(q_first, q_last + 1):
                    at = (p * across + q) * channels + c
                    mine = load(places.ctypes.data + at * 4, PANEL, places.dtype) == pixel
                    total = total + where(mine, load(dy.ctypes.data + at * dy.itemsize, PANEL, dy.dtype), zero)
            store_as(dx.ctypes.data + (w * channels + c) * dx.itemsize, total, dx.dtype)


def _average_bwd_supports(dy, **_):
    return dy.shape[1] % PANEL == 0


@kernel(
    AVGPOOL2D_FPROP,
    device="cpu",
    step=3,
    supports=_fprop_supports,
    dtypes=_DTYPES,
    note="the sum stays in registers over a window",
)
def avgpool_fprop_vectors(x, *, kernel, stride, padding, ceil_mode, count_include_pad):
    n, c, *hw = x.shape
    pq = pooled_hw(hw, kernel, stride, padding, (1, 1), ceil_mode)
    y, memory = empty_nhwc(n, c, *pq, x.dtype)
    rows, cols = divisors(hw, pq, kernel, stride, padding, count_include_pad)
    _average_rows(n * pq[0], bits(to_nhwc(x)), bits(memory), rows, cols, kernel, stride, padding)
    return y


@parallel()
def _average_rows(row, x, y, rows, cols, kernel, stride, padding):
    n, p = divmod(row, y.shape[1])
    _average_row(x[n], y[n, p], rows[p], cols, kernel, stride, p * stride[0] - padding[0], padding[1])


@helper()
def _average_row(x, y, rows, cols, kernel, stride, top, left):
    height, width, channels = x.shape
    for q in range(y.shape[0]):
        share = splat(np.float32(1 / (rows * cols[q])), PANEL, np.float32)
        for c in range(0, channels, PANEL):
            total = splat(np.float32(0), PANEL, np.float32)
            for h in range(max(top, 0), min(top + kernel[0], height)):
                for w in range(max(q * stride[1] - left, 0), min(q * stride[1] - left + kernel[1], width)):
                    total = total + load(x.ctypes.data + ((h * width + w) * channels + c) * x.itemsize, PANEL, x.dtype)
            store_as(y.ctypes.data + (q * channels + c) * y.itemsize, total * share, y.dtype)


@kernel(
    AVGPOOL2D_BWD,
    device="cpu",
    step=3,
    supports=_average_bwd_supports,
    dtypes=_DTYPES,
    note="each pixel adds up, in registers, its share of its windows",
)
def avgpool_bwd_vectors(dy, *, kernel, stride, padding, ceil_mode, count_include_pad, input_hw):
    (n, _, *pq), (dx, memory) = dy.shape, empty_nhwc(*dy.shape[:2], *input_hw, dy.dtype)
    rows, cols = divisors(input_hw, pq, kernel, stride, padding, count_include_pad)
    _spread_rows(n * input_hw[0], bits(to_nhwc(dy)), bits(memory), rows, cols, kernel, stride, padding)
    return dx


@parallel()
def _spread_rows(row, dy, dx, rows, cols, kernel, stride, padding):
    n, h = divmod(row, dx.shape[1])
    _spread_row(dy[n], dx[n, h], h, rows, cols, kernel, stride, padding)


@helper()
def _spread_row(dy, dx, h, rows, cols, kernel, stride, padding):
    down, across, channels = dy.shape
    p_first, p_last = windows(h, down, kernel[0], stride[0], padding[0])
    for w in range(dx.shape[0]):
        q_first, q_last = windows(w, across, kernel[1], stride[1], padding[1])
        for c in range(0, channels, PANEL):
            total = splat(np.float32(0), PANEL, np.float32)
            for p in range(p_first, p_last + 1):
                for q in range(q_first, q_last + 1):
                    share = splat(np.float32(1 / (rows[p] * cols[q])), PANEL, np.float32)
                    at = (p * across + q) * channels + c
                    total = total + load(dy.ctypes.data + at * dy.itemsize, PANEL, dy.dtype) * share
            store_as(dx.ctypes.data + (w * channels + c) * dx.itemsize, total, dx.dtype)
