"""Pooling on the CPU, channels-last: the inner loop runs over the channels of one pixel, which lie side by side.

fprop is parallel over output rows. Average's backward gathers (each pixel adds up the windows that saw it), so it is
parallel over input rows and writes every number once; max's backward scatters, so it is parallel over images and blocks
of channels, within which the order of additions is fixed.
"""

import numpy as np

from ..cpu.jit import helper
from ..cpu.parallel import parallel
from ..memory import empty_nhwc, to_nhwc
from ..registry import kernel
from .numpy_kernels import divisors
from .problem import AVGPOOL2D_BWD, AVGPOOL2D_FPROP, MAXPOOL2D_BWD, MAXPOOL2D_FPROP, pooled_hw

_CHANNELS = 64  # channels that one task of max's backward scatters


@kernel(MAXPOOL2D_FPROP, device="cpu", step=2, note="vectorised over channels, parallel over output rows")
def maxpool_fprop_rows(x, *, kernel, stride, padding, dilation, ceil_mode):
    (n, c, *hw), x = x.shape, to_nhwc(x)
    pq = pooled_hw(hw, kernel, stride, padding, dilation, ceil_mode)
    (y, best), (indices, where) = empty_nhwc(n, c, *pq, x.dtype), empty_nhwc(n, c, *pq, np.int32)
    _max_rows(best.shape[0] * best.shape[1], x, best, where, kernel, stride, padding, dilation)
    return y, indices


@parallel()
def _max_rows(row, x, y, indices, kernel, stride, padding, dilation):
    _max_row(x, y, indices, kernel, stride, padding, dilation, row)


@helper()
def _max_row(x, y, indices, kernel, stride, padding, dilation, row):
    _, h_size, w_size, channels = x.shape
    n, p = divmod(row, y.shape[1])
    for q in range(y.shape[2]):
        best, where = y[n, p, q], indices[n, p, q]
        for c in range(channels):
            best[c], where[c] = -np.inf, -1
        for r in range(kernel[0]):
            h = p * stride[0] - padding[0] + r * dilation[0]
            if h < 0 or h >= h_size:
                continue
            for s in range(kernel[1]):
                w = q * stride[1] - padding[1] + s * dilation[1]
                if w < 0 or w >= w_size:
                    continue
                value, pixel = x[n, h, w], np.int32(h * w_size + w)
                for c in range(channels):
                    v, b, i = value[c], best[c], where[c]  # loaded first, so that this becomes a vector select
                    wins = (v > b) | (v != v) | (i < 0)
                    best[c] = v if wins else b
                    where[c] = pixel if wins else i


@kernel(MAXPOOL2D_BWD, device="cpu", step=2, note="scatter, parallel over images and blocks of channels")
def maxpool_bwd_images(dy, indices, *, kernel, stride, padding, dilation, ceil_mode, input_hw):
    n, c, _, _ = dy.shape
    dx, memory = empty_nhwc(n, c, *input_hw, dy.dtype)
    pixels = (n, -1, c) if n and c else (n, 0, c)
    _scatter_images(
        n * -(-c // _CHANNELS),
        to_nhwc(dy).reshape(pixels),
        to_nhwc(indices).reshape(pixels),
        memory.reshape(pixels),
    )
    return dx


@parallel()
def _scatter_images(task, dy, indices, dx):
    blocks = (dx.shape[2] + _CHANNELS - 1) // _CHANNELS
    n, block = divmod(task, blocks)
    first = block * _CHANNELS
    _scatter_image(dy[n], indices[n], dx[n], first, min(first + _CHANNELS, dx.shape[2]))


@helper()
def _scatter_image(dy, indices, dx, first, stop):
    for pixel in range(dx.shape[0]):
        for c in range(first, stop):
            dx[pixel, c] = 0
    for output in range(dy.shape[0]):
        for c in range(first, stop):
            if indices[output, c] >= 0:
                dx[indices[output, c], c] += dy[output, c]


@kernel(AVGPOOL2D_FPROP, device="cpu", step=2, note="vectorised over channels, parallel over output rows")
def avgpool_fprop_rows(x, *, kernel, stride, padding, ceil_mode, count_include_pad):
    (n, c, *hw), x = x.shape, to_nhwc(x)
    pq = pooled_hw(hw, kernel, stride, padding, (1, 1), ceil_mode)
    y, memory = empty_nhwc(n, c, *pq, x.dtype)
    rows, cols = divisors(hw, pq, kernel, stride, padding, count_include_pad)
    _average_rows(memory.shape[0] * memory.shape[1], x, memory, rows, cols, kernel, stride, padding)
    return y


@parallel()
def _average_rows(row, x, y, rows, cols, kernel, stride, padding):
    _average_row(x, y, rows, cols, kernel, stride, padding, row)


@helper()
def _average_row(x, y, rows, cols, kernel, stride, padding, row):
    _, h_size, w_size, channels = x.shape
    n, p = divmod(row, y.shape[1])
    top = p * stride[0] - padding[0]
    for q in range(y.shape[2]):
        left = q * stride[1] - padding[1]
        total = y[n, p, q]
        for c in range(channels):
            total[c] = 0
        for h in range(max(top, 0), min(top + kernel[0], h_size)):
            for w in range(max(left, 0), min(left + kernel[1], w_size)):
                value = x[n, h, w]
                for c in range(channels):
                    total[c] += value[c]
        count = y.dtype.type(rows[p] * cols[q])
        for c in range(channels):
            total[c] /= count


@kernel(AVGPOOL2D_BWD, device="cpu", step=2, note="each pixel gathers its windows, parallel over input rows")
def avgpool_bwd_rows(dy, *, kernel, stride, padding, ceil_mode, count_include_pad, input_hw):
    (n, c, *pq), dy = dy.shape, to_nhwc(dy)
    dx, memory = empty_nhwc(n, c, *input_hw, dy.dtype)
    rows, cols = divisors(input_hw, pq, kernel, stride, padding, count_include_pad)
    _spread_rows(memory.shape[0] * memory.shape[1], dy, memory, rows, cols, kernel, stride, padding)
    return dx


@parallel()
def _spread_rows(row, dy, dx, rows, cols, kernel, stride, padding):
    _spread_row(dy, dx, rows, cols, kernel, stride, padding, row)


@helper()
def _spread_row(dy, dx, rows, cols, kernel, stride, padding, row):
    _, p_size, q_size, channels = dy.shape
    n, h = divmod(row, dx.shape[1])
    # The windows that saw row h start at p*u - a in (h - R, h].
    p_first, p_last = windows(h, p_size, kernel[0], stride[0], padding[0])
    for w in range(dx.shape[2]):
        q_first, q_last = windows(w, q_size, kernel[1], stride[1], padding[1])
        total = dx[n, h, w]
        for c in range(channels):
            total[c] = 0
        for p in range(p_first, p_last + 1):
            for q in range(q_first, q_last + 1):
                share, count = dy[n, p, q], dx.dtype.type(rows[p] * cols[q])
                for c in range(channels):
                    total[c] += share[c] / count


@helper(inline=True)
def windows(pixel, size, taps, stride, padding):
    """The first and the last window along an axis that saw a pixel."""
    return max(0, (pixel + padding - taps) // stride + 1), min(size - 1, (pixel + padding) // stride)
