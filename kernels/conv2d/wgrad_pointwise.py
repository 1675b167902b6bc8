"""Weight gradient of a 1x1 convolution on the CPU: a product of matrices whose long side is summed over.

    dw[k, c] = sum over pixels of x[pixel, c] * dy[pixel, k]

A task takes some channels c and a share of the pixels. Block by block of pixels, x is laid out by a few channels in the
second-level cache, and dy by panels of filters, a part of the block at a time, in the first: read in place, pixels of
many channels are a multiple of 4096 bytes apart and push each other out. The shares are added up as dw is written.
"""

from __future__ import annotations

from ..cpu.features import simd
from ..cpu.jit import helper
from ..cpu.microkernel import lanes, multiply_tile
from ..cpu.parallel import parallel
from ..cpu.transforms import copy
from ..memory import empty, to_nhwc
from ..registry import kernel
from .packing import aligned, panel_width, unpacked
from .problem import CONV2D_WGRAD

_CHANNELS, _BLOCK, _PIXELS = 128, 512, 128  # channels of a task, pixels of a block and of its parts
_SIDE_BY_SIDE = 16  # channels of x that are laid out together: two tiles of 8 rows, or one of 16
_MOST_SHARES, _LEAST_PIXELS = 16, 512  # of a share
_PARTIALS = 1 << 23  # numbers that the shares' dw may take
_VECTOR_BYTES = simd().vector_bytes


def _supports(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    whole = x.shape[1] % _SIDE_BY_SIDE == 0 and dy.shape[1] % lanes(x.dtype) == 0
    return groups == 1 and kernel_hw == (1, 1) and padding == (0, 0) and whole and dy.size > 0


@kernel(
    CONV2D_WGRAD,
    device="cpu",
    step=6,
    supports=_supports,
    note="1x1: a product of matrices, blocks of both laid out for the tiles",
)
def wgrad_pointwise(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    x, dy = to_nhwc(x), to_nhwc(dy)
    (n, p, q, k), c = dy.shape, x.shape[3]
    # Shared out by shape alone, never by threads: the same bits on any machine.
    shares = max(1, min(_MOST_SHARES, n * p * q // _LEAST_PIXELS, _PARTIALS // (c * k)))
    width = panel_width(k, x.dtype)
    partial = empty((shares, k // width, c, width), x.dtype)
    _multiply(shares * -(-c // _CHANNELS), x, dy, partial, stride, width)
    return unpacked(partial.reshape(shares, -1), (c * width, width, 0, 0), (k, c, 1, 1), x.dtype)


@parallel()
def _multiply(task, x, dy, partial, stride, width):
    shares, chunks = partial.shape[0], (x.shape[3] + _CHANNELS - 1) // _CHANNELS
    pixels = dy.shape[0] * dy.shape[1] * dy.shape[2]
    t, i = divmod(task, chunks)
    _share(x, dy, partial[t], stride, width, i * _CHANNELS, pixels * t // shares, pixels * (t + 1) // shares)


@helper()
def _share(x, dy, dw, stride, width, channel, first, last):
    """dw (panels of K, C, width): the rows of a task, from its share of the pixels."""
    (_, p, q, k), c, size, wide = dy.shape, x.shape[3], x.itemsize, width * x.itemsize > _VECTOR_BYTES
    n = min(_CHANNELS, c - channel)
    seen, upstream = aligned(_BLOCK * n, x), aligned(_PIXELS * width, x)
    for block in range(first, last, _BLOCK):
        pixels = min(_BLOCK, last - block)
        _lay_out(x, seen, p, q, stride, channel, n, block, pixels)
        for j in range(k // width):
            for start in range(0, pixels, _PIXELS):
                count, b = min(_PIXELS, pixels - start), upstream.ctypes.data
                for i in range(count):
                    source = dy.ctypes.data + ((block + start + i) * k + j * width) * size
                    copy(source, b + i * width * size, width, x.dtype)
                for i in range(0, n, _SIDE_BY_SIDE):
                    a = seen.ctypes.data + (i * _BLOCK + start * _SIDE_BY_SIDE) * size
                    out, further = dw.ctypes.data + (j * c + channel + i) * width * size, block + start > first
                    if wide:
                        for half in range(0, _SIDE_BY_SIDE * size, 8 * size):
                            multiply_tile(
                                a + half, 1, _SIDE_BY_SIDE, b, width, out + half * width, width, count, further,
                                8, 2, x.dtype,
                            )  # fmt: skip
                    else:
                        multiply_tile(a, 1, _SIDE_BY_SIDE, b, width, out, width, count, further, 16, 1, x.dtype)


@helper()
def _lay_out(x, seen, p, q, stride, channel, channels, start, count):
    """seen[c // 16, i, c % 16] = channel c of what output pixel number start + i sees."""
    _, h_size, w_size, c = x.shape
    for i in range(count):
        n, at = divmod(start + i, p * q)
        pixel = (n * h_size + at // q * stride[0]) * w_size + at % q * stride[1]
        source = x.ctypes.data + (pixel * c + channel) * x.itemsize
        target = seen.ctypes.data + i * _SIDE_BY_SIDE * x.itemsize
        for first in range(0, channels * x.itemsize, _SIDE_BY_SIDE * x.itemsize):
            copy(source + first, target + first * _BLOCK, _SIDE_BY_SIDE, x.dtype)
