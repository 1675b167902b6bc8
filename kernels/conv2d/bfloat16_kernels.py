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
from ..cpu.jit import helper
from ..cpu.parallel import parallel
from ..cpu.transforms import fetch, move
from ..kept import kept
from ..memory import empty, empty_nhwc, to_nhwc
from ..registry import kernel
from .bfloat16_tile import LANES, MOST_ROWS, tile, tile_rows
from .direct_kernels import residues_are_convolutions
from .numba_kernels import residues
from .packing import pack
from .problem import CONV2D_BIAS_ACT, CONV2D_DGRAD, CONV2D_FPROP, out_hw

_DTYPES = ("bfloat16",)
_TASKS = 16  # groups of images
_STRIP = 3 << 13  # bytes of a strip of an image, half of the first-level cache,
_STRIP_ROWS = 4  # and the rows of output that it has at least
_AHEAD = 4  # rows between the one that is copied and the one that is asked for, which comes while products are summed
_LARGE_FILTERS = 1 << 19  # bytes from which filters leave the second-level cache,
_IMAGE_NUMBERS = 1 << 17  # and numbers of the images that each panel of them meets


def _fprop_supports(x, w, *, stride, padding, dilation, groups):
    return groups == 1 and dilation[1] == 1 and w.shape[0] % LANES == 0


@kernel(
    CONV2D_FPROP,
    device="cpu",
    step=4,
    supports=_fprop_supports,
    dtypes=_DTYPES,
    note="no patches, products of pairs of channels",
)
def fprop_direct_bfloat16(x, w, *, stride, padding, dilation, groups):
    return _convolve(x, w, stride, padding, dilation)


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
    return _convolve(x, w, stride, padding, dilation, b, z, relu)


def follows(y, b=None, z=None, relu=False):
    """What `tile` takes for an output y (N, P, Q, K) of uint16: bias, z, whether it is added, the least to be written.

    z is logically (N, K, P, Q).
    """
    bias = np.zeros(0, np.float32) if b is None else cast(b, np.float32)
    return bias, y if z is None else bits(to_nhwc(z)), z is not None, np.float32(0 if relu else -np.inf)


def _convolve(x, w, stride, padding, dilation, *more):
    if x.shape[1] % 2:
        x, w = in_pairs(x), np.pad(w, ((0, 0), (0, 1), (0, 0), (0, 0)))
    else:
        x = to_nhwc(x)
    hw = out_hw(x.shape[1:3], w.shape[2:], stride, padding, dilation)
    y, memory = empty_nhwc(x.shape[0], w.shape[0], *hw, x.dtype)
    _multiply(x, paired(w, False), bits(memory), w.shape[3], stride, padding, dilation[0], *more)
    return y


def _multiply(x, panels, y, taps, stride, padding, dilation, *more):
    """y (N, P, Q, K), of uint16, from x (N, H, W, C) and panels of filters, and what `follows`."""
    panels = panels.reshape(*panels.shape[:2], -1, panels.shape[4])  # the taps of a filter's row are one run
    rows, n = tile_rows(y.shape[2], panels.shape[3]), x.shape[0]
    if panels.nbytes > _LARGE_FILTERS:  # each panel meets several images, and tasks have some of the panels
        images, splits = max(1, min(-(-n // 2), _IMAGE_NUMBERS // max(1, x[0].size))), 2
    else:
        images, splits = -(-n // _TASKS), 1
    at_once, tasks = images if splits > 1 else 1, -(-n // images) * splits if n else 0
    _fprop(
        tasks, bits(x), panels, y, taps, rows, stride, padding, dilation, images, splits, at_once, *follows(y, *more)
    )


def in_pairs(x):
    """x (N, C, H, W), C odd, as (N, H, W, C + 1): a channel of zeros makes the pairs whole."""
    n, c, h, w = x.shape
    wider = empty((n, h, w, c + 1), x.dtype)
    _pair_channels(n * h, bits(x), wider.view(np.uint32))
    return wider


@parallel()
def _pair_channels(row, x, pairs):
    n, h = divmod(row, x.shape[2])
    for j in range(pairs.shape[3] - 1):
        _pair_pixels(x[n, 2 * j, h], x[n, 2 * j + 1, h], pairs[n, h, :, j])
    for w in range(x.shape[3]):
        pairs[n, h, w, pairs.shape[3] - 1] = x[n, x.shape[1] - 1, h, w]


@helper(inline=True)
def _pair_pixels(first, second, pairs):
    for w in range(pairs.size):
        pairs[w] = np.uint32(first[w]) | (np.uint32(second[w]) << np.uint32(16))


def _dgrad_supports(dy, w, *, stride, padding, dilation, groups, input_hw):
    whole = w.shape[0] % 2 == 0 and w.shape[1] % LANES == 0
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
    panels = paired(w, True)
    for part, (r_taps, rows), (s_taps, cols) in residues(bits(memory), (r, s), stride, padding, dilation):
        chosen = np.ascontiguousarray(panels[:, r_taps][:, :, s_taps])
        _multiply(dy, chosen, part, len(s_taps), (1, 1), (-rows[0], -cols[0]), dilation[0])
    return dx


@kept
def paired(w, turned):
    """w (K, C, R, S) -> (panels of K, R, S, C/2, width) pairs of channels, or turned: panels of C, pairs of K."""
    panels = pack(cast(w, np.float32), turned)
    *shape, c, width = panels.shape
    pairs = empty((*shape, c // 2, width), np.uint32)
    _pair_up(pairs.size // width, panels.view(np.uint32).reshape(-1, 2, width), pairs.reshape(-1, width))
    return pairs


@parallel()
def _pair_up(i, numbers, pairs):
    _pair_rows(numbers[i, 0], numbers[i, 1], pairs[i])


@helper(inline=True)
def _pair_rows(first, second, pairs):
    for l in range(pairs.size):
        pairs[l] = (first[l] >> np.uint32(16)) | (second[l] & np.uint32(0xFFFF0000))


@parallel()
def _fprop(task, x, panels, y, taps, rows, stride, padding, dilation, images, splits, at_once, bias, z, add, floor):
    part, group = divmod(task, (x.shape[0] + images - 1) // images)
    first, last = len(panels) * part // splits, len(panels) * (part + 1) // splits
    start, stop = group * images, min((group + 1) * images, x.shape[0])
    _fprop_images(
        x[start:stop], panels, first, last, y[start:stop], taps, rows, stride, padding, dilation, at_once,
        bias, z[start:stop], add, floor,
    )  # fmt: skip


@helper()
def _fprop_images(x, panels, first, last, y, taps, rows, stride, padding, dilation, at_once, bias, z, add, floor):
    """The panels from `first` to `last` for some images, of which `at_once` lie padded in the cache."""
    n, h, w, c = x.shape
    (_, p_size, q_size, _), reach = y.shape, (panels.shape[1] - 1) * dilation + 1
    height, columns = (p_size - 1) * stride[0] + reach, (q_size - 1) * stride[1] + taps
    if padding == (0, 0) and height <= h and columns <= w and q_size >= rows:  # read in place
        _images(x[:0], x, 0, 0, panels, first, last, y, rows, stride, dilation, bias, z, add, floor)
        return
    columns = (max(q_size, MOST_ROWS) - 1) * stride[1] + taps  # enough for tiles that hang over at the end
    strip = p_size
    if at_once == 1:  # an image goes through the first-level cache in strips of equal height
        fitting = max(_STRIP_ROWS, (_STRIP // (columns * c * x.itemsize) - reach) // stride[0] + 1)
        strips = (p_size + fitting - 1) // fitting
        strip = (p_size + strips - 1) // strips
    seen = np.zeros((at_once, (strip - 1) * stride[0] + reach, columns, c), x.dtype)
    for i in range(0, n, at_once):
        j = min(i + at_once, n)
        for p in range(0, p_size, strip):
            _images(
                x[i:j], seen[: j - i], p * stride[0] - padding[0], padding[1], panels, first, last,
                y[i:j, p : p + strip], rows, stride, dilation, bias, z[i:j, p : p + strip], add, floor,
            )  # fmt: skip


@helper()
def _images(x, seen, above, left, panels, first, last, y, rows, stride, dilation, bias, z, add, floor):
    """From x, which is copied into `seen`, row `above` of it into row 0; x is empty where `seen` has it all."""
    (n, p_size, q_size, _), (_, r_size, run, width) = y.shape, panels.shape
    c, size, reach = seen.shape[3], 2, (r_size - 1) * dilation + 1
    step, line = stride[1] * c, seen.shape[2] * c
    near = last - first == len(panels)  # they stay in the second-level cache; else one meets all rows, then the next
    for task in range((last - first) * n * p_size):
        row, j = divmod(task, last - first) if near else divmod(task, n * p_size)[::-1]
        (i, p), j = divmod(row, p_size), first + j
        top, copied = p * stride[0], (p - 1) * stride[0] + reach if p > 0 else 0
        if j == first and len(x) > 0:
            _pad(x[i], seen[i], max(top, copied), top + reach, above, left)
        w, shift = panels[j].ctypes.data, bias.ctypes.data + j * width * bias.itemsize if bias.size > 0 else 0
        a = seen.ctypes.data + i * seen.strides[0] + top * line * size
        out = y.ctypes.data + i * y.strides[0] + p * y.strides[1] + j * width * size
        skip = z.ctypes.data + i * z.strides[0] + p * z.strides[1] + j * width * size
        for q in range(0, q_size, rows):
            q = max(0, min(q, q_size - rows))  # the last tile of a row computes some pixels again
            tile(
                rows, a + q * step * size, step // 2, dilation * line // 2, w, run * width,
                out + q * y.strides[2], y.strides[2] // size, run, r_size,
                shift, skip + q * z.strides[2], z.strides[2] // size, add, floor, q_size - q,
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
