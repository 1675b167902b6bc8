"""1x1 convolution on the CPU: a product of matrices, pixels x channels times channels x filters, without any patches.

    fprop   y[pixel, k] = sum over c of x[pixel, c] * w[k, c]
    dgrad   dx[pixel, c] = sum over k of dy[pixel, k] * w[k, c]

At a stride the pixels that are seen are gathered first (and dx is zero at the others).
"""

from __future__ import annotations

import numpy as np

from ..cpu.features import simd
from ..cpu.jit import helper
from ..cpu.microkernel import lanes
from ..cpu.parallel import parallel
from ..memory import empty, empty_nhwc, to_nhwc
from ..registry import kernel
from .epilogue import epilogue, multiply_tile_then
from .packing import pack
from .problem import CONV2D_DGRAD, CONV2D_FPROP

_ROWS = 8  # of a tile
_CACHE_NUMBERS = 1 << 17  # pixels times channels of a block, which meet one panel of filters after the other
_VECTOR_BYTES = simd().vector_bytes


def fprop_supports(x, w, *, stride, padding, dilation, groups):
    pixels = x.shape[0] * -(-x.shape[2] // stride[0]) * -(-x.shape[3] // stride[1])
    return _pointwise(w, padding, groups) and w.shape[0] % lanes(x.dtype) == 0 and pixels >= _ROWS


def _dgrad_supports(dy, w, *, stride, padding, dilation, groups, input_hw):
    whole = w.shape[1] % lanes(dy.dtype) == 0
    return _pointwise(w, padding, groups) and whole and dy.size // dy.shape[1] >= _ROWS


def _pointwise(w, padding, groups):
    return groups == 1 and w.shape[2:] == (1, 1) and padding == (0, 0)


@kernel(CONV2D_FPROP, device="cpu", step=5, supports=fprop_supports, note="1x1: a product of matrices, read in place")
def fprop_pointwise(x, w, *, stride, padding, dilation, groups):
    return convolve_pointwise(x, w, stride)


def convolve_pointwise(x, w, stride, *follows):
    """fprop, and after it what `follows`: b, z and relu of `epilogue`."""
    x = np.ascontiguousarray(to_nhwc(x)[:, :: stride[0], :: stride[1]])
    y, memory = empty_nhwc(x.shape[0], w.shape[0], *x.shape[1:3], x.dtype)
    _multiply(x, pack(w, False), memory, *follows)
    return y


@kernel(CONV2D_DGRAD, device="cpu", step=5, supports=_dgrad_supports, note="1x1: a product of matrices, read in place")
def dgrad_pointwise(dy, w, *, stride, padding, dilation, groups, input_hw):
    dy, c = to_nhwc(dy), w.shape[1]
    dx, memory = empty_nhwc(dy.shape[0], c, *input_hw, dy.dtype)
    if stride == (1, 1):
        _multiply(dy, pack(w, True), memory)
    else:
        seen = empty((*dy.shape[:3], c), dy.dtype)
        _multiply(dy, pack(w, True), seen)
        memory[...] = 0
        memory[:, :: stride[0], :: stride[1]] = seen
    return dx


def _multiply(x, panels, y, *follows):
    """y (..., K) = x (..., C) times the panels of filters, and what `follows`."""
    c = x.shape[-1]
    bias, z, add, floor = epilogue(y, *follows)
    x, panels, y, z = (
        x.reshape(-1, c),
        panels.reshape(len(panels), c, -1),
        *(a.reshape(-1, a.shape[-1]) for a in (y, z)),
    )
    # Blocks of almost the same size, none smaller than a tile.
    blocks = max(1, len(x) // max(_ROWS, min(512, _CACHE_NUMBERS // c // _ROWS * _ROWS)))
    _multiply_blocks(blocks, x, panels, y, blocks, bias, z, add, floor)


@parallel()
def _multiply_blocks(b, x, panels, y, blocks, bias, z, add, floor):
    first, last = len(x) * b // blocks, len(x) * (b + 1) // blocks
    _multiply_block(x, panels, y, first, last, bias, z, add, floor)


@helper()
def _multiply_block(x, panels, y, first, last, bias, z, add, floor):
    (n_panels, c, width), k, size = panels.shape, y.shape[1], x.itemsize
    for j in range(n_panels):
        w, shift = panels[j].ctypes.data, bias.ctypes.data + j * width * size if bias.size > 0 else 0
        for i in range(first, last, _ROWS):
            i = min(i, last - _ROWS)  # the last tile computes some rows again
            a, at = x.ctypes.data + i * c * size, (i * k + j * width) * size
            out, skip = y.ctypes.data + at, z.ctypes.data + at
            if width * size > _VECTOR_BYTES:
                multiply_tile_then(
                    a, c, 1, 0, w, width, 0, out, k, c, 1, shift, skip, k, add, floor, _ROWS, 2, x.dtype
                )  # fmt: skip
            else:
                multiply_tile_then(
                    a, c, 1, 0, w, width, 0, out, k, c, 1, shift, skip, k, add, floor, _ROWS, 1, x.dtype
                )  # fmt: skip
