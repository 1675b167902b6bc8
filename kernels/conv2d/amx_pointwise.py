"""1x1 convolution on AMX tiles (amx_kernels.py): the pixels of all images are the rows of one matrix.

    y[m, k] = sum over c of x[m, c] * w[c, k]        m: pixels

near    few filters: they stay in the second-level cache, and 32 pixels after the other meet all of them
far     many: a block of pixels stays there, and one panel of filters after the other meets all of it

Near, bfloat16 is read as it lies; far, and where a stride leaves pixels out, it is copied, and float32 is taken apart
(amx_tile.py): 32 channels of a pixel, or of a part of it, beside those of the next pixel, so that a tile is 16 cache
lines in a row.

A product is of a few steps, so that the factor which is used again stays in the first-level cache; sums of float32 that
are nothing but sums are stored where they belong. In between memory is asked for: the next pixels, which are read one
line after the other, the lines of y that are written next, or far, the next filters.
"""

from __future__ import annotations

import numpy as np

from ..cpu.amx import ROWS, configure, new_state, release
from ..cpu.jit import get_num_threads, helper
from ..cpu.parallel import parallel
from ..cpu.transforms import fetch, fetch_to_second_level, move
from .amx_tile import CHANNELS, finish, multiply, numbers, split
from .genstats import add_up, new_sums
from .packing import aligned

_PAIR = 2 * ROWS  # pixels of a product
_LINE = 64
_LARGE_FILTERS = 1 << 19  # bytes from which on they are far,
_FAR = 1 << 20  # and bytes of a block of pixels then
_TASKS_OF_A_THREAD = 4
_SHARES = 64  # of pixels, at most, each with its own statistics
_DEPTH = {1: 8, 3: 2}  # steps of a product, by the parts of a number


def multiply_pixels(x, panels, y, bias, z, add, floor, statistics):
    """y (M, K), from x (N, H, W, C) of any strides, C whole steps and M = N H W at least 16, and panels of filters
    (parts, panels of K, 1, 1, C/2, width); bias, z (M, K), add and floor as `epilogue` gives them. Returns the sums of
    its statistics, where they are wanted."""
    (parts, count), pairs, threads = panels.shape[:2], -(-len(y) // _PAIR), get_num_threads()
    far = panels.nbytes > _LARGE_FILTERS
    apart = x.itemsize == 4 or far or not x.flags.c_contiguous
    if x.flags.c_contiguous:
        x = x.reshape(1, 1, *y.shape[:1], x.shape[3])
    if far:  # blocks of the same size for every thread
        blocks = min(pairs, threads * -(-x.size * 2 * parts // (threads * _FAR)))
    else:
        blocks = min(pairs, threads * _TASKS_OF_A_THREAD)
    shares = min(pairs, _SHARES) if statistics else blocks
    blocks = min(blocks, shares)  # each is of whole shares
    groups = min(count, -(-threads // blocks)) if far else 1
    sums = new_sums(shares, y.shape[1], statistics)
    tasks = blocks * groups
    _multiply(tasks, x, panels, y, apart, far, _DEPTH[parts], blocks, shares, groups, bias, z, add, floor, sums)
    return sums


@parallel()
def _multiply(task, x, panels, y, apart, far, depth, blocks, shares, groups, bias, z, add, floor, totals):
    group, block = divmod(task, blocks)
    first, last = panels.shape[1] * group // groups, panels.shape[1] * (group + 1) // groups
    pairs, size = (len(y) + _PAIR - 1) // _PAIR, x.shape[3] * panels.shape[0]
    pair = pairs * (shares * block // blocks) // shares
    beyond = pairs * (shares * (block + 1) // blocks) // shares
    start = min(pair * _PAIR, len(y) - ROWS)
    stop = max(min(beyond * _PAIR, len(y)), start + ROWS)
    pixels = (stop - start + _PAIR - 1) // _PAIR * _PAIR if far else _PAIR
    seen = numbers((pixels + 1) * size if apart else 1)
    state, sums = new_state(), aligned((pixels if far else _PAIR * (last - first)) * panels.shape[5], bias)
    y, z, counted = y[start:stop], z[start:stop], (pair, pair * _PAIR - start, pairs, shares)
    if far:
        _sum_far(
            state, sums, seen, pixels, x, start, panels, first, last, y, apart, depth, bias, z, add, floor, totals,
            counted,
        )  # fmt: skip
    else:
        _sum_near(
            state, sums, seen, pixels, x, start, panels, first, last, y, apart, depth, bias, z, add, floor, totals,
            counted,
        )  # fmt: skip


@helper()
def _sum_near(
    state, sums, seen, pixels, x, start, panels, first, last, y, apart, depth, bias, z, add, floor, totals, counted
):  # fmt: skip
    n, row, steps = len(y), x.strides[2], x.shape[3] // CHANNELS
    strides, size = _strides(x, panels, apart, pixels), _PAIR * panels.shape[5] * 4
    products = (last - first) * ((steps + depth - 1) // depth)
    share = (_PAIR * row // _LINE + products - 1) // products * _LINE
    configure(state)
    for m in range(0, n, _PAIR):
        where = min(m, n - ROWS), min(m + ROWS, n - ROWS)  # the last rows end with y (and are computed again)
        if apart:
            _take_apart(x, start + where[0], ROWS, panels, seen, 0, strides)
            _take_apart(x, start + where[1], ROWS, panels, seen, ROWS, strides)
            a, a_too = _row(seen, 0), _row(seen, ROWS * CHANNELS)
        else:
            a, a_too = x.ctypes.data + (start + where[0]) * row, x.ctypes.data + (start + where[1]) * row
        following = x.ctypes.data + (start + m + _PAIR) * row
        for i in range(0, steps, depth):
            count = min(depth, steps - i)
            for j in range(first, last):
                if len(x) == 1:  # all pixels are one row
                    fetch_to_second_level(following, share)
                    following += share
                if i + count == steps:
                    _fetch_rows(y, where, j * panels.shape[5], panels.shape[5])
                _add_product(
                    state, _row(sums, 0) + (j - first) * size, a, a_too, strides, panels, i, count, j, y, where, bias,
                    z, add, floor,
                )  # fmt: skip
                if i + count == steps and len(totals) > 0:
                    _add_up(y, totals, counted, m // _PAIR, j, panels.shape[5])
    release(state)


@helper()
def _sum_far(
    state, sums, seen, pixels, x, start, panels, first, last, y, apart, depth, bias, z, add, floor, totals, counted
):  # fmt: skip
    n, steps, parts, width = len(y), x.shape[3] // CHANNELS, panels.shape[0], panels.shape[5]
    strides, a = _strides(x, panels, apart, pixels), np.int64(x.ctypes.data + start * x.strides[2])
    if apart:
        _take_apart(x, start, n, panels, seen, 0, strides)
        a = _row(seen, 0)
    pairs, size = pixels // _PAIR, _PAIR * width * 4
    share = (min(depth, steps) * ROWS * width * 4 // _LINE + pairs - 1) // pairs * _LINE
    configure(state)
    for j in range(first, last):
        for i in range(0, steps, depth):
            count = min(depth, steps - i)
            following = panels.ctypes.data + j * panels.strides[1] + (i + count) * ROWS * width * 4
            for t in range(pairs):
                where = min(t * _PAIR, n - ROWS), min(t * _PAIR + ROWS, n - ROWS)
                for p in range(parts):
                    fetch_to_second_level(following + p * panels.strides[0], share)
                following += share
                _add_product(
                    state, _row(sums, 0) + t * size, a + where[0] * strides[0], a + where[1] * strides[0], strides,
                    panels, i, count, j, y, where, bias, z, add, floor,
                )  # fmt: skip
                if i + count == steps and len(totals) > 0:
                    _add_up(y, totals, counted, t, j, width)
    release(state)


@helper(inline=True)
def _row(x, m):
    return np.int64(x.ctypes.data) + m * x.strides[0]


@helper(inline=True)
def _strides(x, panels, apart, pixels):
    """Bytes from a pixel to the next, from step to step and from part to part; apart, no power of 2 but a line more."""
    if not apart:
        return x.strides[2], _LINE, 0
    part = (pixels + 1) * _LINE
    return _LINE, panels.shape[0] * part, part


@helper(inline=True)
def _take_apart(x, first, count, panels, seen, place, strides):
    """The parts of some pixels of x, at a place of `seen`."""
    image, h = divmod(first, x.shape[1] * x.shape[2])
    h, w = divmod(h, x.shape[2])
    for m in range(count):
        source = x.ctypes.data + image * x.strides[0] + h * x.strides[1] + w * x.strides[2]
        target = _row(seen, 0) + (place + m) * strides[0]
        for i in range(x.shape[3] // CHANNELS):
            if x.itemsize == 4:
                split(source + i * CHANNELS * 4, target + i * strides[1], strides[2], CHANNELS)
            else:
                move(source + i * _LINE, target + i * strides[1], _LINE)
        w += 1
        if w == x.shape[2]:
            w, h = 0, h + 1
            if h == x.shape[1]:
                h, image = 0, image + 1


@helper(inline=True)
def _fetch_rows(y, where, column, width):
    for i in range(ROWS):
        for m in where:
            fetch(_row(y, m + i) + column * y.itemsize, width * y.itemsize)


@helper(inline=True)
def _add_product(
    state, sums, a, a_too, strides, panels, i, count, j, y, where, bias, z, add, floor
):  # fmt: skip
    """`count` steps from i on, of 32 pixels and panel j: to `sums`, and after the last step to y. Cannot raise."""
    parts, width, row = panels.shape[0], panels.shape[5], panels.shape[5] * 4
    b = panels.ctypes.data + j * panels.strides[1] + i * ROWS * row
    last, column, plain = i + count == panels.shape[4] // ROWS, j * width, y.itemsize == 4 and bias.size == 0
    second = sums + ROWS * row
    to, to_row = (sums, second), row
    if last and plain:
        to, to_row = (_row(y, where[0]) + column * 4, _row(y, where[1]) + column * 4), y.strides[0]
    multiply(
        state, a + i * strides[1], a_too + i * strides[1], (*strides, 0), b, row, panels.strides[0], count, 1, parts,
        sums, second, row, i > 0, to, to_row, width > ROWS,
    )  # fmt: skip
    if last and not plain:
        shift = bias.ctypes.data + column * 4 if bias.size > 0 else 0
        for place, m in ((sums, where[0]), (second, where[1])):
            finish(
                place, width, shift, _row(y, m) + column * y.itemsize, y.strides[0],
                _row(z, m) + column * z.itemsize, z.strides[0], add, floor, ROWS, bias.dtype, y.dtype,
            )  # fmt: skip


@helper(inline=True)
def _add_up(y, totals, counted, t, j, width):
    """The statistics of pair t of a block of pixels, and panel j, in the sums of the share that it belongs to. counted:
    the block's first pair, how many rows of y come before it, and how many pairs and shares there are."""
    pair, skipped, pairs, shares = counted
    row, stop, k = max(t * _PAIR, skipped), min((t + 1) * _PAIR, len(y)), j * width
    at = _row(y, row) + k * y.itemsize
    share = ((pair + t + 1) * shares - 1) // pairs
    add_up(at, 0, y.strides[0], 1, stop - row, totals[share], k, k + width, y.itemsize, y.dtype)
