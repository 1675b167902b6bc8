"""The product behind fprop and dgrad of a convolution with many channels: pixels gathered a tile at a time.

    y[m, k] = sum over taps t and channels c of x[what pixel m sees through t, c] * panels[t, c, k]

A task takes some pixels and some panels of filters. For each tile of pixels it copies what they see into the
first-level cache, in rows a fixed distance apart, and multiplies it by one panel after the other; a block of panels,
over some hundred steps of the sum, stays in the second-level cache. Sums are formed beside it, too, and written to y,
row by row, when they are finished. So nothing depends on how far apart pixels lie: in place, those of many
channels are a multiple of 4096 bytes apart and push each other out of the cache. Strides, padding and taps cost only
the copy, of which each number is multiplied by all filters; the rows of y may lie anywhere.

Memory is asked for while products are summed, a line at each step: the next tile's x (64 to 64 channels at 56x56 took
1.29 ms instead of 1.94), then the rows of z and y that this tile ends with (64 to 256 with a skip took 3.3 ms instead
of 4.7, where each small tile had read z and written y by itself, at 14 places 4096 bytes or a part of that apart).

Sums are split by channels and taps alone, so that no result depends on how tasks are shared out.
"""

from __future__ import annotations

import numpy as np

from ..cpu.features import simd
from ..cpu.jit import get_num_threads, helper
from ..cpu.microkernel import lines_of, multiply_fetching
from ..cpu.parallel import parallel
from ..cpu.transforms import copy
from ..memory import contiguous
from .epilogue import finish
from .genstats import add_up, new_sums
from .packing import aligned

# Of a tile. 14 x 2 sums, two vectors of B and a broadcast are 31 of 32 registers, and 14 divides a ResNet's images.
_ROWS = 14 if simd().tile_rows == 12 else simd().tile_rows
_DEPTH = 512  # of a block of the sum
_PAD = 16  # numbers after each row of a tile, so that rows are not a multiple of 4096 bytes apart
_ROW = _DEPTH + _PAD
_CACHE_NUMBERS = 1 << 17  # of a block of panels: half a megabyte of float32
_TILES = 14  # of a task: its sums are added to by one block of steps after the other, and should not leave the cache
_VECTOR_BYTES = simd().vector_bytes
_SHARES = 8  # statistics are summed in blocks that any number of threads cuts alike


def multiply_gathered(x, panels, y, rows, cols, stride, bias, z, add, floor, statistics=False):
    """x (N, H, W, C), panels (panels of K, R, S, C, width), y (N, P, Q, K) of any strides but contiguous K; C a
    whole number of vectors.

    rows (R,), cols (S,): where each tap looks, relative to an output pixel times stride. bias, z, add, floor: of
    `epilogue`. Returns the sums of its statistics, where they are wanted.
    """
    n_panels, r, s, c, width = panels.shape
    pixels, vector = y.size // y.shape[3], _VECTOR_BYTES // x.itemsize
    steps = r * s * c
    blocks = -(-steps // _DEPTH)
    depth = -(-steps // (blocks * vector)) * vector
    side = -(-n_panels // max(1, _CACHE_NUMBERS // (depth * width)))  # blocks of panels
    tiles, threads = -(-pixels // _ROWS), _SHARES if statistics else get_num_threads()
    parts = min(tiles, -(-tiles // (_TILES * threads)) * threads)  # of equal size, equally many for each thread
    sums = new_sums(parts, y.shape[3], statistics)
    panels = panels.reshape(n_panels, steps, width)
    x = contiguous(x)
    _multiply(side * parts, x, panels, y, rows, cols, stride, bias, z, add, floor, depth, side, parts, sums)
    return sums


@parallel()
def _multiply(task, x, panels, y, rows, cols, stride, bias, z, add, floor, depth, side, parts, sums):
    j, i = divmod(task, parts)
    _task(x, panels, y, rows, cols, stride, bias, z, add, floor, depth, j, side, i, parts, sums)


@helper()
def _task(x, panels, y, rows, cols, stride, bias, z, add, floor, depth, j, side, part, parts, totals):
    (n_panels, steps, width), size = panels.shape, x.itemsize
    pixels = y.shape[0] * y.shape[1] * y.shape[2]
    tiles = (pixels + _ROWS - 1) // _ROWS
    first = tiles * part // parts * _ROWS
    count = tiles * (part + 1) // parts * _ROWS - first
    begin, end = n_panels * j // side, n_panels * (j + 1) // side
    column, columns = begin * width * size, (end - begin) * width
    origins, tops, lefts, targets = _places(x, y, column, stride, first, count)
    # Unsigned, skip would be a float to Numba where it meets a 0.
    skip, shift = np.int64(z.ctypes.data - y.ctypes.data), bias.ctypes.data + column if bias.size > 0 else 0
    row = columns + _PAD
    seen, sums = aligned(_ROWS * _ROW, x), aligned((count if steps > depth else _ROWS) * row, x)
    wide, run, share = width * size > _VECTOR_BYTES, lines_of(columns * size), _share(add, end - begin)
    for start in range(0, steps, depth):
        n, last = min(depth, steps - start), start + depth >= steps
        tap, channel = divmod(start, x.shape[3])
        r, s = divmod(tap, cols.size)
        for i in range(0, count, _ROWS):
            for m in range(_ROWS):
                _gather(x, seen, m * _ROW, origins[i + m], tops[i + m], lefts[i + m], rows, cols, r, s, channel, n)
            out = sums.ctypes.data + (i * row * size if steps > depth else 0)
            # Asked for during the first panel: what the next tile sees of these channels, were there one tap.
            ahead, side_by_side, apart, wanted = 0, lines_of(n * size), stride[1] * x.shape[3] * size, 0
            if i + _ROWS < count:
                ahead = origins[i + _ROWS] + channel * size
            for p in range(begin, end):
                b, c = panels.ctypes.data + (p * steps + start) * width * size, out + (p - begin) * width * size
                if wide:
                    multiply_fetching(
                        seen.ctypes.data, _ROW, 1, b, width, c, row, n, start > 0, ahead, side_by_side, apart,
                        _ROWS, 2, x.dtype,
                    )  # fmt: skip
                else:
                    multiply_fetching(
                        seen.ctypes.data, _ROW, 1, b, width, c, row, n, start > 0, ahead, side_by_side, apart,
                        _ROWS, 1, x.dtype,
                    )  # fmt: skip
                # During the others: what `finish` reads and writes, the rows of z, then of y.
                at = wanted if add else wanted + _ROWS
                ahead = 0 if not last or at >= 2 * _ROWS else targets[i + at % _ROWS] + (skip if at < _ROWS else 0)
                side_by_side, apart = run, z.strides[2]
                wanted = min(wanted + share, _ROWS) if wanted < _ROWS else wanted + share  # z's rows, then y's
            if last:
                written = min(_ROWS, pixels - first - i)
                for m in range(written):
                    to = targets[i + m]
                    finish(out + m * row * size, shift, to + skip, add, floor, to, columns, x.dtype)
                if len(totals) > 0:  # of y in one run
                    to, k = targets[i], begin * width
                    add_up(to, 0, y.strides[2], 1, written, totals[part], k, k + columns, size, x.dtype)


@helper()
def _share(add, panels):
    """How many rows of z and y are asked for during each panel but the first."""
    return ((2 if add else 1) * _ROWS + panels - 2) // max(1, panels - 1)


@helper()
def _places(x, y, column, stride, first, count):
    """For each of `count` pixels of y: the address, row and column of the pixel of x that its taps are relative to, and
    its own address, `column` bytes on.

    After the last pixel comes the last again: a tile that hangs over computes it more than once.
    """
    (n_size, p_size, q_size, _), (_, h_size, w_size, c) = y.shape, x.shape
    places = np.empty((4, count), np.int64)
    n, at = divmod(first, p_size * q_size)
    p, q = divmod(at, q_size)
    for i in range(count):
        h, w = p * stride[0], q * stride[1]
        places[0, i] = x.ctypes.data + ((n * h_size + h) * w_size + w) * c * x.itemsize
        places[1, i], places[2, i] = h, w
        places[3, i] = y.ctypes.data + column + n * y.strides[0] + p * y.strides[1] + q * y.strides[2]
        if q + 1 < q_size:
            q += 1
        elif p + 1 < p_size:
            p, q = p + 1, 0
        elif n + 1 < n_size:
            n, p, q = n + 1, 0, 0
    return places


@helper(inline=True)
def _gather(x, seen, to, origin, top, left, rows, cols, r, s, channel, count):
    """seen[to:][:count]: what a pixel sees, from a channel of tap (r, s) on; zeros outside x."""
    _, h_size, w_size, c = x.shape
    done = 0
    while done < count:
        n, h, w = min(c - channel, count - done), top + rows[r], left + cols[s]
        target = seen.ctypes.data + (to + done) * x.itemsize
        if 0 <= h < h_size and 0 <= w < w_size:
            copy(origin + ((rows[r] * w_size + cols[s]) * c + channel) * x.itemsize, target, n, x.dtype)
        else:
            seen[to + done : to + done + n] = 0
        done, channel, s = done + n, 0, s + 1
        if s == cols.size:
            r, s = r + 1, 0
