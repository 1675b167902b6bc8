"""A convolution that also gives the statistics of its output, for the BatchNorm that follows in training.

    y = conv2d(x, w)      mean[k] = sum over n, p, q of y[n, k, p, q] / m      var[k] = sum of (y - mean)² / m

m = N P Q. They are summed while what was just written is in the first-level cache, so that BatchNorm reads y once, to
normalise it (minires/ops/conv.py).

A kernel hands `add_up` some dozen pixels at a time, for the sums of their block (blocks, 2, K), of float64. Blocks are
cut by shape alone: the same bits on any number of threads. Of such a group there are float32 sums of d = y - f and d²,
f being its first pixel; of n pixels

    sum y = sum d + n f        sum y² = sum d² + f (2 sum d + n f)

whose products are exact in float64. So a variance that is small beside the mean loses nothing that float32 held.
bfloat16 is read as it was rounded. Name: cuDNN's "GenStats" ("Graph API", operations).
"""

from __future__ import annotations

import functools

import numpy as np

from ..cpu.jit import helper, njit
from ..cpu.microkernel import lanes
from ..cpu.vectors import load, splat, store, widen
from ..memory import empty, zeros
from ..registry import Problem, computed_in, kernel
from .beside import register_beside
from .fused_problem import statistics_scale, with_statistics
from .problem import CONV2D_FPROP, fprop_reference

NONE = empty((0, 2, 0), np.float64)  # the sums, where nothing is wanted
_LANES = lanes(np.float32)
_GROUP = 64  # pixels, at most


def genstats_reference(x, w, *, stride, padding, dilation, groups):
    """y, mean, var (biased)."""
    return with_statistics(fprop_reference(x, w, stride=stride, padding=padding, dilation=dilation, groups=groups))


@functools.cache
def _scale(of_y, finer=1.0):
    """What errors are relative to where the convolution's are to `of_y`. finer: eps of the statistics in one of y."""

    def scale(x, w, **window):
        y, mean, var = statistics_scale(fprop_reference(x, w, **window), of_y(x, w, **window))
        return y, finer * mean, finer * var

    return scale


CONV2D_GENSTATS = Problem(
    "conv2d_genstats",
    genstats_reference,
    CONV2D_FPROP.inputs,
    CONV2D_FPROP.cases,
    CONV2D_FPROP.flops,
    CONV2D_FPROP.bytes_moved,
    _scale(CONV2D_FPROP.error_scale),
    output_dtypes=lambda dtype, **_: (dtype, *[computed_in(dtype)] * 2),
)
kernel(CONV2D_GENSTATS, device="cpu", step=0, note="the definition, window by window", dtypes=("any",))(
    genstats_reference
)


def genstats_kernel(convolution):
    """Register the decorated function, which returns y, mean and var, beside a convolution that does nothing else."""

    def register(fn):
        about = dict(note="which adds up what it has written", dtypes=("float32", "bfloat16"))
        register_beside(CONV2D_GENSTATS, convolution, fn, supports=_supports, scale=_scale, **about)
        return fn

    return register


def _supports(x, w, **_):
    """Whole vectors of filters, and a number of pixels."""
    return x.size > 0 and w.shape[0] % _LANES == 0


def new_sums(blocks, k, wanted):
    """Sums of so many blocks, all 0; NONE where they are not wanted."""
    if not wanted:
        return NONE
    return zeros((blocks, 2, k), np.float64)


def and_statistics(y, sums):
    """y, or where there are sums y, mean and var."""
    if sums is NONE:
        return y
    mean, var = (empty(sums.shape[2:], np.float32) for _ in range(2))
    _moments(sums, y.size // y.shape[1], mean, var)
    return y, mean, var


@njit()
def _moments(sums, m, mean, var):
    total = sums[0]
    for b in range(1, len(sums)):
        for i in range(2):
            for k in range(mean.size):
                total[i, k] += sums[b, i, k]
    for k in range(mean.size):
        first = total[0, k] / m
        second = total[1, k] / m - first * first
        mean[k], var[k] = first, 0.0 if second < 0 else second


@helper()
def add_up(at, row, column, rows, columns, sums, first, last, size, dtype):
    """Add rows x columns pixels, the first of them at `at`, strides in bytes, to the sums (2, K) of the filters from
    `first` to `last`, whole vectors; size and dtype: of a number, y's."""
    taller = max(1, _GROUP // max(1, columns))
    for i in range(0, rows, taller):
        for j in range(0, columns, _GROUP):
            group, height, width = at + i * row + j * column, min(taller, rows - i), min(_GROUP, columns - j)
            k = first
            while k + 2 * _LANES <= last:
                _add_wide(group + (k - first) * size, row, column, height, width, sums, k, dtype)
                k += 2 * _LANES
            if k < last:
                _add_narrow(group + (k - first) * size, row, column, height, width, sums, k, dtype)


def _add_of(width):
    """The sums of a group, of so many channels."""

    @helper()
    def add(at, row, column, rows, columns, sums, k, dtype):
        first = load(at, width, dtype)
        total = squares = first - first  # 0, or NaN where the sums will be
        for i in range(rows):
            for j in range(columns):
                d = load(at + i * row + j * column, width, dtype) - first
                total = total + d
                squares = squares + d * d
        n, f = splat(np.float64(rows * columns), width, sums.dtype), widen(first)
        total_at, squares_at, s = sums[0, k:].ctypes.data, sums[1, k:].ctypes.data, widen(total)
        store(total_at, load(total_at, width, sums.dtype) + (s + n * f))
        store(squares_at, load(squares_at, width, sums.dtype) + (widen(squares) + f * (s + s + n * f)))

    return add


_add_wide, _add_narrow = _add_of(2 * _LANES), _add_of(_LANES)
