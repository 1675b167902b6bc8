"""Pooling in plain NumPy: the definitions, then one strided slice per tap instead of one step per window."""

import numpy as np

from ..memory import empty_nhwc, to_nhwc
from ..registry import kernel
from ..widened import widened
from .problem import (
    AVGPOOL2D_BWD,
    AVGPOOL2D_FPROP,
    MAXPOOL2D_BWD,
    MAXPOOL2D_FPROP,
    avgpool_bwd_reference,
    avgpool_fprop_reference,
    maxpool_bwd_reference,
    maxpool_fprop_reference,
    pooled_hw,
)

kernel(MAXPOOL2D_FPROP, device="cpu", step=0, note="the definition, window by window", dtypes=("any",))(
    maxpool_fprop_reference
)
kernel(MAXPOOL2D_BWD, device="cpu", step=0, note="the definition: each dy to its maximum", dtypes=("any",))(
    maxpool_bwd_reference
)
kernel(AVGPOOL2D_FPROP, device="cpu", step=0, note="the definition, window by window", dtypes=("any",))(
    avgpool_fprop_reference
)
kernel(AVGPOOL2D_BWD, device="cpu", step=0, note="the definition: each window spreads its dy", dtypes=("any",))(
    avgpool_bwd_reference
)


def _seen(tap, size, n, stride, padding, dilation):
    """Of one axis: the outputs whose tap falls on a pixel, as a slice, and those pixels, as a slice."""
    offset = tap * dilation - padding
    first = max(0, -(offset // stride))
    last = min(size - 1, (n - 1 - offset) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    return slice(first, last + 1), slice(first * stride + offset, last * stride + offset + 1, stride)


def _taps(pq, hw, kernel, stride, padding, dilation):
    """Per tap: where in the output it is seen, and which pixels it sees (indices into (N, H, W, C) arrays)."""
    for r in range(kernel[0]):
        p, h = _seen(r, pq[0], hw[0], stride[0], padding[0], dilation[0])
        for s in range(kernel[1]):
            q, w = _seen(s, pq[1], hw[1], stride[1], padding[1], dilation[1])
            yield np.s_[:, p, q], np.s_[:, h, w]


def divisors(hw, pq, kernel, stride, padding, count_include_pad):
    """By how much the sum of each window is divided, as one vector per axis: their outer product is the table."""
    counts = []
    for n, size, taps, u, a in zip(hw, pq, kernel, stride, padding, strict=True):
        start = np.arange(size) * u - a
        stop = np.minimum(start + taps, n + a)
        if not count_include_pad:
            start, stop = np.maximum(start, 0), np.minimum(stop, n)
        counts.append(np.maximum(stop - start, 1))
    return counts


@kernel(MAXPOOL2D_FPROP, device="cpu", step=1, note="tap by tap over strided slices", dtypes=("any",))
def maxpool_fprop_taps(x, *, kernel, stride, padding, dilation, ceil_mode):
    (n, c, *hw), pq = x.shape, pooled_hw(x.shape[2:], kernel, stride, padding, dilation, ceil_mode)
    (y, best), (indices, where) = empty_nhwc(n, c, *pq, x.dtype), empty_nhwc(n, c, *pq, np.int32)
    best[...], where[...] = -np.inf, -1
    x, pixel = to_nhwc(x), np.arange(hw[0] * hw[1], dtype=np.int32).reshape(1, *hw, 1)
    for outputs, pixels in _taps(pq, hw, kernel, stride, padding, dilation):
        value = x[pixels]
        wins = (value > best[outputs]) | (value != value) | (where[outputs] < 0)
        np.copyto(best[outputs], value, where=wins)
        np.copyto(where[outputs], pixel[pixels], where=wins)
    return y, indices


@kernel(MAXPOOL2D_BWD, device="cpu", step=1, note="one scatter-add over all maxima", dtypes=("any",))
def maxpool_bwd_scatter(dy, indices, *, kernel, stride, padding, dilation, ceil_mode, input_hw):
    (n, c, _, _), pixels = dy.shape, input_hw[0] * input_hw[1]
    dx, memory = empty_nhwc(n, c, *input_hw, dy.dtype)
    memory[...] = 0
    to, dy = to_nhwc(indices), to_nhwc(dy)
    at = (np.arange(n).reshape(-1, 1, 1, 1) * pixels + to) * c + np.arange(c)
    np.add.at(memory.reshape(-1), at[to >= 0], dy[to >= 0])
    return dx


@kernel(AVGPOOL2D_FPROP, device="cpu", step=1, note="tap by tap over strided slices", dtypes=("any",))
def avgpool_fprop_taps(x, *, kernel, stride, padding, ceil_mode, count_include_pad):
    (n, c, *hw), pq = x.shape, pooled_hw(x.shape[2:], kernel, stride, padding, (1, 1), ceil_mode)
    y, total = empty_nhwc(n, c, *pq, x.dtype)
    total[...] = 0
    x = to_nhwc(x)
    for outputs, pixels in _taps(pq, hw, kernel, stride, padding, (1, 1)):
        total[outputs] += x[pixels]
    rows, cols = divisors(hw, pq, kernel, stride, padding, count_include_pad)
    total /= np.multiply.outer(rows, cols)[:, :, None]
    return y


@kernel(AVGPOOL2D_BWD, device="cpu", step=1, note="tap by tap over strided slices", dtypes=("any",))
def avgpool_bwd_taps(dy, *, kernel, stride, padding, ceil_mode, count_include_pad, input_hw):
    n, c, *pq = dy.shape
    dx, memory = empty_nhwc(n, c, *input_hw, dy.dtype)
    memory[...] = 0
    rows, cols = divisors(input_hw, pq, kernel, stride, padding, count_include_pad)
    share = to_nhwc(dy) / np.multiply.outer(rows, cols)[:, :, None].astype(dy.real.dtype)
    for outputs, pixels in _taps(pq, input_hw, kernel, stride, padding, (1, 1)):
        memory[pixels] += share[outputs]
    return dx


widened(MAXPOOL2D_FPROP, like=(0, 0))
widened(MAXPOOL2D_BWD)
widened(AVGPOOL2D_FPROP)
widened(AVGPOOL2D_BWD)
