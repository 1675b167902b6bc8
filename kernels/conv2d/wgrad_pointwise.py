"""Weight gradient of a 1x1 convolution on the CPU: a product of matrices whose long side is summed over.

    dw[k, c] = sum over pixels of x[pixel, c] * dy[pixel, k]

A task takes some channels c and a share of the pixels. Block by block of pixels, x is laid out by a few channels in the
second-level cache, and dy by panels of filters, a part of the block at a time, in the first: read in place, pixels of
many channels are a multiple of 4096 bytes apart and push each other out. While a part is multiplied the next one, and
some of the next block, are asked for. The shares are added up as dw is written.

Of bfloat16 a step of the sum is a pair of pixels, interleaved as they are laid out, and sums are float32.
"""

from __future__ import annotations

import numpy as np

from ..cpu.bfloat16 import bits, computed
from ..cpu.features import simd
from ..cpu.jit import helper
from ..cpu.microkernel import lanes, lines_of, multiply_fetching
from ..cpu.parallel import parallel
from ..cpu.transforms import interleave
from ..memory import empty, to_nhwc
from ..registry import kernel
from .packing import aligned, panel_width, unpacked
from .problem import CONV2D_WGRAD

_CHANNELS, _BLOCK, _PART = 128, 512, 256  # channels of a task, steps of a block and of its parts
_SIDE_BY_SIDE = 16  # channels of x that are laid out together: two tiles of 8 rows, or one of 16
_MOST_SHARES, _LEAST_PIXELS = 16, 512  # of a share
_PARTIALS = 1 << 23  # numbers that the shares' dw may take
_VECTOR_BYTES = simd().vector_bytes


def _supports(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    whole = x.shape[1] % _SIDE_BY_SIDE == 0 and dy.shape[1] % lanes(computed(x.dtype)) == 0
    return groups == 1 and kernel_hw == (1, 1) and padding == (0, 0) and whole and dy.size > 0


@kernel(
    CONV2D_WGRAD,
    device="cpu",
    step=6,
    supports=_supports,
    dtypes=("float32", "float64", "bfloat16"),
    note="1x1: a product of matrices, blocks of both laid out for the tiles",
)
def wgrad_pointwise(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    dtype, sums = x.dtype, computed(x.dtype)
    x, dy = bits(to_nhwc(x)), bits(to_nhwc(dy))
    (n, p, q, k), c = dy.shape, x.shape[3]
    # Shared out by shape alone, never by threads: the same bits on any machine.
    shares = max(1, min(_MOST_SHARES, n * p * q // _LEAST_PIXELS, _PARTIALS // (c * k)))
    width = panel_width(k, sums)
    partial = empty((shares, k // width, c, width), sums)
    _multiply(shares * -(-c // _CHANNELS), x, dy.reshape(-1, k), partial, p, q, stride)
    return unpacked(partial.reshape(shares, -1), (c * width, width, 0, 0), (k, c, 1, 1), dtype)


@parallel()
def _multiply(task, x, dy, partial, p, q, stride):
    shares, chunks = partial.shape[0], (x.shape[3] + _CHANNELS - 1) // _CHANNELS
    t, i = divmod(task, chunks)
    together = partial.itemsize // x.itemsize  # pixels of a step
    steps = (dy.shape[0] + together - 1) // together
    first, last = steps * t // shares, steps * (t + 1) // shares
    _share(x, dy, partial[t], p, q, stride, together, i * _CHANNELS, first, last)


@helper()
def _share(x, dy, dw, p, q, stride, together, channel, first, last):
    """dw (panels of K, C, width): the rows of a task, from its share of the steps."""
    (panels, c, width), (pixels, k), size, number = dw.shape, dy.shape, dw.itemsize, x.itemsize
    n, wide = min(_CHANNELS, c - channel), width * size > _VECTOR_BYTES
    rows, block = 8 if wide else 16, _equal(last - first, _BLOCK)
    part = _equal(block, _PART)
    seen, upstream, zeros = aligned(_BLOCK * n, dw), aligned(_PART * width, dw), np.zeros(_CHANNELS, x.dtype)
    # How many tiles of a part ask for all of the next one, and for some of the next block.
    run, x_run = lines_of(width * number), lines_of(n * number)
    for_dy = together << run
    for_x = _parts(block * together << x_run, part * panels * _parts(block, part))
    for start in range(first, last, block):
        steps, asked = min(block, last - start), (start + block) * together
        _lay_out_x(x, zeros, seen, p, q, stride, together, pixels, channel, n, start, steps)
        for j in range(panels):
            for at in range(0, steps, part):
                count = min(part, steps - at)
                _lay_out_dy(dy, zeros, upstream, together, j * width, width, start + at, count)
                following = at + part if at + part < steps else 0 if j + 1 < panels else block
                column = (j if at + part < steps else j + 1 if j + 1 < panels else 0) * width
                for i in range(0, n, rows):
                    tile, ahead, nearby, apart = i // rows, 0, run, k * number
                    if tile < for_dy:
                        pixel = (start + following) * together + tile * (count >> run)
                        ahead = dy.ctypes.data + (pixel * k + column) * number
                    elif tile < for_dy + for_x and asked < last * together:
                        ahead = x.ctypes.data + (_pixel(x, p, q, stride, asked) * c + channel) * number
                        nearby, apart, asked = x_run, stride[1] * c * number, asked + (count >> x_run)
                    a = seen.ctypes.data + ((i // 16 * _BLOCK + at) * 16 + i % 16) * size
                    b, out = upstream.ctypes.data, dw.ctypes.data + (j * c + channel + i) * width * size
                    further = start + at > first
                    if wide:
                        multiply_fetching(
                            a, 1, 16, b, width, out, width, count, further, ahead, nearby, apart, 8, 2, x.dtype
                        )  # fmt: skip
                    else:
                        multiply_fetching(
                            a, 1, 16, b, width, out, width, count, further, ahead, nearby, apart, 16, 1, x.dtype
                        )  # fmt: skip


@helper(inline=True)
def _parts(total, size):
    """How many parts of a size there are."""
    return (total + size - 1) // size


@helper(inline=True)
def _equal(total, most):
    """The size of parts that are as equal as can be."""
    return _parts(total, _parts(total, most))


@helper(inline=True)
def _pixel(x, p, q, stride, at):
    """The number of the pixel of x that output pixel number `at` sees."""
    if stride == (1, 1):
        return at
    n, at = divmod(at, p * q)
    return (n * x.shape[1] + at // q * stride[0]) * x.shape[2] + at % q * stride[1]


@helper()
def _lay_out_x(x, zeros, seen, p, q, stride, together, pixels, channel, channels, start, steps):
    """seen[c // 16, i, c % 16] = channel c of what output pixels see at step start + i; zeros after the last pixel."""
    c, number, size = x.shape[3], x.itemsize, together * x.itemsize
    for i in range(steps):
        at = (start + i) * together
        first = x.ctypes.data + (_pixel(x, p, q, stride, at) * c + channel) * number
        second = np.int64(zeros.ctypes.data)  # unsigned, both of these would be floats to Numba
        if together == 2 and at + 1 < pixels:
            second = x.ctypes.data + (_pixel(x, p, q, stride, at + 1) * c + channel) * number
        for j in range(0, channels, _SIDE_BY_SIDE):
            target = seen.ctypes.data + (j * _BLOCK + i * _SIDE_BY_SIDE) * size
            interleave(first + j * number, second + j * number, target, _SIDE_BY_SIDE, x.dtype)


@helper()
def _lay_out_dy(dy, zeros, upstream, together, column, width, start, steps):
    """upstream[i] = some columns of dy at step start + i."""
    (pixels, k), number = dy.shape, dy.itemsize
    for i in range(steps):
        at = (start + i) * together
        first = dy.ctypes.data + (at * k + column) * number
        second = first + k * number if at + 1 < pixels else np.int64(zeros.ctypes.data)
        interleave(first, second, upstream.ctypes.data + i * width * together * number, width, dy.dtype)
