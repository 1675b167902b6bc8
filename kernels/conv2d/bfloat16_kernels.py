"""Convolution of bfloat16 on the CPU: the direct kernels' idea (direct_kernels.py), with products in pairs.

    fprop, dgrad   a pair is two neighbouring channels of a pixel: side by side in the padded rows as they lie, and side
                   by side in panels of filters (panels, R, S*C/2, width, 2)
    wgrad          in bfloat16_wgrad.py

Multiplied in bfloat16, summed in float32, rounded once. On a host that multiplies pairs by one instruction this is
twice as many products per second as float32 has; elsewhere pairs are widened in registers, at float32's speed.
"""

from __future__ import annotations

import numpy as np

from ..cpu.bfloat16 import bits
from ..cpu.jit import helper
from ..cpu.microkernel import lanes
from ..cpu.parallel import parallel
from ..cpu.transforms import copy, interleave
from ..kept import kept
from ..memory import contiguous, empty, empty_nhwc, to_nhwc
from ..registry import kernel
from .dgrad_add import dgrad_add_kernel
from .direct_kernels import residues_are_convolutions
from .epilogue import epilogue
from .genstats import NONE, and_statistics, genstats_kernel, new_sums
from .numba_kernels import residues
from .packing import aligned, of_residue, panel_width, transpose
from .problem import CONV2D_BIAS_ACT, CONV2D_DGRAD, CONV2D_FPROP, out_hw
from .strips import multiply_strips

_DTYPES = ("bfloat16",)
LANES = lanes(np.float32)
_PAIRS = 16  # of a filter, for a task that lays them out


def _fprop_supports(x, w, *, stride, padding, dilation, groups):
    return groups == 1 and dilation[1] == 1 and w.shape[0] % LANES == 0


@kernel(
    CONV2D_FPROP,
    device="cpu",
    step=4,
    supports=_fprop_supports,
    dtypes=_DTYPES,
    note="no patches, products of pairs of channels",
)
def fprop_direct_bfloat16(x, w, *, stride, padding, dilation, groups):
    return _convolve(x, w, stride, padding, dilation)


@genstats_kernel(fprop_direct_bfloat16)
def fprop_direct_bfloat16_genstats(x, w, *, stride, padding, dilation, groups):
    return _convolve(x, w, stride, padding, dilation, statistics=True)


def _bias_act_supports(x, w, b, z, *, relu, **params):
    return _fprop_supports(x, w, **params)


@kernel(
    CONV2D_BIAS_ACT,
    device="cpu",
    step=4,
    supports=_bias_act_supports,
    dtypes=_DTYPES,
    note="fprop_direct_bfloat16; each tile gets bias, skip and ReLU before it is rounded",
)
def bias_act_direct_bfloat16(x, w, b, z, *, stride, padding, dilation, groups, relu):
    return _convolve(x, w, stride, padding, dilation, b, z, relu)


def _convolve(x, w, stride, padding, dilation, *more, statistics=False):
    if x.shape[1] % 2:
        x, w = in_pairs(x), np.pad(w, ((0, 0), (0, 1), (0, 0), (0, 0)))
    else:
        x = to_nhwc(x)
    hw = out_hw(x.shape[1:3], w.shape[2:], stride, padding, dilation)
    y, memory = empty_nhwc(x.shape[0], w.shape[0], *hw, x.dtype)
    sums = new_sums(x.shape[0], w.shape[0], statistics)
    _multiply(x, paired(w, False), bits(memory), w.shape[3], stride, padding, dilation[0], *more, sums=sums)
    return and_statistics(y, sums)


def _multiply(x, panels, y, taps, stride, padding, dilation, *more, sums=NONE):
    """y (N, P, Q, K), of uint16, from x (N, H, W, C) and panels of filters, and what `epilogue` takes."""
    panels = panels.reshape(*panels.shape[:2], -1, panels.shape[4])  # the taps of a filter's row are one run
    multiply_strips(bits(x).view(np.uint32), panels, y, taps, stride, padding, dilation, *epilogue(y, *more), sums)


def in_pairs(x):
    """x (N, C, H, W), C odd, as (N, H, W, C + 1): a channel of zeros makes the pairs whole."""
    n, c, h, w = x.shape
    wider = empty((n, h, w, c + 1), x.dtype)
    _pair_channels(n * h, bits(x), wider.view(np.uint32))
    return wider


@parallel()
def _pair_channels(row, x, pairs):
    n, h = divmod(row, x.shape[2])
    for j in range(pairs.shape[3] - 1):
        _pair_pixels(x[n, 2 * j, h], x[n, 2 * j + 1, h], pairs[n, h, :, j])
    for w in range(x.shape[3]):
        pairs[n, h, w, pairs.shape[3] - 1] = x[n, x.shape[1] - 1, h, w]


@helper(inline=True)
def _pair_pixels(first, second, pairs):
    for w in range(pairs.size):
        pairs[w] = np.uint32(first[w]) | (np.uint32(second[w]) << np.uint32(16))


def _dgrad_supports(dy, w, *, stride, padding, dilation, groups, input_hw):
    whole = w.shape[0] % 2 == 0 and w.shape[1] % LANES == 0
    return groups == 1 and whole and residues_are_convolutions(w, stride, padding, dilation)


@kernel(
    CONV2D_DGRAD,
    device="cpu",
    step=4,
    supports=_dgrad_supports,
    dtypes=_DTYPES,
    note="stride² convolutions over dy, products of pairs of channels",
)
def dgrad_direct_bfloat16(dy, w, *, stride, padding, dilation, groups, input_hw):
    return _dgrad(dy, w, stride, padding, dilation, input_hw)


@dgrad_add_kernel(dgrad_direct_bfloat16)
def dgrad_add_direct_bfloat16(dy, w, z, *, stride, padding, dilation, groups, input_hw):
    return _dgrad(dy, w, stride, padding, dilation, input_hw, z)


def _dgrad(dy, w, stride, padding, dilation, input_hw, z=None):
    dy, (_, c, r, s) = to_nhwc(dy), w.shape
    dx, memory = empty_nhwc(dy.shape[0], c, *input_hw, dy.dtype)
    panels = paired(w, True)
    for part, (r_taps, rows), (s_taps, cols) in residues(bits(memory), (r, s), stride, padding, dilation):
        chosen, before = of_residue(panels, r_taps, s_taps), (-rows[0], -cols[0])
        _multiply(dy, chosen, part, len(s_taps), (1, 1), before, dilation[0], None, z)
    return dx


@kept
def paired(w, turned, deep=2):
    """`pack`, of bfloat16: (panels of K, R, S, C/2, width) pairs of channels, or turned: panels of C, pairs of K, last
    tap first. deep: inputs are filled up with zeros to a multiple of it."""
    outputs, inputs = (w.shape[1], w.shape[0]) if turned else w.shape[:2]
    width, depth = panel_width(outputs, np.dtype(np.float32)), -(-inputs // deep) * deep // 2
    pairs = empty((outputs // width, *w.shape[2:], depth, width), np.uint32)
    pair(bits(contiguous(w)), turned, pairs)
    return pairs


def pair(w, turned, pairs):
    """`paired`, of filters that are one run of memory, into the memory for it."""
    flat = pairs.reshape(len(pairs), -1, *pairs.shape[3:])
    inputs = w.shape[0] if turned else w.shape[1]
    _pair(len(flat) * -(-flat.shape[2] // _PAIRS), w.reshape(*w.shape[:2], -1), inputs // 2, turned, flat)


@parallel()
def _pair(task, w, inputs, turned, pairs):
    _, rs, depth, _ = pairs.shape
    j, block = divmod(task, (depth + _PAIRS - 1) // _PAIRS)
    first, last = block * _PAIRS, min((block + 1) * _PAIRS, depth)
    stop = max(first, min(last, inputs))
    if turned:
        _pair_filters(w, j, first, stop, pairs[j])
    else:
        _pair_taps(w, j, first, stop, pairs[j])
    for t in range(rs):
        for i in range(stop, last):
            pairs[j, t, i] = np.uint32(0)


@helper()
def _pair_filters(w, j, first, last, pairs):
    """Two filters to a number, which then are transposed: channels beside each other, tap by tap."""
    rs, _, width = pairs.shape
    c, size = w.shape[1], rs * width
    both = np.empty(size + 2 * LANES, np.float32)
    taps = aligned((rs + LANES) * width, both)
    for i in range(first, last):
        a = w.ctypes.data + (2 * i * c + j * width) * rs * 2
        if rs == 1:  # they lie as they should
            interleave(a, a + c * 2, pairs[0, i].ctypes.data, width, w.dtype)
            continue
        interleave(a, a + c * rs * 2, both.ctypes.data, size, w.dtype)
        transpose(both, 0, rs, rs, width, taps, 0)
        for t in range(rs):
            copy(taps.ctypes.data + t * width * 4, pairs[rs - 1 - t, i].ctypes.data, width, both.dtype)


@helper()
def _pair_taps(w, j, first, last, pairs):
    """Rows of filters, two numbers in each, are transposed; then those of two channels are put together."""
    rs, _, width = pairs.shape
    c, count = w.shape[1] // 2, (last - first) * rs
    halves = w.reshape(-1).view(np.float32)
    rows = aligned((count + LANES) * width, halves)
    transpose(halves, (j * width * c + first) * rs, c * rs, count, width, rows, 0)
    rows = rows.view(np.uint32)
    for i in range(last - first):
        for t in range(rs):
            a, b = 2 * i * rs + t, (2 * i + 1) * rs + t
            low, high = rows[a // 2 * width :], rows[b // 2 * width :]
            _put_together(low, a % 2, high, b % 2, pairs[t, first + i])


@helper(inline=True)
def _put_together(low, second, high, second_too, pairs):
    """The first or second halves of two rows of numbers as pairs."""
    right, left = np.uint32(16 * second), np.uint32(16 * (1 - second_too))
    for l in range(pairs.size):
        pairs[l] = ((low[l] >> right) & np.uint32(0xFFFF)) | ((high[l] << left) & np.uint32(0xFFFF0000))
