"""Weight gradient on the CPU where dw is large and images are small: each task owns a part of dw, over all images.

    dw[t, c, k] = sum over pixels of x[pixel seen by tap t, c] * dy[pixel, k]

dy is split into panels once. A task takes one tap, a few channels c and some panels; it gathers what the tap sees of a
block of pixels, so that both factors lie side by side in the first-level cache. (Read in place, the pixels of an image
with many channels are a multiple of 4096 bytes apart and push each other out.)
"""

from __future__ import annotations

import numpy as np

from ..cpu.features import simd
from ..cpu.jit import helper
from ..cpu.microkernel import lanes, multiply_tile
from ..cpu.parallel import parallel
from ..cpu.transforms import copy
from ..memory import empty, to_nhwc
from ..registry import kernel
from .packing import aligned, panel_width, unpacked
from .problem import CONV2D_WGRAD

_CHANNELS, _PIXELS, _PANELS = 32, 128, 4  # channels and panels of a task, pixels of its blocks
_ROWS, _NARROW_ROWS = 8, 16  # of a tile for panels of two vectors and of one
_SMALL_IMAGE, _LARGE_DW = 64, 1 << 16  # pixels of dy, and numbers of dw: measured on ResNet's layers
_VECTOR_BYTES = simd().vector_bytes


def _supports(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    whole = x.shape[1] % _NARROW_ROWS == 0 and dy.shape[1] % lanes(x.dtype) == 0
    return groups == 1 and whole and dy.size > 0


def _rank(x, dy, *, kernel_hw, **_):
    small = dy.shape[2] * dy.shape[3] <= _SMALL_IMAGE
    return 4.5 if small and kernel_hw[0] * kernel_hw[1] * x.shape[1] * dy.shape[1] >= _LARGE_DW else 3.5


@kernel(
    CONV2D_WGRAD,
    device="cpu",
    step=5,
    supports=_supports,
    rank=_rank,
    note="tasks own parts of dw, over all images",
)
def wgrad_parts_tile(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    x, dy = to_nhwc(x), to_nhwc(dy)
    (n, p, q, k), c = dy.shape, x.shape[3]
    width = panel_width(k, x.dtype)
    panels = empty((k // width, n * p * q, width), x.dtype)
    _split(len(panels), dy.reshape(-1, k), panels)
    parts = empty((*kernel_hw, c, k), x.dtype)
    tasks = kernel_hw[0] * kernel_hw[1] * -(-c // _CHANNELS) * -(-len(panels) // _PANELS)
    _sum_parts(tasks, x, panels, parts, p, q, stride, padding, dilation)
    return unpacked(parts.reshape(1, -1), (width, k, kernel_hw[1] * c * k, c * k), (k, c, *kernel_hw), x.dtype)


@parallel()
def _split(j, dy, panels):
    _split_panel(dy, panels[j], j * panels.shape[2])


@helper()
def _split_panel(dy, panel, first):
    width, k, size = panel.shape[1], dy.shape[1], dy.itemsize
    for i in range(panel.shape[0]):
        copy(dy.ctypes.data + (i * k + first) * size, panel.ctypes.data + i * width * size, width, dy.dtype)


@parallel()
def _sum_parts(task, x, panels, parts, p, q, stride, padding, dilation):
    _, s_size, c, _ = parts.shape
    chunks, groups = (c + _CHANNELS - 1) // _CHANNELS, (panels.shape[0] + _PANELS - 1) // _PANELS
    tap, part = divmod(task, chunks * groups)
    r, s = divmod(tap, s_size)
    top, left = r * dilation[0] - padding[0], s * dilation[1] - padding[1]
    _part(x, panels, parts[r, s], p, q, stride, top, left, part // groups * _CHANNELS, part % groups * _PANELS)


@helper()
def _part(x, panels, dw, p, q, stride, top, left, channel, first_panel):
    """dw (C, K): a few of its rows, and the columns of some panels."""
    (_, pixels, width), k, size = panels.shape, dw.shape[1], x.itemsize
    n = min(_CHANNELS, dw.shape[0] - channel)
    seen = aligned(_PIXELS * n, x)
    for start in range(0, pixels, _PIXELS):
        count = min(_PIXELS, pixels - start)
        _gather(x, seen, p, q, stride, top, left, channel, n, start, count)
        for j in range(first_panel, min(first_panel + _PANELS, panels.shape[0])):
            b, out = panels[j, start].ctypes.data, dw.ctypes.data + (channel * k + j * width) * size
            if width * size > _VECTOR_BYTES:
                for i in range(0, n, _ROWS):
                    multiply_tile(
                        seen.ctypes.data + i * size, 1, n, b, width, out + i * k * size, k, count, start > 0,
                        _ROWS, 2, x.dtype,
                    )  # fmt: skip
            else:
                for i in range(0, n, _NARROW_ROWS):
                    multiply_tile(
                        seen.ctypes.data + i * size, 1, n, b, width, out + i * k * size, k, count, start > 0,
                        _NARROW_ROWS, 1, x.dtype,
                    )  # fmt: skip


@helper()
def _gather(x, seen, p, q, stride, top, left, channel, channels, start, count):
    """seen[i, c]: what a tap sees of `channels` channels at output pixel number start + i; zeros outside x."""
    _, h_size, w_size, c = x.shape
    zeros = np.zeros(channels, x.dtype)
    for i in range(count):
        nothing = np.int64(
            zeros.ctypes.data
        )  # named within the loop, which keeps it; unsigned, Numba made floats of it
        n, at = divmod(start + i, p * q)
        h, w = at // q * stride[0] + top, at % q * stride[1] + left
        inside = 0 <= h < h_size and 0 <= w < w_size
        source = x.ctypes.data + (((n * h_size + h) * w_size + w) * c + channel) * x.itemsize
        target = seen.ctypes.data + i * channels * x.itemsize
        copy(source if inside else nothing, target, channels, x.dtype)
