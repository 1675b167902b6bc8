"""1x1 convolution on the CPU: a product of matrices, pixels x channels times channels x filters.

    fprop   y[pixel, k] = sum over c of x[pixel, c] * w[k, c]
    dgrad   dx[pixel, c] = sum over k of dy[pixel, k] * w[k, c]

At a stride only the pixels that are seen are read (and dx is zero at the others).
"""

from __future__ import annotations

import numpy as np

from ..cpu.jit import helper
from ..cpu.microkernel import lanes
from ..cpu.parallel import parallel
from ..memory import empty_nhwc, to_nhwc
from ..registry import kernel
from .epilogue import epilogue
from .gathered import multiply_gathered
from .genstats import and_statistics, genstats_kernel
from .packing import pack
from .problem import CONV2D_DGRAD, CONV2D_FPROP, out_hw

_ONE_TAP = np.zeros(1, np.int64)  # where it looks


def fprop_supports(x, w, *, stride, padding, dilation, groups):
    return _pointwise(w, padding, groups) and x.size > 0


def _dgrad_supports(dy, w, *, stride, padding, dilation, groups, input_hw):
    return _pointwise(w, padding, groups) and dy.size > 0


def _pointwise(w, padding, groups):
    whole = w.shape[0] % lanes(w.dtype) == 0 and w.shape[1] % lanes(w.dtype) == 0
    return groups == 1 and w.shape[2:] == (1, 1) and padding == (0, 0) and whole


@kernel(CONV2D_FPROP, device="cpu", step=5, supports=fprop_supports, note="1x1: a product of matrices, without patches")
def fprop_pointwise(x, w, *, stride, padding, dilation, groups):
    return convolve_pointwise(x, w, stride)


@genstats_kernel(fprop_pointwise)
def fprop_pointwise_genstats(x, w, *, stride, padding, dilation, groups):
    return convolve_pointwise(x, w, stride, statistics=True)


def convolve_pointwise(x, w, stride, *follows, statistics=False):
    """fprop, and after it what `follows`: b, z and relu of `epilogue`; with statistics y, mean and var."""
    x, one = to_nhwc(x), (1, 1)
    y, memory = empty_nhwc(x.shape[0], w.shape[0], *out_hw(x.shape[1:3], one, stride, (0, 0), one), x.dtype)
    after = epilogue(memory, *follows)
    sums = multiply_gathered(x, pack(w, False), memory, _ONE_TAP, _ONE_TAP, stride, *after, statistics)
    return and_statistics(y, sums)


@kernel(
    CONV2D_DGRAD, device="cpu", step=5, supports=_dgrad_supports, note="1x1: a product of matrices, without patches"
)
def dgrad_pointwise(dy, w, *, stride, padding, dilation, groups, input_hw):
    dy = to_nhwc(dy)
    dx, memory = empty_nhwc(dy.shape[0], w.shape[1], *input_hw, dy.dtype)
    if stride != (1, 1):
        _clear_unseen(memory.shape[0] * memory.shape[1], memory, stride)
    seen = memory[:, :: stride[0], :: stride[1]]
    multiply_gathered(dy, pack(w, True), seen, _ONE_TAP, _ONE_TAP, (1, 1), *epilogue(seen))
    return dx


@parallel()
def _clear_unseen(row, dx, stride):
    n, h = divmod(row, dx.shape[1])
    _clear_row(dx[n, h], 1 if h % stride[0] else stride[1])


@helper()
def _clear_row(row, stride):
    """Zeros in all of its pixels, or but for every stride-th."""
    for w in range(row.shape[0]):
        if stride == 1 or w % stride:
            row[w] = 0
