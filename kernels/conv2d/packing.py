"""Filters as the register tile wants them: panels of one or two vectors of output channels, for each tap and channel.

Parameters lie as (K, C, R, S). Reading a panel from there, one number at a time, cost more than the convolution itself
for the small images of a ResNet's last stage; here square blocks are transposed in registers.
"""

from __future__ import annotations

import numpy as np

from ..cpu.bfloat16 import bits
from ..cpu.features import simd
from ..cpu.jit import helper
from ..cpu.microkernel import lanes
from ..cpu.parallel import parallel
from ..cpu.transforms import copy, move, transpose_block
from ..cpu.vectors import load, store_as
from ..kept import kept
from ..memory import empty

_VECTOR_BYTES, _LINE = simd().vector_bytes, 64
_FLOATS = lanes(np.float32)


def panel_width(k, dtype):
    """Output channels of a panel: two vectors where they divide k, else one."""
    return lanes(dtype) * (2 if k % (2 * lanes(dtype)) == 0 else 1)


@kept
def pack(w, turned):
    """w (K, C, R, S) -> (panels of K, R, S, C, width), turned, last tap first: (panels of C, R, S, K, width)."""
    w = np.ascontiguousarray(w)
    outputs, inputs = (w.shape[1], w.shape[0]) if turned else w.shape[:2]
    width = panel_width(outputs, w.dtype)
    panels = empty((outputs // width, *w.shape[2:], inputs, width), w.dtype)
    _pack(len(panels), w, turned, panels)
    return panels


def of_residue(panels, r_taps, s_taps):
    """Of filters turned round: those taps of `numba_kernels.residues`. Without a stride nothing is copied."""
    r, s = panels.shape[1:3]
    rows, columns = (range(n)[n - 1 - t[0] :: t[0] - t[1] if t[1:] else n] for n, t in ((r, r_taps), (s, s_taps)))
    return np.ascontiguousarray(
        panels[:, rows.start : rows.stop : rows.step, columns.start : columns.stop : columns.step]
    )


@helper(inline=True)
def aligned(n, like):
    """n uninitialised numbers of the dtype of `like`, from the start of a cache line."""
    numbers = _LINE // like.itemsize
    memory = np.empty(n + numbers, like.dtype)
    first = (-memory.ctypes.data % _LINE) // like.itemsize
    return memory[first : first + n]


@helper()
def read_taps(w, turned, output, first, count, width, taps):
    """taps[i, t, l] = tap t of w[output + l, first + i], or turned: of w[first + i, output + l]; i < count, l < width.

    `taps` is flat, and has room for a vector of rows more.
    """
    c, rs = w.shape[1], w.shape[2] * w.shape[3]
    if turned and rs == 1:  # they lie as they should
        for i in range(count):
            source = w.ctypes.data + ((first + i) * c + output) * w.itemsize
            copy(source, taps.ctypes.data + i * width * w.itemsize, width, w.dtype)
    elif turned:
        for i in range(count):
            _transpose(w, ((first + i) * c + output) * rs, rs, rs, width, taps, i * rs)
    else:
        _transpose(w, (output * c + first) * rs, c * rs, count * rs, width, taps, 0)


@helper()
def _transpose(w, at, row, columns, width, out, first):
    """out[first + j, l] = w.flat[at + l * row + j] for j < columns; rows after that may be overwritten."""
    size, vector = w.itemsize, _VECTOR_BYTES // w.itemsize
    flat = w.reshape(-1)
    for l in range(0, width, vector):
        for j in range(0, columns, vector):
            start = at + l * row + j
            if start + (vector - 1) * row + vector <= w.size:
                target = out.ctypes.data + ((first + j) * width + l) * size
                transpose_block(w.ctypes.data + start * size, row, target, width, w.dtype)
            else:
                for i in range(min(vector, columns - j)):
                    for m in range(vector):
                        out[(first + j + i) * width + l + m] = flat[start + m * row + i]


@parallel()
def _pack(j, w, turned, panels):
    _pack_panel(w, turned, j, panels[j])


@helper()
def _pack_panel(w, turned, j, panel):
    r_size, s_size, inputs, width = panel.shape
    rs = r_size * s_size
    if rs == 1 and inputs % (_VECTOR_BYTES // w.itemsize) == 0:  # what `read_taps` makes is the panel, and no more
        read_taps(w, turned, j * width, 0, inputs, width, panel.reshape(-1))
        return
    taps = aligned((inputs * rs + _VECTOR_BYTES // w.itemsize) * width, w)
    read_taps(w, turned, j * width, 0, inputs, width, taps)
    size = w.itemsize
    for i in range(inputs):
        for t in range(rs):
            source = taps.ctypes.data + (i * rs + t) * width * size
            tap = rs - 1 - t if turned else t
            copy(source, panel.ctypes.data + (tap * inputs + i) * width * size, width, w.dtype)


@helper()
def add_transposed(taps, rows, width, dw, at, row):
    """dw.flat[at + l * row + j] += taps[j, l] for j < rows, l < width: gradients back in the parameters' order."""
    size, vector = dw.itemsize, _VECTOR_BYTES // dw.itemsize
    flat, block = dw.reshape(-1), aligned(vector * vector, dw)
    for l in range(0, width, vector):
        for j in range(0, rows, vector):
            if j + vector <= rows:
                transpose_block(taps.ctypes.data + (j * width + l) * size, width, block.ctypes.data, vector, dw.dtype)
                for m in range(vector):
                    for i in range(vector):
                        flat[at + (l + m) * row + j + i] += block[m * vector + i]
            else:
                for m in range(vector):
                    for i in range(rows - j):
                        flat[at + (l + m) * row + j + i] += taps[(j + i) * width + l + m]


def unpacked(parts, strides, shape, dtype):
    """dw (K, C, R, S), of this shape and dtype, from partial sums of wgrad: added up, in order, and laid out.

    parts: (how many, numbers of each), float32 for a `dtype` of bfloat16; strides: of C, R and S in one of them, in
    which K are side by side, a whole number of vectors.
    """
    dw = empty(shape, dtype)
    _unpack(shape[0] // lanes(parts.dtype), parts, bits(dw), strides)
    return dw


@parallel()
def _unpack(j, parts, dw, strides):
    _unpack_filters(parts, dw, strides, j * (_VECTOR_BYTES // parts.itemsize))


@helper()
def _unpack_filters(parts, dw, strides, first):
    """As many filters of dw as a vector has numbers: blocks of as many of their taps are summed, then transposed."""
    (_, c, r, s), vector = dw.shape, _VECTOR_BYTES // parts.itemsize
    columns, flat = c * r * s, dw.reshape(-1)
    block, turned = aligned(vector * vector, parts), aligned(vector * vector, parts)
    for start in range(0, columns, vector):
        count = min(vector, columns - start)
        for i in range(count):
            channel, tap = divmod(start + i, r * s)
            at = channel * strides[0] + tap // s * strides[1] + tap % s * strides[2] + first
            for l in range(vector):
                block[i * vector + l] = parts[0, at + l]
            for m in range(1, parts.shape[0]):
                for l in range(vector):
                    block[i * vector + l] += parts[m, at + l]
        transpose_block(block.ctypes.data, vector, turned.ctypes.data, vector, parts.dtype)
        for l in range(vector):
            source, at = turned.ctypes.data + l * vector * parts.itemsize, (first + l) * columns + start
            if parts.itemsize > dw.itemsize:  # to bfloat16
                row = load(source, _FLOATS, parts.dtype)
                if count == vector:
                    store_as(flat.ctypes.data + at * 2, row, dw.dtype)
                    continue
                store_as(source, row, dw.dtype)
                move(source, flat.ctypes.data + at * 2, count * 2)
            else:
                move(source, flat.ctypes.data + at * dw.itemsize, count * dw.itemsize)
