"""Convolution of bfloat16 on the CPU: the direct kernels' idea (direct_kernels.py), with products in pairs.

    fprop, dgrad   a pair is two neighbouring channels of a pixel: side by side in the padded rows as they lie, and side
                   by side in panels of filters (panels, R, S*C/2, width, 2)
    wgrad          in bfloat16_wgrad.py

Multiplied in bfloat16, summed in float32, rounded once. On a host that multiplies pairs by one instruction this is
twice as many products per second as float32 has; elsewhere pairs are widened in registers, at float32's speed.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from ..cpu.bfloat16 import bits
from ..cpu.casts import cast
from ..cpu.jit import njit
from ..cpu.transforms import copy
from ..memory import empty, empty_nhwc, to_nhwc
from ..registry import kernel
from .bfloat16_tile import LANES, MOST_ROWS, tile, tile_rows
from .direct_kernels import residues_are_convolutions
from .numba_kernels import residues
from .packing import pack
from .problem import CONV2D_BIAS_ACT, CONV2D_DGRAD, CONV2D_FPROP, out_hw

_DTYPES = ("bfloat16",)


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


def follows(y, b=None, z=None, relu=False):
    """What `tile` takes for an output y (N, P, Q, K) of uint16: bias, z, whether it is added, the least that is written.
    z is logically (N, K, P, Q)."""
    bias = np.zeros(0, np.float32) if b is None else cast(b, np.float32)
    return bias, y if z is None else bits(to_nhwc(z)), z is not None, np.float32(0 if relu else -np.inf)


def _convolve(x, w, stride, padding, dilation, *more):
    x = to_nhwc(x)
    if x.shape[3] % 2:  # a channel of zeros makes the pairs whole
        x, w = _one_channel_more(x), np.pad(w, ((0, 0), (0, 1), (0, 0), (0, 0)))
    hw = out_hw(x.shape[1:3], w.shape[2:], stride, padding, dilation)
    y, memory = empty_nhwc(x.shape[0], w.shape[0], *hw, x.dtype)
    _multiply(x, paired(w, False), bits(memory), w.shape[3], stride, padding, dilation[0], *more)
    return y


def _multiply(x, panels, y, taps, stride, padding, dilation, *more):
    """y (N, P, Q, K), of uint16, from x (N, H, W, C) and panels of filters, and what `follows`."""
    panels = panels.reshape(*panels.shape[:2], -1, panels.shape[4])  # the taps of a filter's row are one run
    rows = tile_rows(y.shape[2], panels.shape[3])
    _fprop(bits(x), panels, y, taps, rows, stride, padding, dilation, *follows(y, *more))


def _one_channel_more(x):
    wider = empty((*x.shape[:3], x.shape[3] + 1), x.dtype)
    _widen_pixels(bits(x).reshape(-1, x.shape[3]), bits(wider).reshape(-1, wider.shape[3]))
    return wider


@njit(parallel=True)
def _widen_pixels(x, wider):
    n, block = len(x), 4096
    for b in prange((n + block - 1) // block):
        for i in range(np.int64(b) * block, min((np.int64(b) + 1) * block, n)):
            for l in range(x.shape[1]):
                wider[i, l] = x[i, l]
            wider[i, x.shape[1]] = 0


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
    dy, (_, c, r, s) = to_nhwc(dy), w.shape
    dx, memory = empty_nhwc(dy.shape[0], c, *input_hw, dy.dtype)
    panels = paired(w, True)
    for part, (r_taps, rows), (s_taps, cols) in residues(bits(memory), (r, s), stride, padding, dilation):
        chosen = np.ascontiguousarray(panels[:, r_taps][:, :, s_taps])
        _multiply(dy, chosen, part, len(s_taps), (1, 1), (-rows[0], -cols[0]), dilation[0])
    return dx


def paired(w, turned):
    """w (K, C, R, S) -> panels of K: (panels, R, S, C/2, width) pairs of channels, or turned: panels of C, pairs of K."""
    panels = pack(cast(w, np.float32), turned)
    *shape, c, width = panels.shape
    pairs = empty((*shape, c // 2, width), np.uint32)
    _pair_up(panels.view(np.uint32).reshape(-1, 2, width), pairs.reshape(-1, width))
    return pairs


@njit(parallel=True)
def _pair_up(numbers, pairs):
    for i in prange(len(pairs)):
        _pair_rows(numbers[np.int64(i), 0], numbers[np.int64(i), 1], pairs[np.int64(i)])


@njit(inline=True)
def _pair_rows(first, second, pairs):
    for l in range(pairs.size):
        pairs[l] = (first[l] >> np.uint32(16)) | (second[l] & np.uint32(0xFFFF0000))


@njit(parallel=True)
def _fprop(x, panels, y, taps, rows, stride, padding, dilation, bias, z, add, floor):
    for n in prange(x.shape[0]):
        _fprop_image(x[n], panels, y[n], taps, rows, stride, padding, dilation, bias, z[n], add, floor)


@njit()
def _fprop_image(x, panels, y, taps, rows, stride, padding, dilation, bias, z, add, floor):
    c, (p_size, q_size, _), (n_panels, r_size, run, width) = x.shape[2], y.shape, panels.shape
    height, columns = (p_size - 1) * stride[0] + (r_size - 1) * dilation + 1, (q_size - 1) * stride[1] + taps
    inside = padding == (0, 0) and height <= x.shape[0] and columns <= x.shape[1] and q_size >= rows
    seen = x if inside else _padded(x, height, q_size, taps, stride[1], padding)
    step, line, size = stride[1] * c, seen.shape[1] * c, 2
    for j in range(n_panels):
        w, shift = panels[j].ctypes.data, bias.ctypes.data + j * width * bias.itemsize if bias.size > 0 else 0
        for p in range(p_size):
            for q in range(0, q_size, rows):
                q = max(0, min(q, q_size - rows))  # the last tile of a row computes some pixels again
                at = p * y.strides[0] + q * y.strides[1] + j * width * size
                skip = z.ctypes.data + (p * z.strides[0] + q * z.strides[1] + j * width * size if add else 0)
                tile(
                    rows, seen.ctypes.data + (p * stride[0] * line + q * step) * size, step // 2, dilation * line // 2,
                    w, run * width, y.ctypes.data + at, y.strides[1] // size, run, r_size,
                    shift, skip, z.strides[1] // size, add, floor, q_size - q,
                )  # fmt: skip


@njit()
def _padded(x, height, q_size, taps, stride, padding):
    """The rows that the windows see, zeros around, and columns enough for tiles that hang over at the end."""
    h_size, w_size, c = x.shape
    columns = (max(q_size, MOST_ROWS) - 1) * stride + taps
    rows = np.empty((height, columns, c), x.dtype)
    first, last = min(columns, padding[1]), min(columns, padding[1] + w_size)
    for i in range(height):
        h = i - padding[0]
        if 0 <= h < h_size:
            rows[i, :first] = 0
            _copy_run(x[h].reshape(-1), rows[i, first:last].reshape(-1))
            rows[i, last:] = 0
        else:
            rows[i] = 0
    return rows


@njit(inline=True)
def _copy_run(source, target):
    """target = source[:target.size], of which whole vectors by vectors."""
    whole = target.size // (2 * LANES) * LANES  # pairs
    copy(source.ctypes.data, target.ctypes.data, whole, np.float32)
    for i in range(2 * whole, target.size):
        target[i] = source[i]
