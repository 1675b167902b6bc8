"""Pooling on a GPU: a thread per result in channels-last memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..cuda.launch import ALL, Launch, blocks, launch, variants
from ..memory import empty_nhwc, to_nhwc
from ..registry import kernel
from .problem import AVGPOOL2D_BWD, AVGPOOL2D_FPROP, MAXPOOL2D_BWD, MAXPOOL2D_FPROP, pooled_hw

_SOURCE = Path(__file__).with_name("pool2d.cu")
_MAX_FPROP, _MAX_BWD, _AVERAGE_FPROP, _AVERAGE_BWD = (
    variants(_SOURCE, entry, ALL) for entry in ("maxpool_fprop", "maxpool_bwd", "avgpool_fprop", "avgpool_bwd")
)
_WINDOW = np.dtype([(letter, np.int32) for letter in "NHWCPQRSuvablm"])  # struct Window
_MOST_BLOCKS = 1 << 16


@kernel(MAXPOOL2D_FPROP, device="cuda", step=1, note="a thread per window", dtypes=ALL)
def maxpool_fprop_cuda(x, *, kernel, stride, padding, dilation, ceil_mode):
    (n, c, *hw), pq = x.shape, pooled_hw(x.shape[2:], kernel, stride, padding, dilation, ceil_mode)
    y, memory = empty_nhwc(n, c, *pq, x.dtype, x)
    indices, where = empty_nhwc(n, c, *pq, np.int32, x)
    window = _window(n, c, hw, pq, kernel, stride, padding, dilation)
    _each(_MAX_FPROP[x.dtype.name], memory.size, (to_nhwc(x), memory, where, window))
    return y, indices


@kernel(MAXPOOL2D_BWD, device="cuda", step=1, note="a thread per pixel gathers from its windows", dtypes=ALL)
def maxpool_bwd_cuda(dy, indices, *, kernel, stride, padding, dilation, ceil_mode, input_hw):
    n, c, *pq = dy.shape
    dx, memory = empty_nhwc(n, c, *input_hw, dy.dtype, dy)
    window = _window(n, c, input_hw, pq, kernel, stride, padding, dilation)
    _each(_MAX_BWD[dy.dtype.name], memory.size, (to_nhwc(dy), to_nhwc(indices), memory, window))
    return dx


@kernel(AVGPOOL2D_FPROP, device="cuda", step=1, note="a thread per window", dtypes=ALL)
def avgpool_fprop_cuda(x, *, kernel, stride, padding, ceil_mode, count_include_pad):
    (n, c, *hw), pq = x.shape, pooled_hw(x.shape[2:], kernel, stride, padding, (1, 1), ceil_mode)
    y, memory = empty_nhwc(n, c, *pq, x.dtype, x)
    window = _window(n, c, hw, pq, kernel, stride, padding)
    _each(_AVERAGE_FPROP[x.dtype.name], memory.size, (to_nhwc(x), memory, window, count_include_pad))
    return y


@kernel(AVGPOOL2D_BWD, device="cuda", step=1, note="a thread per pixel gathers from its windows", dtypes=ALL)
def avgpool_bwd_cuda(dy, *, kernel, stride, padding, ceil_mode, count_include_pad, input_hw):
    n, c, *pq = dy.shape
    dx, memory = empty_nhwc(n, c, *input_hw, dy.dtype, dy)
    window = _window(n, c, input_hw, pq, kernel, stride, padding)
    _each(_AVERAGE_BWD[dy.dtype.name], memory.size, (to_nhwc(dy), memory, window, count_include_pad))
    return dx


def _window(n, c, hw, pq, kernel, stride, padding, dilation=(1, 1)):
    """struct Window of pool2d.cu."""
    return np.array((n, *hw, c, *pq, *kernel, *stride, *padding, *dilation), _WINDOW)


def _each(function, size, args):
    """A thread per element, as far as blocks go."""
    launch(Launch(function, (min(blocks(size, 256), _MOST_BLOCKS),), (256,), args))
