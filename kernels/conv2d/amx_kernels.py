"""Convolution of bfloat16 on AMX tiles (cpu/amx.py): the direct kernels' idea, a block of 32 x 32 sums at a time.

    fprop   y[m, k] = sum over r, (s c) of row_r[m, (s c)] * w[r, (s c), k]     m: output pixels, one after the other
    dgrad   fprop over dy, the filter turned round and transposed; at stride u, each residue modulo u by itself

An image is copied once into a buffer with zeros around, its channels filled up to a multiple of 32, so that the taps of
a filter's row are whole tiles. Rows of a tile are pixels of the output, neighbours in memory; where rows of the output
are short, tiles run over their ends into the next row (`_pitch`), and what lies between two rows is not written.
Filters are packed once per call, two neighbouring channels side by side. Summed in float32; bias, skip, ReLU and the
rounding are done on the block of sums.

Compiled for hosts with AMX and tested by emulation; not yet run on hardware.
"""

from __future__ import annotations

import numpy as np

from ..cpu.amx import configure, new_state, release, tile_dot, tile_load, tile_store, tile_zero
from ..cpu.bfloat16 import bits
from ..cpu.casts import cast
from ..cpu.features import amx
from ..cpu.jit import helper
from ..cpu.microkernel import lanes
from ..cpu.parallel import parallel
from ..cpu.vectors import load, splat, store_as, where
from ..memory import empty, empty_nhwc, to_nhwc
from ..registry import kernel
from .direct_kernels import residues_are_convolutions
from .numba_kernels import residues
from .problem import CONV2D_BIAS_ACT, CONV2D_DGRAD, CONV2D_FPROP, out_hw

_BLOCK = 32  # pixels, and filters, of a block of 2 x 2 tiles of sums; channels of a step
_LANES = lanes(np.float32)
_DTYPES = ("bfloat16",)


def _fprop_supports(x, w, *, stride, padding, dilation, groups):
    return bool(amx()) and groups == 1 and dilation[1] == 1 and w.shape[0] % _LANES == 0


def _rank(_, w, *more, **params):
    """First, unless most of a tile would be zeros."""
    return 6.0 if min(w.shape[:2]) >= 16 else 3.8


@kernel(
    CONV2D_FPROP, device="cpu", step=6, supports=_fprop_supports, rank=_rank, dtypes=_DTYPES, note="AMX: 32 x 32 sums"
)
def fprop_amx(x, w, *, stride, padding, dilation, groups):
    return _convolve(x, w, stride, padding, dilation, *_nothing(x))


def _bias_act_supports(x, w, b, z, *, relu, **params):
    return _fprop_supports(x, w, **params)


@kernel(
    CONV2D_BIAS_ACT,
    device="cpu",
    step=6,
    supports=_bias_act_supports,
    rank=_rank,
    dtypes=_DTYPES,
    note="AMX; bias, skip and ReLU on the block of sums",
)
def bias_act_amx(x, w, b, z, *, stride, padding, dilation, groups, relu):
    skip = _nothing(x)[1] if z is None else bits(to_nhwc(z))
    return _convolve(x, w, stride, padding, dilation, cast(b, np.float32), skip, relu)


def _dgrad_supports(dy, w, *, stride, padding, dilation, groups, input_hw):
    whole = w.shape[1] % _LANES == 0
    return bool(amx()) and groups == 1 and whole and residues_are_convolutions(w, stride, padding, dilation)


@kernel(
    CONV2D_DGRAD,
    device="cpu",
    step=6,
    supports=_dgrad_supports,
    rank=_rank,
    dtypes=_DTYPES,
    note="AMX: stride² convolutions over dy",
)
def dgrad_amx(dy, w, *, stride, padding, dilation, groups, input_hw):
    dy, (_, c, r, s) = to_nhwc(dy), w.shape
    dx, memory = empty_nhwc(dy.shape[0], c, *input_hw, dy.dtype)
    turned = bits(w).transpose(1, 0, 2, 3)
    for part, (r_taps, rows), (s_taps, cols) in residues(bits(memory), (r, s), stride, padding, dilation):
        chosen = _packed(turned[:, :, r_taps][:, :, :, s_taps])
        at = (-rows[0], -cols[0])
        _fprop(len(dy), bits(dy), chosen, part, len(s_taps), (1, 1), at, dilation[0], *_nothing(dy))
    return dx


def _nothing(x):
    """No bias, no skip, no ReLU."""
    return np.zeros(0, np.float32), np.zeros((x.shape[0], 0, 0, 0), np.uint16), False


def _convolve(x, w, stride, padding, dilation, bias, z, relu):
    x = to_nhwc(x)
    hw = out_hw(x.shape[1:3], w.shape[2:], stride, padding, dilation)
    y, memory = empty_nhwc(x.shape[0], w.shape[0], *hw, x.dtype)
    panels = _packed(bits(w))
    _fprop(len(x), bits(x), panels, bits(memory), w.shape[3], stride, padding, dilation[0], bias, z, relu)
    return y


def _packed(w):
    """Bits (K, C, R, S) -> panels of 32 filters (panels, R, S*C/2, 32, 2), both filled up with zeros."""
    k, c, r, s = w.shape
    wide, deep = -(-k // _BLOCK), -(-c // _BLOCK) * _BLOCK
    panels = empty((wide, r, s * deep // 2, _BLOCK, 2), w.dtype)
    _pack(wide * r * s, np.ascontiguousarray(w), panels, deep)
    return panels


@parallel()
def _pack(task, w, panels, deep):
    k, c, r_size, s_size = w.shape
    j, tap = divmod(task, r_size * s_size)
    r, s = divmod(tap, s_size)
    for i in range(deep):
        pairs = panels[j, r, (s * deep + i) // 2]
        for l in range(_BLOCK):
            filter_ = j * _BLOCK + l
            pairs[l, i % 2] = w[filter_, i, r, s] if filter_ < k and i < c else np.uint16(0)


@parallel()
def _fprop(n, x, panels, y, taps, stride, padding, dilation, bias, z, relu):
    state, sums = new_state(), np.empty((_BLOCK, _BLOCK), np.float32)
    p_size, q_size, _ = y[n].shape
    deep = panels.shape[2] * 2 // taps
    height = (p_size - 1) * stride[0] + (panels.shape[1] - 1) * dilation + 1
    width = ((q_size - 1) * stride[1] + taps + stride[1] - 1) // stride[1] * stride[1]
    rows = _padded(x[n], height, width, deep, _BLOCK * stride[1] + taps, padding)
    pitch = _pitch(p_size, q_size, stride[0] * (width // stride[1]))
    _image(state, rows, width, panels, y[n], deep, pitch, stride, dilation, bias, z[n], relu, sums)


@helper()
def _padded(x, height, width, deep, spare, padding):
    """The rows that the windows see, (height * width + spare, deep), zeros around and in channels that x has not."""
    h_size, w_size, c = x.shape
    rows = np.zeros((height * width + spare, deep), x.dtype)
    for i in range(max(0, padding[0]), min(height, padding[0] + h_size)):
        for j in range(padding[1], min(width, padding[1] + w_size)):
            to, source = rows[i * width + j], x[i - padding[0], j - padding[1]]
            for l in range(c):
                to[l] = source[l]
    return rows


@helper()
def _pitch(p_size, q_size, pitch):
    """Pixels from the start of an output's row to the next one's, where tiles run over; 0 where each begins anew."""
    row_by_row = p_size * ((q_size + _BLOCK - 1) // _BLOCK)
    return pitch if ((p_size - 1) * pitch + q_size + _BLOCK - 1) // _BLOCK < row_by_row else 0


@helper()
def _image(state, rows, width, panels, y, deep, pitch, stride, dilation, bias, z, relu, sums):
    """All blocks of an image. Nothing here can raise: the tiles are released at its end."""
    (p_size, q_size, k), (n_panels, r_size, pairs, _, _), size = y.shape, panels.shape, rows.itemsize
    step, line = stride[1] * deep * size, dilation * width * deep * size
    runs, length = (1, (p_size - 1) * pitch + q_size) if pitch else (p_size, q_size)
    configure(state)
    for j in range(n_panels):
        columns = min(_BLOCK, k - j * _BLOCK)
        for run in range(runs):
            for first in range(0, length, _BLOCK):
                a = rows.ctypes.data + run * stride[0] * width * deep * size + first * step
                _multiply(state, a, step, line, panels[j].ctypes.data, pairs, r_size, sums.ctypes.data)
                for m in range(first, min(first + _BLOCK, length)):
                    p, q = (m // pitch, m % pitch) if pitch else (run, m)
                    if q < q_size:
                        out, skip = y[p, q], z[p, q] if z.size else z[:0, 0, 0]
                        _finish(sums[m - first], bias, skip, relu, out, j * _BLOCK, columns)
    release(state)


@helper()
def _multiply(state, a, a_row, a_outer, b, pairs, outer, c):
    """32 x 32 sums into c, rows of 128 bytes: over `outer` rows of a filter and the pairs of each, 16 a step."""
    tile_zero(state, 0)
    tile_zero(state, 1)
    tile_zero(state, 2)
    tile_zero(state, 3)
    for o in range(outer):
        for i in range(0, pairs, 16):
            left, right = a + o * a_outer + 4 * i, b + (o * pairs + i) * 128
            tile_load(state, 4, left, a_row)
            tile_load(state, 6, right, 128)
            tile_load(state, 7, right + 64, 128)
            tile_load(state, 5, left + 16 * a_row, a_row)
            tile_dot(state, 0, 4, 6)
            tile_dot(state, 1, 4, 7)
            tile_dot(state, 2, 5, 6)
            tile_dot(state, 3, 5, 7)
    tile_store(state, 0, c, 128)
    tile_store(state, 1, c + 64, 128)
    tile_store(state, 2, c + 16 * 128, 128)
    tile_store(state, 3, c + 16 * 128 + 64, 128)


@helper(inline=True)
def _finish(sums, bias, z, relu, y, first, columns):
    """y = act(sums + bias + z), rounded, for some columns of y from `first` on."""
    zero = splat(np.float32(0), _LANES, sums.dtype)
    for l in range(0, columns, _LANES):
        v = load(sums[l:].ctypes.data, _LANES, sums.dtype)
        if bias.size:
            v = v + load(bias[first + l :].ctypes.data, _LANES, bias.dtype)
        if z.size:
            v = v + load(z[first + l :].ctypes.data, _LANES, z.dtype)
        if relu:
            v = where(v <= zero, zero, v)  # a NaN stays
        store_as(y[first + l :].ctypes.data, v, y.dtype)
