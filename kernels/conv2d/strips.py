"""The convolution behind the direct kernels: images, padded, strip by strip, times panels of filters.

    y[n, p, q, k] = act(sum over r, i of seen_n[p*u + r*dilation, q*v*C + i] * w[k, r, i]  (+ b[k] + z[n, p, q, k]))

where i goes through the S taps of a filter's row, with their C channels: one run of memory. `seen` is an image with
zeros around it: some rows of it at a time, so that it stays in the first-level cache. Each row is copied when it is
needed, and one that is needed a little later is asked for, so that nothing waits for memory.

C counts pairs of channels where numbers are bfloat16.
"""

from __future__ import annotations

import numpy as np

from ..cpu.features import simd
from ..cpu.jit import get_num_threads, helper
from ..cpu.parallel import parallel
from ..cpu.transforms import fetch, move
from .direct_tile import MOST_ROWS, tile, tile_rows
from .genstats import NONE, add_up

_TASKS = 16  # groups of images at least, and for each thread:
_TASKS_OF_A_THREAD = 4
_STRIP = 3 << 13  # bytes of a strip of an image, half of the first-level cache,
_STRIP_ROWS = 4  # and the rows of output that it has at least
_AHEAD = 4  # rows between the one that is copied and the one that is asked for
_LARGE_FILTERS = 1 << 19  # bytes from which filters leave the second-level cache,
_IMAGE_BYTES = 1 << 18  # and bytes of the images that each panel of them meets


def multiply_strips(x, panels, y, taps, stride, padding, dilation, bias, z, add, floor, sums=NONE):
    """y (N, P, Q, K), of any strides but contiguous K, from x (N, H, W, C) and panels (panels of K, R, taps*C, width).

    dilation: of rows. bias, z, add, floor: of `epilogue`; sums (N, 2, K): of `new_sums`. bfloat16 comes as x and panels
    of uint32, pairs of channels, and y and z of uint16.
    """
    vectors, n = 1 if panels.shape[3] * panels.itemsize <= simd().vector_bytes else 2, len(x)
    rows = tile_rows(y.shape[2], vectors, y.dtype == np.uint16)
    if panels.nbytes > _LARGE_FILTERS:  # each panel meets several images, and tasks have some of the panels
        images, splits = max(1, min(-(-n // 2), _IMAGE_BYTES // max(1, x[:1].nbytes))), 2
    else:
        images, splits = -(-n // max(_TASKS, _TASKS_OF_A_THREAD * get_num_threads())), 1
    at_once, tasks = images if splits > 1 else 1, -(-n // images) * splits if n else 0
    _multiply(
        tasks, x, panels, y, taps, rows, vectors, stride, padding, dilation, images, splits, at_once,
        bias, z, add, floor, sums,
    )  # fmt: skip


@parallel()
def _multiply(
    task, x, panels, y, taps, rows, vectors, stride, padding, dilation, images, splits, at_once, bias, z, add, floor,
    sums,
):  # fmt: skip
    part, group = divmod(task, (x.shape[0] + images - 1) // images)
    first, last = len(panels) * part // splits, len(panels) * (part + 1) // splits
    start, stop = group * images, min((group + 1) * images, x.shape[0])
    _images(
        x[start:stop], panels, first, last, y[start:stop], taps, rows, vectors, stride, padding, dilation, at_once,
        bias, z[start:stop], add, floor, sums[start:stop],
    )  # fmt: skip


@helper()
def _images(
    x, panels, first, last, y, taps, rows, vectors, stride, padding, dilation, at_once, bias, z, add, floor, sums
):  # fmt: skip
    """The panels from `first` to `last` for some images, of which `at_once` lie padded in the cache."""
    n, h, w, c = x.shape
    (_, p_size, q_size, _), reach = y.shape, (panels.shape[1] - 1) * dilation + 1
    height, columns = (p_size - 1) * stride[0] + reach, (q_size - 1) * stride[1] + taps
    if padding == (0, 0) and height <= h and columns <= w and q_size >= rows:  # read in place
        _strip(x[:0], x, 0, 0, panels, first, last, y, rows, vectors, stride, dilation, bias, z, add, floor)
        _add_up(y, sums, first * panels.shape[3], last * panels.shape[3])
        return
    columns = (max(q_size, MOST_ROWS) - 1) * stride[1] + taps  # enough for tiles that hang over at the end
    strip = p_size
    if at_once == 1:  # strips of almost equal height
        fitting = max(_STRIP_ROWS, (_STRIP // (columns * c * x.itemsize) - reach) // stride[0] + 1)
        strips = (p_size + fitting - 1) // fitting
        strip = (p_size + strips - 1) // strips
    seen = np.zeros((at_once, (strip - 1) * stride[0] + reach, columns, c), x.dtype)
    for i in range(0, n, at_once):
        j = min(i + at_once, n)
        for p in range(0, p_size, strip):
            _strip(
                x[i:j], seen[: j - i], p * stride[0] - padding[0], padding[1], panels, first, last,
                y[i:j, p : p + strip], rows, vectors, stride, dilation, bias, z[i:j, p : p + strip], add, floor,
            )  # fmt: skip
            _add_up(y[i:j, p : p + strip], sums[i:j], first * panels.shape[3], last * panels.shape[3])


@helper()
def _add_up(y, sums, first, last):
    """The sums of each image's rows that were just written; nothing where there are none."""
    for i in range(len(sums)):
        at = np.int64(y[i].ctypes.data) + first * y.itemsize
        add_up(at, y.strides[1], y.strides[2], y.shape[1], y.shape[2], sums[i], first, last, y.itemsize, y.dtype)


@helper()
def _strip(x, seen, above, left, panels, first, last, y, rows, vectors, stride, dilation, bias, z, add, floor):
    """From x, which is copied into `seen`, row `above` of it into row 0; x is empty where `seen` has it all."""
    (n, p_size, q_size, _), (_, r_size, run, width) = y.shape, panels.shape
    c, reach, pixel = seen.shape[3], (r_size - 1) * dilation + 1, z.strides[2]
    step, line = stride[1] * c, seen.shape[2] * c
    near = last - first == len(panels)  # they stay in the second-level cache; else one meets all rows, then the next
    for task in range((last - first) * n * p_size):
        row, j = divmod(task, last - first) if near else divmod(task, n * p_size)[::-1]
        (i, p), j = divmod(row, p_size), first + j
        top, copied = p * stride[0], (p - 1) * stride[0] + reach if p > 0 else 0
        if j == first and len(x) > 0:
            _pad(x[i], seen[i], max(top, copied), top + reach, above, left)
        column = j * width * y.itemsize
        shift = bias.ctypes.data + j * width * bias.itemsize if bias.size > 0 else 0
        a = seen.ctypes.data + i * seen.strides[0] + top * line * x.itemsize
        out = y.ctypes.data + i * y.strides[0] + p * y.strides[1] + column
        skip = z.ctypes.data + i * z.strides[0] + p * z.strides[1] + column
        for q in range(0, q_size, rows):
            q = max(0, min(q, q_size - rows))  # the last tile of a row computes some pixels again
            tile(
                rows, vectors, a + q * step * x.itemsize, step, dilation * line, panels[j].ctypes.data, run * width,
                out + q * y.strides[2], y.strides[2] // y.itemsize, run, r_size,
                shift, skip + q * pixel, pixel // y.itemsize, add, floor, q_size - q, y.dtype,
            )  # fmt: skip


@helper()
def _pad(x, seen, first, last, above, left):
    """Rows of `seen`, whose columns to the left and right of x are zero."""
    pixel = x.strides[1]
    skipped, columns = max(0, -left), min(seen.shape[1], left + x.shape[1]) - max(0, left)
    for h in range(first, last):
        source, target = x.ctypes.data + (above + h) * x.strides[0], seen.ctypes.data + h * seen.strides[0]
        if columns > 0 and 0 <= above + h < x.shape[0]:
            move(source + skipped * pixel, target + max(0, left) * pixel, columns * pixel)
            fetch(source + _AHEAD * x.strides[0], x.strides[0])
        else:
            seen[h] = 0
