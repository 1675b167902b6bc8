"""Filters as the register tile wants them: panels of one or two vectors of output channels, for each tap and channel.

Parameters lie as (K, C, R, S). Reading a panel from there, one number at a time, cost more than the convolution itself
for the small images of a ResNet's last stage; here square blocks are transposed in registers.
"""

from __future__ import annotations

import numpy as np

from ..cpu.bfloat16 import bits
from ..cpu.features import simd
from ..cpu.jit import helper
from ..cpu.microkernel import LINE, lanes
from ..cpu.parallel import parallel
from ..cpu.transforms import copy, move, transpose_block
from ..cpu.vectors import load, store, store_as
from ..kept import kept
from ..memory import contiguous, empty, write

_VECTOR_BYTES = simd().vector_bytes
_FLOATS = lanes(np.float32)
_HALF = _FLOATS // 2  # divides what vectors of float64 hold, too


def panel_width(k, dtype):
    """Output channels of a panel: two vectors where they divide k, else one."""
    return lanes(dtype) * (2 if k % (2 * lanes(dtype)) == 0 else 1)


@kept
def pack(w, turned):
    """w (K, C, R, S) -> (panels of K, R, S, C, width), turned, last tap first: (panels of C, R, S, K, width)."""
    w = contiguous(w)
    outputs, inputs = (w.shape[1], w.shape[0]) if turned else w.shape[:2]
    width = panel_width(outputs, w.dtype)
    panels = empty((outputs // width, *w.shape[2:], inputs, width), w.dtype)
    _pack(len(panels), w, turned, panels)
    return panels


def of_residue(panels, r_taps, s_taps):
    """Of filters turned round: those taps of `numba_kernels.residues`. Without a stride nothing is copied."""
    chosen = panels[:, _chosen(panels.shape[1], r_taps), _chosen(panels.shape[2], s_taps)]
    if chosen.flags.c_contiguous:
        return chosen
    copied = empty(chosen.shape, chosen.dtype)  # at the start of a cache line
    write(copied, chosen)
    return copied


def _chosen(count, taps):
    """Taps, in descending order and equally far apart, as a slice of `count` of which the last comes first."""
    return slice(count - 1 - taps[0], None, taps[0] - taps[1] if len(taps) > 1 else count)


@helper(inline=True)
def aligned(n, like):
    """n uninitialised numbers of the dtype of `like`, from the start of a cache line."""
    numbers = LINE // like.itemsize
    memory = np.empty(n + numbers, like.dtype)
    first = (-memory.ctypes.data % LINE) // like.itemsize
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
            transpose(w, ((first + i) * c + output) * rs, rs, rs, width, taps, i * rs)
    else:
        transpose(w, (output * c + first) * rs, c * rs, count * rs, width, taps, 0)


@helper()
def transpose(w, at, row, columns, width, out, first):
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

    parts: (how many, numbers of each), float32 for a `dtype` of bfloat16; strides: of panels of K (`panel_width`), C, R
    and S in one of them. K is a whole number of vectors.
    """
    dw, width = empty(shape, dtype), panel_width(shape[0], parts.dtype)
    _unpack(shape[0] // width, parts, bits(dw), strides, width)
    return dw


@parallel()
def _unpack(j, parts, dw, strides, width):
    _unpack_panel(parts, dw, strides, width, j)


@helper()
def _unpack_panel(parts, dw, strides, width, panel):
    """The filters of a panel: their taps are summed in rows of `width`, which are then transposed in square blocks."""
    (_, c, r_size, s_size), vector, size = dw.shape, _VECTOR_BYTES // parts.itemsize, parts.itemsize
    taps = r_size * s_size
    columns = c * taps
    rows, turned = aligned((columns + vector) * width, parts), aligned(vector * vector, parts)
    for t in range(taps):
        tap = panel * strides[0] + t // s_size * strides[2] + t % s_size * strides[3]
        for i in range(c):
            source, target = parts.ctypes.data + (tap + i * strides[1]) * size, (i * taps + t) * width * size
            for l in range(0, width * size, _HALF * size):
                total = load(source + l, _HALF, parts.dtype)
                for m in range(1, parts.shape[0]):
                    total = total + load(source + m * parts.strides[0] + l, _HALF, parts.dtype)
                store(rows.ctypes.data + target + l, total)
    for l in range(0, width, vector):
        for j in range(0, columns, vector):
            source, at = rows.ctypes.data + (j * width + l) * size, (panel * width + l) * columns + j
            target, count = dw.ctypes.data + at * dw.itemsize, min(vector, columns - j)
            if count == vector and dw.itemsize == size:
                transpose_block(source, width, target, columns, parts.dtype)
                continue
            transpose_block(source, width, turned.ctypes.data, vector, parts.dtype)
            for m in range(vector):
                line = turned.ctypes.data + m * vector * size
                if dw.itemsize < size:  # to bfloat16
                    numbers = load(line, _FLOATS, parts.dtype)
                    store_as(line if count < vector else target, numbers, dw.dtype)
                if count < vector or dw.itemsize == size:
                    move(line, target, count * dw.itemsize)
                target += columns * dw.itemsize
