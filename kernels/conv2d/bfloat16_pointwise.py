"""1x1 convolution of bfloat16 on the CPU: a product of matrices, in pairs, that reads activations where they lie.

A 1x1 filter's channels lie side by side in memory, so pairs of them are 32-bit numbers, and the panels of fprop are
`pack`'s of these; dgrad's pairs are of two filters. A task has some pixels and some panels, small enough for the
second-level cache, and goes through all panels for one tile of pixels after the other: so x, y and z are read and
written once, as they lie. What the next tile reads is asked for while this one's products are summed. (One panel after
the other keeps a panel in the first-level cache, but takes y and z from everywhere: up to 1.7 times as long.)
"""

from __future__ import annotations

import numpy as np

from ..cpu.bfloat16 import bits
from ..cpu.jit import helper
from ..cpu.parallel import parallel
from ..cpu.transforms import fetch
from ..kept import kept
from ..memory import empty_nhwc, to_nhwc
from ..registry import kernel
from .bfloat16_kernels import LANES, paired
from .direct_tile import MOST_ROWS, tile, tile_rows
from .epilogue import epilogue
from .genstats import add_up, and_statistics, genstats_kernel, new_sums
from .packing import pack
from .problem import CONV2D_BIAS_ACT, CONV2D_DGRAD, CONV2D_FPROP

_DTYPES = ("bfloat16",)
_PIXELS, _FILTERS = 1 << 17, 1 << 18  # numbers of the pixels and of the filters of a task


def _fprop_supports(x, w, *, stride, padding, dilation, groups):
    return _pointwise(x, w, stride, padding, groups) and w.shape[1] % 2 == 0 and w.shape[0] % LANES == 0


def _bias_act_supports(x, w, b, z, *, relu, **params):
    return _fprop_supports(x, w, **params)


def _dgrad_supports(dy, w, *, stride, padding, dilation, groups, input_hw):
    return _pointwise(dy, w, stride, padding, groups) and w.shape[0] % 2 == 0 and w.shape[1] % LANES == 0


def _pointwise(x, w, stride, padding, groups):
    """Without stride: with it, the direct kernels read what is seen in place, and write dx in place."""
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return groups == 1 and w.shape[2:] == stride == (1, 1) and padding == (0, 0) and pixels >= MOST_ROWS


@kernel(
    CONV2D_FPROP,
    device="cpu",
    step=5,
    supports=_fprop_supports,
    dtypes=_DTYPES,
    note="1x1: a product of matrices in pairs of channels, read in place",
)
def fprop_pointwise_bfloat16(x, w, *, stride, padding, dilation, groups):
    return _convolve(x, w)


@genstats_kernel(fprop_pointwise_bfloat16)
def fprop_pointwise_bfloat16_genstats(x, w, *, stride, padding, dilation, groups):
    return _convolve(x, w, statistics=True)


@kernel(
    CONV2D_BIAS_ACT,
    device="cpu",
    step=5,
    supports=_bias_act_supports,
    dtypes=_DTYPES,
    note="fprop_pointwise_bfloat16; each tile gets bias, skip and ReLU before it is rounded",
)
def bias_act_pointwise_bfloat16(x, w, b, z, *, stride, padding, dilation, groups, relu):
    return _convolve(x, w, b, z, relu)


def _convolve(x, w, *more, statistics=False):
    x = to_nhwc(x)
    y, memory = empty_nhwc(x.shape[0], w.shape[0], *x.shape[1:3], x.dtype)
    return and_statistics(y, _multiply(x, _pairs(w), memory, *more, statistics=statistics))


@kept
def _pairs(w):
    """Panels of w (K, C, 1, 1), two channels to a number."""
    pairs = np.ascontiguousarray(bits(w)).reshape(w.shape[:2]).view(np.float32)
    return pack(pairs[:, :, None, None], False)


@kernel(
    CONV2D_DGRAD,
    device="cpu",
    step=5,
    supports=_dgrad_supports,
    dtypes=_DTYPES,
    note="1x1: a product of matrices in pairs of filters, read in place",
)
def dgrad_pointwise_bfloat16(dy, w, *, stride, padding, dilation, groups, input_hw):
    dx, memory = empty_nhwc(dy.shape[0], w.shape[1], *input_hw, dy.dtype)
    _multiply(to_nhwc(dy), paired(w, True), memory)
    return dx


def _multiply(x, panels, y, *more, statistics=False):
    """y (..., K) = x (..., C) times the panels of filters, and what `epilogue` takes. Returns the sums."""
    c, y = x.shape[-1], bits(y)
    bias, z, add, floor = epilogue(y, *more)
    x, y, z = (a.reshape(-1, a.shape[-1]) for a in (bits(x), y, z))
    panels = panels.view(np.uint32).reshape(len(panels), c // 2, -1)
    vectors = panels.shape[2] // LANES
    rows = tile_rows(len(x), vectors, True)
    # Blocks of pixels, and groups of panels, of almost the same size.
    blocks = max(1, len(x) // max(rows, min(448, _PIXELS // c // rows * rows)))
    groups = min(len(panels), -(-panels.size * 2 // _FILTERS))
    sums = new_sums(blocks, y.shape[1], statistics)
    _multiply_blocks(blocks * groups, x, panels, y, rows, vectors, blocks, groups, bias, z, add, floor, sums)
    return sums


@parallel()
def _multiply_blocks(task, x, panels, y, rows, vectors, blocks, groups, bias, z, add, floor, sums):
    b, g = divmod(task, groups)
    pixels = len(x) * b // blocks, len(x) * (b + 1) // blocks
    filters = len(panels) * g // groups, len(panels) * (g + 1) // groups
    _multiply_block(x, panels, y, rows, vectors, pixels, filters, bias, z, add, floor)
    if len(sums) > 0:
        at, row, width = y[pixels[0]].ctypes.data, y.strides[0], panels.shape[2]
        first, last = filters[0] * width, filters[1] * width
        add_up(at + first * 2, 0, row, 1, pixels[1] - pixels[0], sums[b], first, last, 2, y.dtype)


@helper()
def _multiply_block(x, panels, y, rows, vectors, pixels, filters, bias, z, add, floor):
    (_, steps, width), k, size = panels.shape, y.shape[1], 2
    bias_at, row = bias.ctypes.data, x.shape[1] * size
    share = rows * row // (filters[1] - filters[0])
    for i in range(pixels[0], pixels[1], rows):
        i = min(i, pixels[1] - rows)  # the last tile computes some rows again
        a = x.ctypes.data + i * row
        for j in range(filters[0], filters[1]):
            fetch(a + rows * row + (j - filters[0]) * share, share)  # of the next pixels
            shift, at = bias_at + j * width * 4 if bias.size > 0 else 0, (i * k + j * width) * size
            tile(
                rows, vectors, a, steps, 0, panels[j].ctypes.data, 0, y.ctypes.data + at, k, steps, 1,
                shift, z.ctypes.data + at, k, add, floor, rows, y.dtype,
            )  # fmt: skip
