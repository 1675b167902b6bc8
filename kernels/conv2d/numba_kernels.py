"""Convolution on the CPU: patches gathered block by block (im2col that stays in the cache), times register tiles.

Activations are read and written channels-last. All three directions are one idea, "gather the pixels that the taps
see, then multiply":

    fprop   output pixel p sees the input rows p*u + (r*l - a) for the taps r
    dgrad   input pixel h was seen by the output rows (h + a - r*l) / u, for those taps r where this is whole.
            Pixels h of one residue modulo u share their taps, so dgrad is u*v small convolutions over dy
    wgrad   the patches of fprop, transposed, times dy
"""

from __future__ import annotations

import numpy as np

from ..cpu.features import simd
from ..cpu.jit import helper
from ..cpu.microkernel import ROWS, lanes, multiply_tile
from ..cpu.parallel import parallel
from ..memory import empty_nhwc, to_nhwc, write
from ..registry import kernel
from .problem import CONV2D_DGRAD, CONV2D_FPROP, CONV2D_WGRAD, out_hw

_CACHE_NUMBERS = 1 << 17  # a block of patches: half a megabyte of float32, to stay in the second-level cache
_VECTOR_BYTES = simd().vector_bytes
_PARTIALS = 1 << 24  # numbers that the partial sums of wgrad may take


@kernel(CONV2D_FPROP, device="cpu", step=2, note="plain loops, parallel over output rows: what not to do")
def fprop_loops(x, w, *, stride, padding, dilation, groups):
    x, w = to_nhwc(x), np.ascontiguousarray(w)
    y, memory = empty_nhwc(
        x.shape[0], w.shape[0], *out_hw(x.shape[1:3], w.shape[2:], stride, padding, dilation), x.dtype
    )
    _loops(x.shape[0] * memory.shape[1], x, w, memory, stride, padding, dilation, groups)
    return y


@parallel()
def _loops(row, x, w, y, stride, padding, dilation, groups):
    _loops_row(x, w, y, stride, padding, dilation, groups, row)


@helper()
def _loops_row(x, w, y, stride, padding, dilation, groups, row):
    (h_size, w_size), (k_size, c_size, r_size, s_size) = x.shape[1:3], w.shape
    n, p = divmod(row, y.shape[1])
    for q in range(y.shape[2]):
        for k in range(k_size):
            first = k // (k_size // groups) * c_size
            total = x.dtype.type(0)
            for r in range(r_size):
                h = p * stride[0] + r * dilation[0] - padding[0]
                for s in range(s_size):
                    v = q * stride[1] + s * dilation[1] - padding[1]
                    if 0 <= h < h_size and 0 <= v < w_size:
                        for c in range(c_size):
                            total += x[n, h, v, first + c] * w[k, c, r, s]
            y[n, p, q, k] = total


@kernel(CONV2D_FPROP, device="cpu", step=3, note="patches gathered per cache block, register-tile product")
def fprop_im2col_tile(x, w, *, stride, padding, dilation, groups):
    x = to_nhwc(x)
    y, memory = empty_nhwc(
        x.shape[0], w.shape[0], *out_hw(x.shape[1:3], w.shape[2:], stride, padding, dilation), x.dtype
    )
    rows, cols = _taps(w.shape[2:], padding, dilation)
    _convolve(x, w.transpose(0, 2, 3, 1), memory, rows, cols, stride, groups)
    return y


@kernel(CONV2D_DGRAD, device="cpu", step=2, note="stride² convolutions over dy, one per residue of the pixel")
def dgrad_im2col_tile(dy, w, *, stride, padding, dilation, groups, input_hw):
    dy, (k, c, r, s) = to_nhwc(dy), w.shape
    dx, memory = empty_nhwc(dy.shape[0], c * groups, *input_hw, dy.dtype)
    # Transposed within its group: (K, C, R, S) -> (C*groups, R, S, K/groups)
    turned = w.reshape(groups, k // groups, c, r, s).transpose(0, 2, 3, 4, 1).reshape(c * groups, r, s, k // groups)
    for part, (r_taps, rows), (s_taps, cols) in residues(memory, (r, s), stride, padding, dilation):
        _convolve(dy, turned[:, r_taps][:, :, s_taps], part, rows, cols, (1, 1), groups)
    return dx


@kernel(
    CONV2D_WGRAD, device="cpu", step=2, note="patches gathered per cache block, transposed register tile, split sum"
)
def wgrad_im2col_tile(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    x, dy = to_nhwc(x), to_nhwc(dy)
    (n, p, q, k), c = dy.shape, x.shape[3] // groups
    rows, cols = _taps(kernel_hw, padding, dilation)
    taps = rows.size * cols.size * c
    width = lanes(x.dtype) * (1 if k // groups <= lanes(x.dtype) else 2)
    shape = (groups, _round_up(taps, ROWS), _round_up(k // groups, width))
    block = _block(shape[1])
    # The sum over pixels is split by shape alone, never by threads: the same bits on any machine size.
    splits = max(1, min(32, _PARTIALS // int(np.prod(shape)), n * p * q // block))
    partial = np.zeros((splits, *shape), x.dtype)
    _wgrad_splits(len(partial), x, dy, partial, rows, cols, stride, groups, block, width)
    dw = partial.sum(0)[:, :taps, : k // groups].reshape(groups, *kernel_hw, c, k // groups)
    return np.ascontiguousarray(dw.transpose(0, 4, 3, 1, 2)).reshape(k, c, *kernel_hw)


def _taps(rs, padding, dilation):
    """Where each tap of the filter looks, relative to an output pixel times stride."""
    return tuple(np.arange(t) * d - p for t, d, p in zip(rs, dilation, padding, strict=True))


def residues(dx, rs, stride, padding, dilation):
    """dx (N, H, W, C) by residue of the pixel modulo the stride: (part, (taps, rows of dy), (taps, columns)) of each.

    All pixels of a part saw the same taps, so that it is a convolution of its own. Parts that no window saw are set to
    zero, and left out.
    """
    for a in range(min(stride[0], dx.shape[1])):
        of_rows = taps_of_residue(a, rs[0], stride[0], padding[0], dilation[0])
        for b in range(min(stride[1], dx.shape[2])):
            of_columns = taps_of_residue(b, rs[1], stride[1], padding[1], dilation[1])
            part = dx[:, a :: stride[0], b :: stride[1]]
            if len(of_rows[0]) and len(of_columns[0]):
                yield part, of_rows, of_columns
            else:
                write(part, 0)


def taps_of_residue(a, taps, stride, padding, dilation):
    """For input pixels h = a + stride*i: the taps that saw them, and at which output row relative to i."""
    seen = [t for t in reversed(range(taps)) if (a + padding - t * dilation) % stride == 0]
    return seen, np.array([(a + padding - t * dilation) // stride for t in seen], np.int64)


def _round_up(n, multiple):
    return -(-n // multiple) * multiple


def _block(numbers_per_pixel):
    """Pixels per block: a multiple of the tile's rows whose patches fit in the cache."""
    return max(2 * ROWS, min(32 * ROWS, _CACHE_NUMBERS // numbers_per_pixel // ROWS * ROWS))


def _convolve(x, w, y, rows, cols, stride, groups):
    """x (N, H, W, C), w (K, R, S, C/groups), y (N, P, Q, K), of any strides but contiguous K."""
    k, (n, p, q, _) = w.shape[0] // groups, y.shape
    taps = int(np.prod(w.shape[1:]))
    width = lanes(x.dtype) * (1 if k <= lanes(x.dtype) else 2)
    panels = np.zeros((groups, _round_up(k, width), taps), x.dtype)
    panels[:, :k] = w.reshape(groups, k, taps)
    panels = np.ascontiguousarray(panels.reshape(groups, -1, width, taps).transpose(0, 1, 3, 2))
    _convolve_blocks(-(-(n * p * q) // _block(taps)), x, panels, y, rows, cols, stride, k, n * p * q, _block(taps))


@parallel()
def _convolve_blocks(b, x, panels, y, rows, cols, stride, k, pixels, block):
    first = b * block
    _convolve_block(x, panels, y, rows, cols, stride, k, first, min(block, pixels - first))


@helper()
def _convolve_block(x, panels, y, rows, cols, stride, k, first, count):
    groups, n_panels, taps, width = panels.shape
    c = taps // (rows.size * cols.size)
    patches = np.empty(((count + ROWS - 1) // ROWS * ROWS, taps), x.dtype)
    patches[count:] = 0
    tile = np.empty((ROWS, width), x.dtype)
    p_size, q_size = y.shape[1], y.shape[2]
    pixel = y.strides[2] // y.itemsize
    side_by_side = y.strides[1] == q_size * y.strides[2] and y.strides[0] == p_size * y.strides[1]
    for g in range(groups):
        _gather(x, g * c, c, rows, cols, stride, first, count, p_size, q_size, patches)
        for j in range(n_panels):
            start = g * k + j * width
            channels = min(width, k - j * width)
            for i in range(0, count, ROWS):
                n, pq = divmod(first + i, p_size * q_size)
                p, q = divmod(pq, q_size)
                whole = side_by_side and channels == width and count - i >= ROWS  # the tile can go straight into y
                out = np.int64(tile.ctypes.data)  # unsigned, it would be a float to Numba
                if whole:
                    out = y.ctypes.data + ((first + i) * pixel + start) * y.itemsize
                _tile(
                    patches.ctypes.data + i * taps * x.itemsize, taps, 1, panels[g, j].ctypes.data, width,
                    out, pixel if whole else width, taps, False, width, x,
                )  # fmt: skip
                if not whole:
                    for m in range(min(ROWS, count - i)):
                        for l in range(channels):
                            y[n, p, q, start + l] = tile[m, l]
                        q += 1
                        if q == q_size:
                            p, q = p + 1, 0
                        if p == p_size:
                            n, p = n + 1, 0


@helper(inline=True)
def _tile(a, a_row, a_step, b, b_step, c, c_row, steps, accumulate, width, x):
    if width * x.itemsize <= _VECTOR_BYTES:
        multiply_tile(a, a_row, a_step, b, b_step, c, c_row, steps, accumulate, ROWS, 1, x.dtype)
    else:
        multiply_tile(a, a_row, a_step, b, b_step, c, c_row, steps, accumulate, ROWS, 2, x.dtype)


@helper()
def _gather(x, channel, c, rows, cols, stride, first, count, p_size, q_size, patches):
    """Row i of `patches`: what output pixel number first + i sees, in the order (r, s, c); zeros outside x."""
    _, h_size, w_size, c_all = x.shape
    pixels = x.reshape(-1)
    # Taps side by side over all channels are one run of memory.
    dense = c == c_all and (cols.size == 1 or cols[1] - cols[0] == 1)
    run = cols.size * c
    for i in range(count):
        n, pq = divmod(first + i, p_size * q_size)
        p, q = divmod(pq, q_size)
        left = q * stride[1] + cols[0]
        inside = dense and left >= 0 and left + cols.size <= w_size
        for r in range(rows.size):
            h = p * stride[0] + rows[r]
            at = r * run
            if h < 0 or h >= h_size:
                for l in range(run):
                    patches[i, at + l] = 0
            elif inside:
                start = ((n * h_size + h) * w_size + left) * c
                for l in range(run):
                    patches[i, at + l] = pixels[start + l]
            else:
                for s in range(cols.size):
                    w = q * stride[1] + cols[s]
                    if 0 <= w < w_size:
                        for l in range(c):
                            patches[i, at + s * c + l] = x[n, h, w, channel + l]
                    else:
                        for l in range(c):
                            patches[i, at + s * c + l] = 0


@parallel()
def _wgrad_splits(t, x, dy, partial, rows, cols, stride, groups, block, width):
    pixels = dy.shape[0] * dy.shape[1] * dy.shape[2]
    splits = partial.shape[0]
    start, stop = pixels * t // splits, pixels * (t + 1) // splits
    _wgrad_split(x, dy, partial[t], rows, cols, stride, groups, block, width, start, stop)


@helper()
def _wgrad_split(x, dy, dw, rows, cols, stride, groups, block, width, start, stop):
    _, p_size, q_size, k_all = dy.shape
    k, c, (taps, columns) = k_all // groups, x.shape[3] // groups, dw.shape[1:]
    flat_dy = dy.reshape(-1, k_all)
    patches = np.zeros((block, taps), x.dtype)
    upstream = np.zeros((block, columns), x.dtype)
    for first in range(start, stop, block):
        count = min(block, stop - first)
        for g in range(groups):
            _gather(x, g * c, c, rows, cols, stride, first, count, p_size, q_size, patches)
            for i in range(count):
                for l in range(k):
                    upstream[i, l] = flat_dy[first + i, g * k + l]
            for j in range(0, columns, width):
                for i in range(0, taps, ROWS):
                    _tile(
                        patches[:, i:].ctypes.data,
                        1,
                        taps,
                        upstream[:, j:].ctypes.data,
                        columns,
                        dw[g, i:, j:].ctypes.data,
                        columns,
                        count,
                        True,
                        width,
                        x,
                    )
