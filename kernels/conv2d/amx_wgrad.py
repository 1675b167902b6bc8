"""Weight gradient of bfloat16 on AMX tiles (cpu/amx.py): channels by pixels, times pixels by filters.

    dw[r, s, c, k] = sum over m of seen[c, m + shift of (r, s)] * upstream[m, k]        m: pixels of a grid

The rows of a tile of the first factor are channels, so x is transposed: a line of pixels for each channel, the padded
rows of its images one after the other, so that a tap is the same tile some numbers further on. At a stride, pixels of
each residue have lines of their own. dy lies on the same grid, zeros where there is no output, its pixels in pairs.
(So the tap of a corner meets Inf * 0 where x has an Inf that it does not see: NaN, in a filter's row that has an Inf.)

images    few filters: a task has some images, transposes a few at a time and adds to a dw of its own
parts     many: all images are transposed first, a task owns some channels and filters of dw and sums over all pixels
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ..cpu.amx import configure, new_state, release
from ..cpu.bfloat16 import bits
from ..cpu.features import amx
from ..cpu.jit import helper
from ..cpu.microkernel import lanes
from ..cpu.parallel import parallel
from ..cpu.transforms import copy, interleave, transpose_block
from ..memory import empty, to_nhwc
from ..registry import kernel
from .amx_tile import multiply
from .packing import aligned, panel_width, unpacked
from .problem import CONV2D_WGRAD
from .unfolded import folded_filters, unfolded, worthwhile

_LANES = lanes(np.float32)
_BLOCK = 32  # pixels of a step of a product, which are transposed at a time
_PIXELS = 512  # at least, of the images that are transposed at a time
_CHUNK = 1024  # pixels of a product, whose factors stay in the second-level cache
_LARGE_DW = 1 << 16  # numbers from which on tasks own parts of dw
_PARTIALS = 1 << 21  # numbers that the partial sums may take
_TASKS, _CHANNELS, _PANELS = 16, 128, 4  # tasks over images; channels and panels of a part
_BLOCKS = 8  # of pixels, for a task that transposes


def _supports(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    whole = dy.shape[1] % 16 == 0 and (x.shape[1] % 16 == 0 or worthwhile(x.shape[1], kernel_hw[1], dilation))
    return bool(amx()) and _LANES >= 8 and groups == 1 and whole and x.size > 0 and dy.size > 0


@kernel(
    CONV2D_WGRAD,
    device="cpu",
    step=6,
    supports=_supports,
    dtypes=("bfloat16",),
    note="AMX: x transposed, 32 channels x 32 filters of a tap at a time",
)
def wgrad_amx(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    x, dy, c, (r, s) = to_nhwc(x), bits(to_nhwc(dy)), x.shape[1], kernel_hw
    if c % 16:
        rows = bits(unfolded(x, s, dy.shape[2], stride, padding, 16))
        return folded_filters(_wgrad(rows, dy, (stride[0], 1), (0, 0), dilation, (r, 1)), c, s)
    return _wgrad(bits(x), dy, stride, padding, dilation, kernel_hw)


def _wgrad(x, dy, stride, padding, dilation, kernel_hw):
    (n, p, q, k), c, (r, s) = dy.shape, x.shape[3], kernel_hw
    grid, phases, shifts = _grid(dy.shape[1:3], x.shape[1:3], kernel_hw, stride, padding, dilation)
    width, taps = panel_width(k, np.dtype(np.float32)), r * s
    numbers, size = c * taps * k, grid[0] * grid[1]
    at_once = min(n, max(1, -(-_PIXELS // size)))
    few = numbers < _LARGE_DW
    splits = max(1, min(_TASKS, n // at_once, _PARTIALS // numbers)) if few else 1
    parts = empty((splits, k // width, taps, c, width), np.float32)
    if few:
        _sum_images(splits, x, dy, parts, at_once, grid, phases, shifts, stride)
    else:
        length = _length(n, grid, shifts)
        seen = empty((len(phases), c, length), np.uint16)
        upstream = empty((k // width, _round_up(n * size) // 2, width), np.uint32)
        _lay_out(-(-length // (_BLOCKS * _BLOCK)), x, dy, seen, upstream, grid, phases, stride)
        tasks = -(-c // _CHANNELS) * -(-(k // width) // _PANELS)
        _sum_parts(tasks, seen, upstream, parts[0], shifts)
    strides = taps * c * width, width, s * c * width, c * width
    return unpacked(parts.reshape(splits, -1), strides, (k, c, r, s), ml_dtypes.bfloat16)


def _grid(pq, hw, rs, stride, padding, dilation):
    """The rows and columns of an image's grid; the first row and column of x, of each residue that taps see; and for
    each tap (residue, rows, columns): where it sees."""
    sides, begins, places = [], [], []
    for i in (0, 1):
        offsets = [t * dilation[i] for t in range(rs[i])]
        residues = sorted({o % stride[i] for o in offsets})
        begins.append([a - padding[i] for a in residues])
        places.append([(residues.index(o % stride[i]), o // stride[i]) for o in offsets])
        side = pq[i] + max(place[1] for place in places[i])
        if stride[i] == 1:  # zeros after a row may be those before the next
            side -= max(0, min(padding[i], side - padding[i] - hw[i], side - pq[i]))
        sides.append(side)
    phases = np.array([(top, left) for top in begins[0] for left in begins[1]], np.int64)
    columns = len(begins[1])
    shifts = np.array([(a * columns + b, i * sides[1] + j) for a, i in places[0] for b, j in places[1]], np.int64)
    return tuple(sides), phases, shifts


def _round_up(pixels):
    return -(-pixels // _BLOCK) * _BLOCK


def _length(n, grid, shifts):
    """Numbers of a channel's line for n images, with what taps see after the last; an odd number of cache lines."""
    lines = _round_up(_round_up(n * grid[0] * grid[1]) + int(shifts[:, 1].max())) // _BLOCK
    return (lines | 1) * _BLOCK


@parallel()
def _sum_images(t, x, dy, parts, at_once, grid, phases, shifts, stride):
    n, size, splits = x.shape[0], grid[0] * grid[1], parts.shape[0]
    first, last = n * t // splits, n * (t + 1) // splits
    pixels = (at_once * size + _BLOCK - 1) // _BLOCK * _BLOCK
    length = ((pixels + shifts[:, 1].max() + _BLOCK - 1) // _BLOCK | 1) * _BLOCK
    panels, width = parts.shape[1], parts.shape[4]
    seen = aligned(phases.shape[0] * x.shape[3] * length, x).reshape(phases.shape[0], x.shape[3], length)
    upstream = aligned(panels * pixels * width, x).view(np.uint32).reshape(panels, pixels // 2, width)
    pairs = np.empty((_BLOCK // 2, max(x.shape[3], dy.shape[3])), np.float32)
    state, where = new_state(), np.empty(shifts.shape[0], np.int64)
    for i in range(first, last, at_once):
        stop = min(i + at_once, last)
        _transpose_blocks(x[i:stop], dy[i:stop], seen, upstream, grid, phases, stride, 0, length, pairs)
        _sum_part(state, seen, upstream, parts[t], shifts, where, 0, x.shape[3], 0, panels, i > first)


@parallel()
def _lay_out(task, x, dy, seen, upstream, grid, phases, stride):
    first, last = task * _BLOCKS * _BLOCK, min((task + 1) * _BLOCKS * _BLOCK, seen.shape[2])
    pairs = np.empty((_BLOCK // 2, max(x.shape[3], dy.shape[3])), np.float32)
    _transpose_blocks(x, dy, seen, upstream, grid, phases, stride, first, last, pairs)


@parallel()
def _sum_parts(task, seen, upstream, parts, shifts):
    (panels, _, c, _), (_, length, _) = parts.shape, upstream.shape
    i, j = divmod(task, (panels + _PANELS - 1) // _PANELS)
    channels, filters = (i * _CHANNELS, min(c, (i + 1) * _CHANNELS)), (j * _PANELS, min(panels, (j + 1) * _PANELS))
    state, where = new_state(), np.empty(shifts.shape[0], np.int64)
    _sum_part(state, seen, upstream, parts, shifts, where, channels[0], channels[1], filters[0], filters[1], False)


@helper()
def _transpose_blocks(x, dy, seen, upstream, grid, phases, stride, first, last, pairs):
    """The pixels of a grid from `first` to `last`: x into its lines, dy into its panels."""
    zeros = np.zeros(pairs.shape[1], x.dtype)
    lines, width = seen.shape[2] // 2, upstream.shape[2]
    for m in range(first, last, _BLOCK):
        for phase in range(phases.shape[0]):
            _gather(x, pairs, m, grid, stride, (phases[phase, 0], phases[phase, 1]), zeros)
            for l in range(0, x.shape[3], _LANES):
                for i in range(0, _BLOCK // 2, _LANES):
                    target = seen[phase, l].ctypes.data + m * 2 + i * 4
                    transpose_block(pairs[i, l:].ctypes.data, pairs.shape[1], target, lines, pairs.dtype)
        if m // 2 < upstream.shape[1]:
            _gather(dy, pairs, m, grid, (1, 1), (0, 0), zeros)
            for j in range(upstream.shape[0]):
                for i in range(_BLOCK // 2):
                    target = upstream[j, m // 2 + i].ctypes.data
                    copy(pairs[i, j * width :].ctypes.data, target, width, pairs.dtype)


@helper()
def _gather(x, pairs, m, grid, stride, begin, zeros):
    """pairs[i, :c]: the pixels of x at places m + 2i and m + 2i + 1 of the grid; zeros outside x."""
    (n, h_size, w_size, c), size = x.shape, grid[0] * grid[1]
    image, at = divmod(m, size)
    row, column = divmod(at, grid[1])
    before = np.int64(0)
    for i in range(_BLOCK):
        h, w = row * stride[0] + begin[0], column * stride[1] + begin[1]
        place = np.int64(zeros.ctypes.data)  # named within the loop, which keeps it; unsigned, Numba made floats of it
        if image < n and 0 <= h < h_size and 0 <= w < w_size:
            place = x.ctypes.data + image * x.strides[0] + h * x.strides[1] + w * x.strides[2]
        if i % 2:
            interleave(before, place, pairs[i // 2].ctypes.data, c, x.dtype)
        before = place
        column += 1
        if column == grid[1]:
            column, row = 0, row + 1
            if row == grid[0]:
                row, image = 0, image + 1


@helper()
def _sum_part(state, seen, upstream, dw, shifts, where, first_channel, channels, first_panel, panels, more):
    """dw (panels, taps, C, width): some channels and panels of it, or, where `more`, added to it.

    Nothing here can raise: the tiles are released at its end.
    """
    (_, taps, c, width), row, size = dw.shape, seen.shape[2] * 2, 2 * 16 * dw.shape[3]
    for t in range(taps):
        where[t] = seen.ctypes.data + shifts[t, 0] * c * row + shifts[t, 1] * 2
    first, last = first_channel // 16 * taps, channels // 16 * taps
    pairs, chunk = upstream.shape[1], _CHUNK // 2
    configure(state)
    for start in range(0, pairs, chunk):
        count = min(chunk, pairs - start)
        for j in range(first_panel, panels):
            b = upstream[j, start].ctypes.data
            for i in range(first, last, 2):
                # A tile is 16 channels of a tap; two are neighbours, or, where one is left, the same.
                (block, tap), (other, tap_too) = divmod(i, taps), divmod(min(i + 1, last - 1), taps)
                a, a_too = where[tap] + block * 16 * row, where[tap_too] + other * 16 * row
                out = dw.ctypes.data + (((j * taps + tap) * c + block * 16) * width) * 4
                out_too = dw.ctypes.data + (((j * taps + tap_too) * c + other * 16) * width) * 4
                multiply(
                    state, a + start * 4, a_too + start * 4, row, 0, b, width * 4, count, 1,
                    out, out_too, width * 4, more or start > 0, width > 16,
                )  # fmt: skip
    release(state)
