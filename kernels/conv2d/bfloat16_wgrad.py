"""Weight gradient of bfloat16 on the CPU, in pairs of output pixels: what the taps see times dy, summed in float32.

dw[r, s, c, k] = sum over pairs j of seen[r, s, j, c, 0] * dy[j, k, 0] + seen[r, s, j, c, 1] * dy[j, k, 1]

direct    few channels: image by image; dy interleaved (P, Q/2, K, 2), and for each column s of the filter the rows
          that its taps see (H, S, Q/2, C, 2), of which columns two pixels apart share theirs; without whole tiles
          of channels (a stem's 3), a filter's row is one such column, of S*C channels
parts     many channels, small images, where dw is larger than an image: a task owns a part of dw, over the pixels
          of all images (wgrad_kernels.py)
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ..cpu.bfloat16 import bits
from ..cpu.jit import helper
from ..cpu.microkernel import lanes, multiply_pairs_2d
from ..cpu.parallel import parallel
from ..cpu.transforms import interleave, move
from ..memory import empty, to_nhwc, zeros
from ..registry import kernel
from .bfloat16_kernels import in_pairs
from .packing import panel_width, unpacked
from .problem import CONV2D_WGRAD

_ROWS, _NARROW_ROWS = 8, 16  # of a tile of two vectors, and of one: as many sums under way
_LANES = lanes(np.float32)
_PARTIALS = 1 << 24  # numbers that the partial sums may take
_CHANNELS, _PAIRS, _PANELS = 64, 128, 8  # channels and panels of a task, pairs of its blocks
_SMALL_IMAGE, _LARGE_DW = 196, 1 << 16  # pixels of dy, and numbers of dw: measured on ResNet's layers


def _wgrad_supports(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    return groups == 1 and dilation[1] == 1 and dy.shape[1] % _LANES == 0 and x.size > 0 and dy.size > 0


def _parts_supports(x, dy, **params):
    return _wgrad_supports(x, dy, **params) and x.shape[1] % _NARROW_ROWS == 0


@kernel(
    CONV2D_WGRAD,
    device="cpu",
    step=4,
    supports=_wgrad_supports,
    dtypes=("bfloat16",),
    note="products of pairs of pixels: dy and what the taps see, interleaved",
)
def wgrad_direct_bfloat16(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    (c, k), (r, s) = (x.shape[1], dy.shape[1]), kernel_hw
    x, dy = bits(in_pairs(x) if c % 2 else to_nhwc(x)), bits(to_nhwc(dy))
    columns, deep = (s, x.shape[3]) if c % _NARROW_ROWS == 0 else (1, s * x.shape[3])
    wide = -(-deep // _NARROW_ROWS) * _NARROW_ROWS  # whole tiles; the rest is scratch
    # The sum over images is split by shape alone, never by threads: the same bits on any machine size.
    splits = max(1, min(len(x), 16, _PARTIALS // (r * columns * wide * k)))
    partial = zeros((splits, r, columns, wide, k), np.float32)
    _wgrad(len(partial), x, dy, partial, s, stride, padding, dilation[0])
    strides = panel_width(k, partial.dtype), k, columns * wide * k, (wide if columns > 1 else x.shape[3]) * k
    return unpacked(partial.reshape(splits, -1), strides, (k, c, r, s), ml_dtypes.bfloat16)


@parallel()
def _wgrad(t, x, dy, partial, taps, stride, padding, dilation):
    n, splits = x.shape[0], partial.shape[0]
    first, last = n * t // splits, n * (t + 1) // splits
    for i in range(first, last):
        _wgrad_image(x[i], dy[i], partial[t], taps, stride, padding, dilation)


@helper()
def _wgrad_image(x, dy, dw, taps, stride, padding, dilation):
    (p_size, q_size, k), (r_size, columns, c, _) = dy.shape, dw.shape
    pairs = (q_size + 1) // 2
    upstream = _interleaved(dy, (0, 0), p_size, 1, pairs, k, 1)
    # At stride 1 columns two pixels apart see the same pairs, one further on.
    shared = stride[1] == 1 and columns > 1
    versions, more = (2, (columns - 1) // 2) if shared else (columns, 0)
    height = (p_size - 1) * stride[0] + (r_size - 1) * dilation + 1
    seen = _interleaved(x, padding, height, versions, pairs + more, c, stride[1])
    wide = k % (2 * _LANES) == 0
    width, tile_rows = (2 * _LANES, _ROWS) if wide else (_LANES, _NARROW_ROWS)
    line = versions * (pairs + more) * c
    for p in range(0, p_size, _PAIRS // pairs + 1):  # rows that stay in the first-level cache for all taps
        rows = min(_PAIRS // pairs + 1, p_size - p)
        for r in range(r_size):
            for s in range(columns):
                version, ahead = (s % 2, s // 2) if shared else (s, 0)
                for i in range(0, c, tile_rows):
                    a = seen[p * stride[0] + r * dilation, version, ahead, i:].ctypes.data
                    for j in range(0, k, width):
                        b, out = upstream[p, 0, 0, j:].ctypes.data, dw[r, s, i, j:].ctypes.data
                        if wide:
                            multiply_pairs_2d(
                                a, 1, c, stride[0] * line, b, k, pairs * k,
                                out, k, pairs, rows, True, _ROWS, 2, dw.dtype,
                            )  # fmt: skip
                        else:
                            multiply_pairs_2d(
                                a, 1, c, stride[0] * line, b, k, pairs * k,
                                out, k, pairs, rows, True, _NARROW_ROWS, 1, dw.dtype,
                            )  # fmt: skip


@helper()
def _interleaved(x, padding, height, versions, pairs, c, stride):
    """seen[i, v, j, :c]: of row i of x, padded, what begins at pixel 2 j stride + v, and `stride` pixels further."""
    h_size, w_size, deep = x.shape
    line = np.zeros((2 * pairs * stride + versions + padding[1]) * deep + c, x.dtype)
    first = min(line.size, padding[1] * deep)
    row = line[first : min(line.size, first + w_size * deep)]
    seen = np.empty((height, versions, pairs, c), np.uint32)
    for i in range(height):
        h = i - padding[0]
        if 0 <= h < h_size:
            move(x[h].ctypes.data, row.ctypes.data, row.size * row.itemsize)
            for v in range(versions):
                for j in range(pairs):
                    a = line.ctypes.data + (2 * j * stride + v) * deep * 2
                    interleave(a, a + stride * deep * 2, seen[i, v, j].ctypes.data, c, x.dtype)
        else:
            seen[i] = 0
    return seen


def _parts_rank(x, dy, *, kernel_hw, **_):
    small = dy.shape[2] * dy.shape[3] <= _SMALL_IMAGE
    return 4.5 if small and kernel_hw[0] * kernel_hw[1] * x.shape[1] * dy.shape[1] >= _LARGE_DW else 3.9


@kernel(
    CONV2D_WGRAD,
    device="cpu",
    step=5,
    supports=_parts_supports,
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
    strides = width, k, kernel_hw[1] * c * k, c * k
    return unpacked(parts.reshape(1, -1), strides, (k, c, *kernel_hw), ml_dtypes.bfloat16)


@parallel()
def _split(j, dy, panels):
    _split_panel(dy, panels[j], j * panels.shape[2])


@helper()
def _split_panel(dy, panel, first):
    zeros = np.zeros(panel.shape[1], dy.dtype)
    for i in range(panel.shape[0]):
        second = dy[2 * i + 1, first:] if 2 * i + 1 < dy.shape[0] else zeros
        interleave(
            dy[2 * i, first:].ctypes.data, second.ctypes.data, panel[i].ctypes.data, panel.shape[1], dy.dtype
        )  # fmt: skip


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
    zeros = np.zeros(seen.shape[1], x.dtype)
    n, at = divmod(2 * start, p * q)
    row, column = divmod(at, q)
    places = (np.int64(0), np.int64(0))
    for i in range(2 * count):
        h, w = row * stride[0] + top, column * stride[1] + left
        inside = 2 * start + i < pixels and 0 <= h < x.shape[1] and 0 <= w < x.shape[2]
        place = np.int64(zeros.ctypes.data)  # named within the loop, which keeps it; unsigned, Numba made floats of it
        if inside:
            place = x.ctypes.data + (((n * x.shape[1] + h) * x.shape[2] + w) * x.shape[3] + channel) * x.itemsize
        places = (places[1], place)
        if i % 2:
            interleave(places[0], places[1], seen[i // 2].ctypes.data, seen.shape[1], x.dtype)
        column += 1
        if column == q:
            column, row = 0, row + 1
            if row == p:
                row, n = 0, n + 1
