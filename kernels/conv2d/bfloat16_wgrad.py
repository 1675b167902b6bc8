"""Weight gradient of bfloat16 on the CPU, in pairs of output pixels: what the taps see times dy, summed in float32.

dw[r, s, c, k] = sum over pairs j of seen[r, s, j, c, 0] * dy[j, k, 0] + seen[r, s, j, c, 1] * dy[j, k, 1]

direct    few channels: image by image; dy interleaved (P, Q/2, K, 2), and for each column s of the filter the rows
          that its taps see (H, S, Q/2, C, 2)
parts     many channels, small images, where dw is larger than an image: a task owns a part of dw, over the pixels
          of all images (wgrad_kernels.py)
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ..cpu.bfloat16 import bits
from ..cpu.casts import cast
from ..cpu.jit import helper, njit
from ..cpu.microkernel import lanes, multiply_pairs_2d
from ..cpu.parallel import parallel
from ..memory import empty, to_nhwc
from ..registry import kernel
from .packing import panel_width
from .problem import CONV2D_WGRAD
from .wgrad_kernels import unpack

_ROWS, _NARROW_ROWS = 8, 16  # of a tile of two vectors, and of one: as many sums under way
_LANES = lanes(np.float32)
_PARTIALS = 1 << 24  # numbers that the partial sums may take
_CHANNELS, _PAIRS, _PANELS = 64, 128, 4  # channels and panels of a task, pairs of its blocks
_SMALL_IMAGE, _LARGE_DW = 196, 1 << 16  # pixels of dy, and numbers of dw: measured on ResNet's layers


def _wgrad_supports(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    return groups == 1 and dilation[1] == 1 and dy.shape[1] % _LANES == 0 and x.shape[1] % _LANES == 0 and dy.size > 0


@kernel(
    CONV2D_WGRAD,
    device="cpu",
    step=4,
    supports=_wgrad_supports,
    dtypes=("bfloat16",),
    note="products of pairs of pixels: dy and what the taps see, interleaved",
)
def wgrad_direct_bfloat16(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    x, dy, (r, s) = bits(to_nhwc(x)), bits(to_nhwc(dy)), kernel_hw
    (n, _, _, k), c = dy.shape, x.shape[3]
    # The sum over images is split by shape alone, never by threads: the same bits on any machine size.
    splits = max(1, min(n, 16, _PARTIALS // (r * s * c * k)))
    partial = np.zeros((splits, r, s * c, k), np.float32)
    _wgrad(len(partial), x, dy, partial, s, stride, padding, dilation[0])
    return _rounded(partial.sum(0).reshape(r, s, c, k))


@parallel()
def _wgrad(t, x, dy, partial, taps, stride, padding, dilation):
    n, splits = x.shape[0], partial.shape[0]
    first, last = n * t // splits, n * (t + 1) // splits
    for i in range(first, last):
        _wgrad_image(x[i], dy[i], partial[t], taps, stride, padding, dilation)


@helper()
def _wgrad_image(x, dy, dw, taps, stride, padding, dilation):
    (h_size, _, c), (p_size, q_size, k), r_size = x.shape, dy.shape, dw.shape[0]
    pairs = (q_size + 1) // 2
    upstream = np.empty((p_size, pairs, k), np.uint32)
    for p in range(p_size):
        _interleave(dy[p], upstream[p], 0, 1)
    height = (p_size - 1) * stride[0] + (r_size - 1) * dilation + 1
    seen = np.empty((height, taps, pairs, c), np.uint32)
    for i in range(height):
        h = i - padding[0]
        if 0 <= h < h_size:
            for s in range(taps):
                _interleave(x[h], seen[i, s], s - padding[1], stride[1])
        else:
            seen[i] = 0
    wide = k % (2 * _LANES) == 0
    width, tile_rows = (2 * _LANES, _ROWS) if wide else (_LANES, _NARROW_ROWS)
    line = taps * pairs * c
    for r in range(r_size):
        for s in range(taps):
            for i in range(0, c, tile_rows):
                a = seen[r * dilation, s, 0, i:].ctypes.data
                for j in range(0, k, width):
                    b, out = upstream[0, 0, j:].ctypes.data, dw[r, s * c + i, j:].ctypes.data
                    if wide:
                        multiply_pairs_2d(
                            a, 1, c, stride[0] * line, b, k, pairs * k,
                            out, k, pairs, p_size, True, _ROWS, 2, dw.dtype,
                        )  # fmt: skip
                    else:
                        multiply_pairs_2d(
                            a, 1, c, stride[0] * line, b, k, pairs * k,
                            out, k, pairs, p_size, True, _NARROW_ROWS, 1, dw.dtype,
                        )  # fmt: skip


@helper()
def _interleave(row, pairs, first, stride):
    """pairs[j, c] = row[first + 2 j stride, c] and the pixel `stride` further, zeros outside of the row (W, C)."""
    for j in range(pairs.shape[0]):
        left = first + 2 * j * stride
        right = left + stride
        has_left, has_right = 0 <= left < row.shape[0], 0 <= right < row.shape[0]
        _pair(row[left if has_left else 0], row[right if has_right else 0], has_left, has_right, pairs[j])


def _parts_rank(x, dy, *, kernel_hw, **_):
    small = dy.shape[2] * dy.shape[3] <= _SMALL_IMAGE
    return 4.5 if small and kernel_hw[0] * kernel_hw[1] * x.shape[1] * dy.shape[1] >= _LARGE_DW else 3.9


@kernel(
    CONV2D_WGRAD,
    device="cpu",
    step=5,
    supports=_wgrad_supports,
    rank=_parts_rank,
    dtypes=("bfloat16",),
    note="tasks own parts of dw, over pairs of pixels of all images",
)
def wgrad_parts_bfloat16(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    x, dy = bits(to_nhwc(x)), bits(to_nhwc(dy))
    (n, p, q, k), c = dy.shape, x.shape[3]
    width = panel_width(k, np.dtype(np.float32))
    panels = empty((k // width, (n * p * q + 1) // 2, width), np.uint32)
    _split(len(panels), dy.reshape(-1, k), panels)
    parts = empty((*kernel_hw, c, k), np.float32)
    tasks = kernel_hw[0] * kernel_hw[1] * -(-c // _CHANNELS) * -(-len(panels) // _PANELS)
    _sum_parts(tasks, x, panels, parts, n * p * q, p, q, stride, padding, dilation)
    return _rounded(parts)


def _rounded(parts):
    """(R, S, C, K) float32 -> (K, C, R, S) bfloat16."""
    r, s, c, k = parts.shape
    dw = np.zeros((k, c, r, s), np.float32)
    width = panel_width(k, parts.dtype)
    unpack(k // width, parts, dw, width)
    return cast(dw, ml_dtypes.bfloat16)


@parallel()
def _split(j, dy, panels):
    _split_panel(dy, panels[j], j * panels.shape[2])


@helper()
def _split_panel(dy, panel, first):
    for i in range(panel.shape[0]):
        has_second = 2 * i + 1 < dy.shape[0]
        _pair(dy[2 * i, first:], dy[2 * i + has_second, first:], True, has_second, panel[i])


@parallel()
def _sum_parts(task, x, panels, parts, pixels, p, q, stride, padding, dilation):
    _, s_size, c, _ = parts.shape
    chunks, groups = (c + _CHANNELS - 1) // _CHANNELS, (panels.shape[0] + _PANELS - 1) // _PANELS
    tap, part = divmod(task, chunks * groups)
    r, s = divmod(tap, s_size)
    top, left = r * dilation[0] - padding[0], s * dilation[1] - padding[1]
    channel, panel = part // groups * _CHANNELS, part % groups * _PANELS
    _part(x, panels, parts[r, s], pixels, p, q, stride, top, left, channel, panel)


@helper()
def _part(x, panels, dw, pixels, p, q, stride, top, left, channel, first_panel):
    """dw (C, K): a few of its rows, and the columns of some panels."""
    width, k = panels.shape[2], dw.shape[1]
    n = min(_CHANNELS, dw.shape[0] - channel)
    seen = np.empty((_PAIRS, n), np.uint32)
    for start in range(0, panels.shape[1], _PAIRS):
        count = min(_PAIRS, panels.shape[1] - start)
        _gather(x, seen, pixels, p, q, stride, top, left, channel, start, count)
        for j in range(first_panel, min(first_panel + _PANELS, panels.shape[0])):
            b = panels[j, start].ctypes.data
            if width > _LANES:
                for i in range(0, n, _ROWS):
                    multiply_pairs_2d(
                        seen[0, i:].ctypes.data, 1, n, 0, b, width, 0,
                        dw[channel + i, j * width :].ctypes.data, k, count, 1, start > 0, _ROWS, 2, dw.dtype,
                    )  # fmt: skip
            else:
                for i in range(0, n, _NARROW_ROWS):
                    multiply_pairs_2d(
                        seen[0, i:].ctypes.data, 1, n, 0, b, width, 0,
                        dw[channel + i, j * width :].ctypes.data, k, count, 1, start > 0, _NARROW_ROWS, 1, dw.dtype,
                    )  # fmt: skip


@helper()
def _gather(x, seen, pixels, p, q, stride, top, left, channel, start, count):
    """seen[i, c]: what a tap sees at the output pixels of pair start + i; zeros outside x."""
    last = channel + seen.shape[1]
    for i in range(count):
        n, h, w, first = _place(x, 2 * (start + i), pixels, p, q, stride, top, left)
        m, g, v, second = _place(x, 2 * (start + i) + 1, pixels, p, q, stride, top, left)
        _pair(x[n, h, w, channel:last], x[m, g, v, channel:last], first, second, seen[i])


@njit(inline=True)
def _place(x, pixel, pixels, p, q, stride, top, left):
    """Where in x the tap of an output pixel lies, and whether it does; somewhere in x where it does not."""
    n, at = divmod(min(pixel, pixels - 1), p * q)
    h, w = at // q * stride[0] + top, at % q * stride[1] + left
    inside = pixel < pixels and 0 <= h < x.shape[1] and 0 <= w < x.shape[2]
    return n, h if inside else 0, w if inside else 0, inside


@njit(inline=True)
def _pair(first, second, has_first, has_second, pairs):
    """pairs[l] = (first[l], second[l]), zeros for what there is not."""
    low, high = np.uint32(0xFFFF if has_first else 0), np.uint32(0xFFFF if has_second else 0)
    for l in range(pairs.size):
        pairs[l] = (np.uint32(first[l]) & low) | ((np.uint32(second[l]) & high) << np.uint32(16))
