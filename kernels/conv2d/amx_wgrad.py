"""Weight gradient of bfloat16 on AMX tiles (cpu/amx.py): channels by pixels, times pixels by filters.

    dw[r, s, c, k] = sum over m of seen[c, m + shift of (r, s)] * upstream[m, k]        m: pixels of a grid

The rows of a tile of the first factor are channels, so x is transposed: a line of pixels for each channel, the padded
rows of its images one after the other, so that a tap is the same tile some numbers further on. At a stride, pixels of
each residue have lines of their own. dy lies on the same grid, zeros where there is no output, its pixels in pairs.
So taps meet the zeros of dy wherever else x has pixels, and an Inf that they do not see makes them NaN: `exact=False`.

images    few filters: a task has some images, transposes some pixels at a time and adds to a dw of its own
parts     many: all images are transposed first, a task owns some channels and filters of dw and sums over all pixels

float32 is taken for three bfloat16 (amx_tile.py), each with lines and panels of its own.
"""

from __future__ import annotations

import numpy as np

from ..cpu.amx import configure, new_state, release
from ..cpu.bfloat16 import bits
from ..cpu.features import amx
from ..cpu.jit import helper
from ..cpu.microkernel import lanes
from ..cpu.parallel import parallel
from ..cpu.transforms import interleave, transpose_block
from ..cpu.vectors import load, store_as
from ..memory import empty, to_nhwc
from .amx_tile import amx_kernel, interleave_parts, multiply, numbers, parts_of
from .packing import panel_width, unpacked
from .problem import CONV2D_WGRAD
from .unfolded import folded_filters, unfolded, worthwhile

_LANES = lanes(np.float32)
_BLOCK = 32  # pixels of a step of a product, which are transposed at a time
_CACHE = 3 << 18  # bytes of what is transposed at a time, to stay in the second-level cache,
_CHUNK = 1024  # and pixels of it at most, as of a product
_LARGE_DW = 1 << 19  # numbers from which on tasks own parts of dw
_PARTIALS = 1 << 20  # numbers that the partial sums may take
_TASKS, _CHANNELS, _PANELS = 16, 128, 4  # tasks over images; channels and panels of a part
_BLOCKS = 8  # of pixels, for a task that transposes


def _supports(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    whole = dy.shape[1] % 16 == 0 and (x.shape[1] % 16 == 0 or worthwhile(x.shape[1], kernel_hw[1], dilation))
    return bool(amx()) and _LANES >= 8 and groups == 1 and whole and x.size > 0 and dy.size > 0


def _rank_float32(x, dy, *, stride, kernel_hw, **params):
    """First where Winograd is not and filters are many: measured on ResNet's layers."""
    c, k = x.shape[1] if x.shape[1] % 16 == 0 else x.shape[1] * kernel_hw[1], dy.shape[1]
    pointwise = kernel_hw == (1, 1) and c * k >= 1 << 14
    return 6.0 if pointwise or (kernel_hw != (1, 1) and stride != (1, 1) and c >= 16 and k >= 64) else 3.9


@amx_kernel(
    CONV2D_WGRAD,
    supports=_supports,
    rank=None,
    rank_float32=_rank_float32,
    exact=False,  # for an Inf
    note="AMX: x transposed, 32 channels x 32 filters of a tap at a time",
)
def wgrad_amx(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    pointwise = kernel_hw == stride == (1, 1) and padding == (0, 0)
    turned = pointwise and x.shape[1] > dy.shape[1] and x.shape[1] % 16 == 0
    if turned:  # dw transposed is the gradient with x and dy in each other's place, and to transpose x takes longer
        x, dy = dy, x
    (c, k), (r, s), dtype = (x.shape[1], dy.shape[1]), kernel_hw, x.dtype
    x, dy, depth = to_nhwc(x), bits(to_nhwc(dy)), c
    if c % 16:
        x, depth = unfolded(x, s, dy.shape[2], stride, padding, 16), -(-s * c // 16) * 16
        stride, padding, kernel_hw = (stride[0], 1), (0, 0), (r, 1)
    grid, phases, shifts = _grid(dy.shape[1:3], x.shape[1:3], kernel_hw, stride, padding, dilation)
    width, taps, parts, n = panel_width(k, np.dtype(np.float32)), len(shifts), parts_of(dtype), len(dy)
    size = depth * taps * k
    few = size < _LARGE_DW
    splits = max(1, min(_TASKS, n, _PARTIALS // size)) if few else 1
    sums = empty((splits, k // width, taps, depth, width), np.float32)
    if few:
        bytes_of_pixel = 2 * parts * (len(phases) * depth + k)
        chunk = max(2 * _BLOCK, min(_CHUNK, _CACHE // bytes_of_pixel // _BLOCK * _BLOCK))
        _sum_images(splits, bits(x), dy, sums, parts, chunk, _length(chunk, shifts), grid, phases, shifts, stride)
    else:
        pixels = n * grid[0] * grid[1]
        length = _length(pixels, shifts)
        seen = empty((parts, len(phases), depth, length), np.uint16)
        upstream = empty((parts, k // width, -(-pixels // _BLOCK) * _BLOCK // 2, width), np.uint32)
        _lay_out(-(-length // (_BLOCKS * _BLOCK)), bits(x), dy, seen, upstream, grid, phases, stride)
        tasks = -(-depth // _CHANNELS) * -(-(k // width) // _PANELS)
        _sum_parts(tasks, seen, upstream, sums[0], shifts)
    if turned:
        dw = empty((c, k, 1, 1), dtype)
        _add_up(c, sums.reshape(splits, -1, c, width), bits(dw))
        return dw
    strides = taps * depth * width, width, kernel_hw[1] * depth * width, depth * width
    dw = unpacked(sums.reshape(splits, -1), strides, (k, depth, *kernel_hw), dtype)
    return folded_filters(dw, c, s) if c % 16 else dw


@parallel()
def _add_up(i, sums, dw):
    """Row i of dw (C, K, 1, 1), of all parts (parts, panels of K, C, width)."""
    width = sums.shape[3]
    for j in range(sums.shape[1]):
        for l in range(0, width, _LANES):
            total = load(sums[0, j, i, l:].ctypes.data, _LANES, sums.dtype)
            for part in range(1, len(sums)):
                total = total + load(sums[part, j, i, l:].ctypes.data, _LANES, sums.dtype)
            store_as(dw.ctypes.data + (i * dw.shape[1] + j * width + l) * dw.itemsize, total, dw.dtype)


def _grid(pq, hw, rs, stride, padding, dilation):
    """The rows and columns of an image's grid; the first row and column of x, of each residue that taps see; and for
    each tap its residue and the pixels of the grid from an output to what it sees."""
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


def _length(pixels, shifts):
    """Numbers of a channel's line for so many pixels, with what taps see after the last; an odd number of cache
    lines."""
    whole = -(-pixels // _BLOCK) * _BLOCK
    return (-(-(whole + int(shifts[:, 1].max())) // _BLOCK) | 1) * _BLOCK


@parallel()
def _sum_images(t, x, dy, sums, parts, chunk, length, grid, phases, shifts, stride):
    n, size, (splits, panels, _, c, width) = x.shape[0], grid[0] * grid[1], sums.shape
    first, last = n * t // splits, n * (t + 1) // splits
    seen = numbers(parts * phases.shape[0] * c * length).reshape(parts, phases.shape[0], c, length)
    upstream = numbers(parts * panels * chunk * width).view(np.uint32).reshape(parts, panels, chunk // 2, width)
    pairs = np.empty((parts, 1, _BLOCK // 2, c), np.float32)
    state, where = new_state(), np.empty(shifts.shape[0], np.int64)
    zeros = np.zeros(max(c, dy.shape[3]), x.dtype)
    pixels = (last - first) * size
    for start in range(0, pixels, chunk):
        count = min(chunk, (pixels - start + _BLOCK - 1) // _BLOCK * _BLOCK)
        _transpose(x[first:last], seen, grid, phases, stride, start, start, start + length, pairs, zeros)
        _arrange(dy[first:last], upstream, grid, start, start, start + count, zeros)
        _sum_part(state, seen, upstream, count // 2, sums[t], shifts, where, 0, c, 0, panels, start > 0)


@parallel()
def _lay_out(task, x, dy, seen, upstream, grid, phases, stride):
    first, last = task * _BLOCKS * _BLOCK, (task + 1) * _BLOCKS * _BLOCK
    pairs = np.empty((seen.shape[0], 1, _BLOCK // 2, x.shape[3]), np.float32)
    zeros = np.zeros(max(x.shape[3], dy.shape[3]), x.dtype)
    _transpose(x, seen, grid, phases, stride, 0, first, min(last, seen.shape[3]), pairs, zeros)
    _arrange(dy, upstream, grid, 0, first, min(last, upstream.shape[2] * 2), zeros)


@parallel()
def _sum_parts(task, seen, upstream, sums, shifts):
    panels, _, c, _ = sums.shape
    i, j = divmod(task, (panels + _PANELS - 1) // _PANELS)
    channels, filters = (i * _CHANNELS, min(c, (i + 1) * _CHANNELS)), (j * _PANELS, min(panels, (j + 1) * _PANELS))
    state, where, pairs = new_state(), np.empty(shifts.shape[0], np.int64), upstream.shape[2]
    _sum_part(
        state, seen, upstream, pairs, sums, shifts, where, channels[0], channels[1], filters[0], filters[1], False
    )


@helper()
def _transpose(x, seen, grid, phases, stride, origin, first, last, pairs, zeros):
    """The pixels of a grid from `first` to `last` of x into its lines, of which `origin` is the first."""
    lines = seen.shape[3] // 2
    for m in range(first, last, _BLOCK):
        for phase in range(phases.shape[0]):
            _gather(x, pairs, m, grid, stride, (phases[phase, 0], phases[phase, 1]), zeros)
            for p in range(pairs.shape[0]):
                for l in range(0, x.shape[3], _LANES):
                    for i in range(0, _BLOCK // 2, _LANES):
                        target = seen[p, phase, l].ctypes.data + (m - origin) * 2 + i * 4
                        transpose_block(pairs[p, 0, i, l:].ctypes.data, pairs.shape[3], target, lines, pairs.dtype)


@helper()
def _arrange(dy, upstream, grid, origin, first, last, zeros):
    """The pixels of a grid from `first` to `last` of dy into its panels, of which `origin` is the first."""
    for m in range(first, last, _BLOCK):
        at = (m - origin) // 2
        _gather(dy, upstream[:, :, at : at + _BLOCK // 2], m, grid, (1, 1), (0, 0), zeros)


@helper()
def _gather(x, pairs, m, grid, stride, begin, zeros):
    """pairs[:, j, i]: the parts of some channels of the pixels of x at places m + 2i and m + 2i + 1 of the grid, for
    each panel j of channels; zeros outside x."""
    (n, h_size, w_size, _), (_, panels, _, width), size = x.shape, pairs.shape, grid[0] * grid[1]
    count = min(width, x.shape[3])
    image, at = divmod(m, size)
    row, column = divmod(at, grid[1])
    before = np.int64(0)
    for i in range(_BLOCK):
        h, w = row * stride[0] + begin[0], column * stride[1] + begin[1]
        place = np.int64(zeros.ctypes.data)  # named within the loop, which keeps it; unsigned, Numba made floats of it
        if image < n and 0 <= h < h_size and 0 <= w < w_size:
            place = x.ctypes.data + image * x.strides[0] + h * x.strides[1] + w * x.strides[2]
        if i % 2:
            target = pairs.ctypes.data + i // 2 * pairs.strides[2]
            for j in range(panels):
                channel = j * width * x.itemsize
                if x.itemsize == 4:
                    interleave_parts(before + channel, place + channel, target, pairs.strides[0], count)
                else:
                    interleave(before + channel, place + channel, target, count, x.dtype)
                target += pairs.strides[1]
        before = place
        column += 1
        if column == grid[1]:
            column, row = 0, row + 1
            if row == grid[0]:
                row, image = 0, image + 1


@helper()
def _sum_part(state, seen, upstream, pairs, dw, shifts, where, first_channel, channels, first_panel, panels, more):
    """dw (panels, taps, C, width): some channels and panels of it, over so many pairs of pixels; where `more`, added.

    Nothing here can raise: the tiles are released at its end.
    """
    (_, taps, c, width), row = dw.shape, seen.shape[3] * 2
    for t in range(taps):
        where[t] = seen.ctypes.data + shifts[t, 0] * c * row + shifts[t, 1] * 2
    first, last = first_channel // 16 * taps, channels // 16 * taps
    configure(state)
    for start in range(0, pairs, _CHUNK // 2):
        count = min(_CHUNK // 2, pairs - start)
        for j in range(first_panel, panels):
            b = upstream[0, j, start].ctypes.data
            for i in range(first, last, 2):
                # A tile is 16 channels of a tap; two are neighbours, or, where one is left, the same.
                (block, tap), (other, tap_too) = divmod(i, taps), divmod(min(i + 1, last - 1), taps)
                a, a_too = where[tap] + block * 16 * row, where[tap_too] + other * 16 * row
                out = dw.ctypes.data + (((j * taps + tap) * c + block * 16) * width) * 4
                out_too = dw.ctypes.data + (((j * taps + tap_too) * c + other * 16) * width) * 4
                multiply(
                    state, a + start * 4, a_too + start * 4, (row, 64, seen.strides[0], 0), b, width * 4,
                    upstream.strides[0], count // 16, 1, seen.shape[0], out, out_too, width * 4, more or start > 0,
                    (out, out_too), width * 4, width > 16,
                )  # fmt: skip
    release(state)
