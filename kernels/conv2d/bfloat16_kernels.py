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
from ..cpu.casts import cast
from ..cpu.jit import helper, njit
from ..cpu.microkernel import lanes, multiply_pairs_2d
from ..cpu.parallel import parallel
from ..cpu.vectors import load, splat, store_as, where
from ..memory import empty, empty_nhwc, to_nhwc
from ..registry import kernel
from .direct_kernels import padded, residues_are_convolutions
from .numba_kernels import residues
from .packing import pack
from .problem import CONV2D_BIAS_ACT, CONV2D_DGRAD, CONV2D_FPROP, out_hw

_ROWS = 8  # of a tile of two vectors
_NARROW_ROWS = 16  # of a tile of one: as many sums under way
_LANES = lanes(np.float32)
_PIXELS = 4096  # of a task that copies
_DTYPES = ("bfloat16",)


def _fprop_supports(x, w, *, stride, padding, dilation, groups):
    return groups == 1 and dilation[1] == 1 and w.shape[0] % _LANES == 0


@kernel(
    CONV2D_FPROP,
    device="cpu",
    step=4,
    supports=_fprop_supports,
    dtypes=_DTYPES,
    note="no patches, products of pairs of channels",
)
def fprop_direct_bfloat16(x, w, *, stride, padding, dilation, groups):
    return _convolve(x, w, stride, padding, dilation, *_nothing(x))


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
    skip = _nothing(x)[1] if z is None else bits(to_nhwc(z))
    return _convolve(x, w, stride, padding, dilation, cast(b, np.float32), skip, relu)


def _nothing(x):
    """No bias, no skip, no ReLU."""
    return np.zeros(0, np.float32), np.zeros((x.shape[0], 0, 0, 0), np.uint16), False


def _convolve(x, w, stride, padding, dilation, bias, z, relu):
    x, w = to_nhwc(x), cast(w, np.float32)
    if x.shape[3] % 2:  # a channel of zeros makes the pairs whole
        x, w = _one_channel_more(x), np.pad(w, ((0, 0), (0, 1), (0, 0), (0, 0)))
    hw = out_hw(x.shape[1:3], w.shape[2:], stride, padding, dilation)
    y, memory = empty_nhwc(x.shape[0], w.shape[0], *hw, x.dtype)
    panels, taps = _paired(pack(w, False)), w.shape[3]
    _fprop(len(x), bits(x), panels, bits(memory), taps, stride, padding, dilation[0], bias, z, relu)
    return y


def _one_channel_more(x):
    wider = empty((*x.shape[:3], x.shape[3] + 1), x.dtype)
    pixels = bits(x).reshape(-1, x.shape[3])
    _widen_pixels(-(-len(pixels) // _PIXELS), pixels, bits(wider).reshape(-1, wider.shape[3]))
    return wider


@parallel()
def _widen_pixels(b, x, wider):
    for i in range(b * _PIXELS, min((b + 1) * _PIXELS, len(x))):
        for l in range(x.shape[1]):
            wider[i, l] = x[i, l]
        wider[i, x.shape[1]] = 0


def _dgrad_supports(dy, w, *, stride, padding, dilation, groups, input_hw):
    whole = w.shape[0] % 2 == 0 and w.shape[1] % _LANES == 0
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
    panels = pack(cast(w, np.float32), True)
    for part, (r_taps, rows), (s_taps, cols) in residues(bits(memory), (r, s), stride, padding, dilation):
        chosen = _paired(panels[:, r_taps][:, :, s_taps])
        at = (-rows[0], -cols[0])
        _fprop(len(dy), bits(dy), chosen, part, len(s_taps), (1, 1), at, dilation[0], *_nothing(dy))
    return dx


def _paired(panels):
    """(panels, R, S, C, width) float32, which bfloat16 holds -> (panels, R, S*C/2, width) pairs of bfloat16."""
    count, r, s, c, width = panels.shape
    pairs = empty((count, r, s * c // 2, width), np.uint32)
    numbers = np.ascontiguousarray(panels).view(np.uint32).reshape(-1, 2, width)
    _pair_up(len(numbers), numbers, pairs.reshape(-1, width))
    return pairs


@parallel()
def _pair_up(i, numbers, pairs):
    _pair_rows(numbers[i, 0], numbers[i, 1], pairs[i])


@njit(inline=True)
def _pair_rows(first, second, pairs):
    for l in range(pairs.size):
        pairs[l] = (first[l] >> np.uint32(16)) | (second[l] & np.uint32(0xFFFF0000))


@parallel()
def _fprop(n, x, panels, y, taps, stride, padding, dilation, bias, z, relu):
    _fprop_image(x[n], panels, y[n], taps, stride, padding, dilation, bias, z[n], relu)


@helper()
def _fprop_image(x, panels, y, taps, stride, padding, dilation, bias, z, relu):
    c, (p_size, q_size, _), (n_panels, r_size, run, width) = x.shape[2], y.shape, panels.shape
    rows = padded(x, (p_size - 1) * stride[0] + (r_size - 1) * dilation + 1, q_size, taps, stride[1], padding)
    wide, size = width > _LANES, x.itemsize
    height = _ROWS if wide else _NARROW_ROWS
    tile, sums = np.empty((height, width), x.dtype), np.empty((height, width), np.float32)
    step, line = stride[1] * c, rows.shape[1] * c
    for j in range(n_panels):
        w = panels[j].ctypes.data
        for p in range(p_size):
            for q in range(0, q_size, height):
                whole = q + height <= q_size
                a = rows.ctypes.data + (p * stride[0] * line + q * step) * size
                place = y.ctypes.data + p * y.strides[0] + q * y.strides[1] + j * width * size
                out, out_row = (place, y.strides[1] // size) if whole else (tile.ctypes.data, width)
                if bias.size:
                    if wide:
                        multiply_pairs_2d(
                            a, step // 2, 1, dilation * line // 2, w, width, run * width,
                            sums.ctypes.data, width, run, r_size, False, _ROWS, 2, sums.dtype,
                        )  # fmt: skip
                    else:
                        multiply_pairs_2d(
                            a, step // 2, 1, dilation * line // 2, w, width, run * width,
                            sums.ctypes.data, width, run, r_size, False, _NARROW_ROWS, 1, sums.dtype,
                        )  # fmt: skip
                    for m in range(min(height, q_size - q)):
                        skip = z[p, q + m, j * width :] if z.size else z[:0, 0, 0]
                        _finish(sums[m], bias[j * width :], skip, relu, y[p, q + m, j * width :])
                    continue
                if wide:
                    multiply_pairs_2d(
                        a, step // 2, 1, dilation * line // 2, w, width, run * width,
                        out, out_row, run, r_size, False, _ROWS, 2, x.dtype,
                    )  # fmt: skip
                elif step == _LANES:  # the first stage of a CIFAR ResNet: a constant leaves registers for addresses
                    multiply_pairs_2d(
                        a, _LANES // 2, 1, dilation * line // 2, w, width, run * width,
                        out, out_row, run, r_size, False, _NARROW_ROWS, 1, x.dtype,
                    )  # fmt: skip
                else:
                    multiply_pairs_2d(
                        a, step // 2, 1, dilation * line // 2, w, width, run * width,
                        out, out_row, run, r_size, False, _NARROW_ROWS, 1, x.dtype,
                    )  # fmt: skip
                if not whole:
                    for m in range(q_size - q):
                        for l in range(width):
                            y[p, q + m, j * width + l] = tile[m, l]


@njit(inline=True)
def _finish(sums, bias, z, relu, y):
    """y = act(sums + bias + z), rounded."""
    zero = splat(np.float32(0), _LANES, sums.dtype)
    for l in range(0, sums.size, _LANES):
        v = load(sums[l:].ctypes.data, _LANES, sums.dtype) + load(bias[l:].ctypes.data, _LANES, bias.dtype)
        if z.size:
            v = v + load(z[l:].ctypes.data, _LANES, z.dtype)
        if relu:
            v = where(v <= zero, zero, v)  # a NaN stays
        store_as(y[l:].ctypes.data, v, y.dtype)
