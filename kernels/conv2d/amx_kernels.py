"""Convolution on AMX tiles (cpu/amx.py), of bfloat16, and of float32 in three parts (amx_tile.py): the direct kernels'
idea, a block of 32 x 32 sums at a time.

    fprop   y[m, k] = sum over r, (s c) of row_r[m, (s c)] * w[r, (s c), k]     m: output pixels, one after the other
    dgrad   fprop over dy, the filter turned round and transposed; at stride u, each residue modulo u by itself

The rows of a tile are 16 pixels of the output, neighbours in memory: of a copy with zeros around (and its channels
filled up to whole tiles), some images at a time, which stays in the second-level cache. (For 1x1: amx_pointwise.py.)
Where rows of the output are short, tiles run over their ends into the next row (`_pitch`), and what lies between two
rows is not written. Filters are packed once per call, two neighbouring channels side by side. Summed in float32; bias,
skip, ReLU and the rounding are done on the block of sums.
"""

from __future__ import annotations

import numpy as np

from ..cpu.amx import ROWS, configure, new_state, release
from ..cpu.bfloat16 import bits
from ..cpu.features import amx
from ..cpu.jit import get_num_threads, helper
from ..cpu.microkernel import lanes
from ..cpu.parallel import parallel
from ..cpu.transforms import clear, move, move_rows
from ..kept import kept
from ..memory import contiguous, empty, empty_nhwc, to_nhwc, write, zeros
from .amx_pointwise import multiply_pixels
from .amx_tile import CHANNELS, amx_kernel, finish, interleave_parts, multiply, numbers, parts_of, split
from .bfloat16_kernels import pair, paired
from .dgrad_add import dgrad_add_kernel
from .direct_kernels import residues_are_convolutions
from .epilogue import epilogue
from .genstats import NONE, add_up, and_statistics, genstats_kernel, new_sums
from .numba_kernels import residues
from .packing import aligned, of_residue, panel_width, transpose
from .problem import CONV2D_BIAS_ACT, CONV2D_DGRAD, CONV2D_FPROP, out_hw
from .unfolded import unfolded, unfolded_filters, worthwhile

_LANES = lanes(np.float32)
_LINE = 64
_LARGE_FILTERS = 1 << 19  # bytes from which filters leave the second-level cache,
_FAR = 5 << 18  # and bytes of the images that each panel of them meets;
_NEAR = 1 << 19  # else of a strip that all panels meet
_TASKS_OF_A_THREAD = 4
_STRIP_ROWS = 4  # of output, at least
_FEW, _MANY = 64, 1 << 20  # channels, and numbers of filters, between which float32 is taken apart
_NUMBERS = 1 << 14  # of filters, for a task that takes them apart


def _fprop_supports(x, w, *, stride, padding, dilation, groups):
    whole = w.shape[0] % ROWS == 0 and (w.shape[1] % 2 == 0 or worthwhile(w.shape[1], w.shape[3], dilation))
    return bool(amx()) and _LANES >= 8 and groups == 1 and dilation[1] == 1 and whole


def _bias_act_supports(x, w, b, z, *, relu, **params):
    return _fprop_supports(x, w, **params)


def _dgrad_supports(dy, w, *, stride, padding, dilation, groups, input_hw):
    whole = w.shape[1] % ROWS == 0 and w.shape[0] % 2 == 0
    convolutions = residues_are_convolutions(w, stride, padding, dilation)
    return bool(amx()) and _LANES >= 8 and groups == 1 and whole and convolutions


def _rank(_, w, *more, dilation, **params):
    """First, unless most of a tile would be zeros."""
    return 6.0 if min(w.shape[:2]) >= 16 or worthwhile(w.shape[1], w.shape[3], dilation) else 3.8


def _dgrad_rank(_, w, **params):
    return 6.0 if min(w.shape[:2]) >= 16 else 3.8


def _rank_float32(_, w, *more, stride, **params):
    """First where Winograd is not, between few channels and filters that take longer to take apart than to multiply:
    measured on ResNet's layers."""
    pointwise = w.shape[2:] == (1, 1)
    between = min(w.shape[:2]) >= _FEW and (w.size <= 2 * _MANY if pointwise else w.size < _MANY)
    return 6.0 if between and (pointwise or stride != (1, 1)) else 3.9


def _dgrad_rank_float32(dy, w, *, stride, **params):
    """The same, but for 1x1 at a stride, most of whose dx is zeros."""
    return 3.9 if w.shape[2:] == (1, 1) != stride else _rank_float32(dy, w, stride=stride)


@amx_kernel(CONV2D_FPROP, supports=_fprop_supports, rank=_rank, rank_float32=_rank_float32, note="AMX: 32 x 32 sums")
def fprop_amx(x, w, *, stride, padding, dilation, groups):
    return _convolve(x, w, stride, padding, dilation)


@genstats_kernel(fprop_amx)
def fprop_amx_genstats(x, w, *, stride, padding, dilation, groups):
    return _convolve(x, w, stride, padding, dilation, statistics=True)


@amx_kernel(
    CONV2D_BIAS_ACT,
    supports=_bias_act_supports,
    rank=_rank,
    rank_float32=_rank_float32,
    note="AMX; bias, skip and ReLU on the block of sums",
)
def bias_act_amx(x, w, b, z, *, stride, padding, dilation, groups, relu):
    return _convolve(x, w, stride, padding, dilation, b, z, relu)


def _convolve(x, w, stride, padding, dilation, *more, statistics=False):
    x = to_nhwc(x)
    hw = out_hw(x.shape[1:3], w.shape[2:], stride, padding, dilation)
    y, memory = empty_nhwc(x.shape[0], w.shape[0], *hw, x.dtype)
    if worthwhile(w.shape[1], w.shape[3], dilation):
        x = unfolded(x, w.shape[3], hw[1], stride, padding)
        panels, stride, padding = _unfolded_panels(w), (stride[0], 1), (0, 0)
        run = None
    else:
        run = _run_of_halves(x, w.shape[3])
        panels = _panels_of_halves(w, False) if run else _panels(w, False)
    x = bits(x)
    if panels.shape[2:4] == (1, 1) and padding == (0, 0):  # of one tap, what a stride leaves out is not copied
        x, stride = x[:, :: stride[0], :: stride[1]], (1, 1)
    sums = _multiply(x, panels, bits(memory), stride, padding, dilation[0], *more, statistics=statistics, run=run)
    return and_statistics(y, sums)


@amx_kernel(
    CONV2D_DGRAD,
    supports=_dgrad_supports,
    rank=_dgrad_rank,
    rank_float32=_dgrad_rank_float32,
    note="AMX: stride² convolutions over dy",
)
def dgrad_amx(dy, w, *, stride, padding, dilation, groups, input_hw):
    return _dgrad(dy, w, stride, padding, dilation, input_hw)


@dgrad_add_kernel(dgrad_amx)
def dgrad_add_amx(dy, w, z, *, stride, padding, dilation, groups, input_hw):
    return _dgrad(dy, w, stride, padding, dilation, input_hw, z)


def _dgrad(dy, w, stride, padding, dilation, input_hw, z=None):
    dy, (_, c, r, s) = to_nhwc(dy), w.shape
    dx, memory = empty_nhwc(dy.shape[0], c, *input_hw, dy.dtype)
    run = _run_of_halves(dy, s) if stride == dilation == (1, 1) else None
    panels = _panels_of_halves(w, True) if run else _panels(w, True)
    for part, (r_taps, rows), (s_taps, cols) in residues(bits(memory), (r, s), stride, padding, dilation):
        chosen = panels
        if not run:
            chosen = of_residue(panels.reshape(-1, *panels.shape[2:]), r_taps, s_taps)
            chosen = chosen.reshape(*panels.shape[:2], *chosen.shape[1:])
        _multiply(bits(dy), chosen, part, (1, 1), (-rows[0], -cols[0]), dilation[0], None, z, run=run)
    return dx


def _run_of_halves(x, taps):
    """Taps, bytes of a pixel and of a step, where half a step is a pixel of three: the first step has two taps, the
    second is one pixel further and has the third beside a zero, so that nothing outside of a window is read. (Of an Inf
    in the middle that makes a NaN.) Two steps instead of three, of a copy half as large."""
    return (taps, _LINE // 2, _LINE // 2) if taps == 3 and x.shape[-1] == CHANNELS // 2 else None


@kept
def _panels_of_halves(w, turned):
    """`_panels`, of 16 inputs and three taps of a row, for `_run_of_halves`."""
    order, inputs = (-1 if turned else 1), (0 if turned else 1)
    halves = zeros((*w.shape[:inputs], 2, *w.shape[inputs:-1], 2), w.dtype)  # of the inputs of a step; steps
    for step, half, tap in ((0, 0, 0), (0, 1, 1), (1, 1, 2)):
        place = (slice(None),) * inputs + (half,)
        write(halves[..., ::order][..., step][place], w[..., ::order][..., tap])
    return _panels(halves.reshape(*w.shape[:inputs], 2 * w.shape[inputs], *w.shape[inputs + 1 : -1], 2), turned)


@kept
def _panels(w, turned):
    """`paired` of each part: (parts, panels, R, S, C/2, width), channels filled up to whole steps."""
    if parts_of(w.dtype) == 1:
        return paired(w, turned, CHANNELS)[None]
    w = contiguous(w)
    outputs, inputs = (w.shape[1], w.shape[0]) if turned else w.shape[:2]
    width, depth = panel_width(outputs, w.dtype), -(-inputs // CHANNELS) * CHANNELS // 2
    panels = empty((3, outputs // width, *w.shape[2:], depth, width), np.uint32)
    if w.shape[2:] == (1, 1):
        _lay_out(outputs // width, w.reshape(w.shape[:2]), turned, panels.reshape(3, -1, depth, width))
        return panels
    parts = empty((3, *w.shape), np.uint16)
    _split(-(-w.size // _NUMBERS), w.reshape(-1), parts.reshape(3, -1))
    for part, into in zip(parts, panels, strict=True):
        pair(part, turned, into)
    return panels


@parallel()
def _lay_out(j, w, turned, panels):
    """A panel of all parts of filters of one tap, w (K, C): `pair`, in one go."""
    parts, _, depth, width = panels.shape
    (k, c), part = w.shape, panels.strides[0]
    if turned:  # they lie as they should
        for i in range(depth):
            a, target = w.ctypes.data + (2 * i * c + j * width) * 4, panels[0, j, i].ctypes.data
            if 2 * i < k:
                interleave_parts(a, a + c * 4, target, part, width)
            else:
                for p in range(parts):
                    clear(target + p * part, width * 4)
        return
    rows = numbers(parts * width * depth * 2)
    for i in range(width):
        target = rows.ctypes.data + i * depth * 4
        split(w.ctypes.data + (j * width + i) * c * 4, target, width * depth * 4, c)
        for p in range(parts):
            clear(target + p * width * depth * 4 + c * 2, depth * 4 - c * 2)
    for p in range(parts):
        source, target = rows.view(np.float32), panels[p, j].reshape(-1).view(np.float32)
        transpose(source, p * width * depth, depth, depth, width, target, 0)


@parallel()
def _split(task, w, parts):
    first, last = task * _NUMBERS, min((task + 1) * _NUMBERS, w.size)
    split(w.ctypes.data + first * 4, parts.ctypes.data + first * 2, parts.strides[0], last - first)


@kept
def _unfolded_panels(w):
    return _panels(unfolded_filters(w), False)


def _multiply(x, panels, y, stride, padding, dilation, *more, statistics=False, run=None):
    """y (N, P, Q, K), of any strides but contiguous K, from x (N, H, W, C), panels of filters (parts, panels of K, R,
    S, C/2, width), and what `epilogue` takes. Returns the sums of its statistics, where they are wanted. run: taps of
    a row, bytes of a pixel and of a step, where a step is not a tap's channels or some of them."""
    (n, h, w, c), threads, parts = x.shape, get_num_threads(), len(panels)
    if y.size == 0:
        return NONE
    bias, z, add, floor = epilogue(y, *more)
    far = panels.nbytes > _LARGE_FILTERS
    pointwise = panels.shape[2:4] == (1, 1) and padding == (0, 0) and y.shape[1:3] == (h, w) and c % CHANNELS == 0
    if pointwise and y.flags.c_contiguous and n * h * w >= ROWS:
        pixels = y.reshape(-1, y.shape[3]), bias, z.reshape(-1, z.shape[3]), add, floor
        return multiply_pixels(x, panels, *pixels, statistics)
    run = run or (panels.shape[3], 4 * panels.shape[4], _LINE)
    row = stride[0] * y.shape[2] * stride[1] * run[1] * parts
    image, strip = y.shape[1] * row, y.shape[1]
    if far and image <= _FAR:
        pieces = -(-n // (_FAR // image))
        images = at_once = -(-n // pieces)
    else:  # strips of almost equal height
        images, at_once = -(-n // (_TASKS_OF_A_THREAD * threads)), 1
        strip = -(-strip // -(-strip // max(_STRIP_ROWS, _NEAR // row)))
    pieces = -(-n // images)
    groups = min(panels.shape[1], -(-threads // pieces)) if far else 1
    sums = new_sums(n, y.shape[3], statistics)
    _multiply_images(
        pieces * groups, x, panels, y, stride, padding, dilation, images, at_once, strip, far, groups, bias, z, add,
        floor, sums, *run,
    )  # fmt: skip
    return sums


@parallel()
def _multiply_images(
    task, x, panels, y, stride, padding, dilation, images, at_once, strip, far, groups, bias, z, add, floor,
    totals, taps, pixel, a_step,
):  # fmt: skip
    piece, group = divmod(task, groups)
    first, last = panels.shape[1] * group // groups, panels.shape[1] * (group + 1) // groups
    start, stop = piece * images, min((piece + 1) * images, x.shape[0])
    (_, _, q_size, _), (parts, _, r_size, _, _, width) = y.shape, panels.shape
    height = (strip - 1) * stride[0] + (r_size - 1) * dilation + 1
    columns = ((q_size - 1) * stride[1] + taps + stride[1] - 1) // stride[1] * stride[1]
    part = (at_once * height * columns + ROWS * stride[1]) * pixel + 2 * _LINE  # tiles hang over at the end
    seen = numbers(parts * part // 2)
    clear(seen.ctypes.data, parts * part)
    state, sums = new_state(), aligned(2 * 2 * ROWS * width, bias)
    _sum_images(
        state, sums, seen, part, height, columns, x[start:stop], panels, first, last, y[start:stop], stride, padding,
        dilation, at_once, strip, far, bias, z[start:stop], add, floor, totals[start:stop],
        pixel, a_step,
    )  # fmt: skip


@helper()
def _sum_images(
    state, sums, seen, part, height, columns, x, panels, first, last, y, stride, padding, dilation, at_once, strip, far,
    bias, z, add, floor, totals, pixel, a_step,
):  # fmt: skip
    (n, p_size, q_size, _), (parts, _, r_size, _, _, _) = y.shape, panels.shape
    line, size = columns * pixel, height * columns * pixel
    step = 1 if far else last - first  # one panel of many meets all images, then the next
    configure(state)
    for i in range(0, n, at_once):
        stop = min(i + at_once, n)
        for top in range(0, p_size, strip):
            rows = min(strip, p_size - top)
            reach = (rows - 1) * stride[0] + (r_size - 1) * dilation + 1
            pitch = _pitch(rows, q_size, stride[0] * (columns // stride[1]))
            for m in range(i, stop):
                a = seen.ctypes.data + (m - i) * size
                _pad(x[m], a, reach, columns, pixel, part, parts, top * stride[0] - padding[0], padding[1])
            for j in range(first, last, step):
                for m in range(i, stop):
                    a = seen.ctypes.data + (m - i) * size
                    out = y.ctypes.data + m * y.strides[0] + top * y.strides[1]
                    skip = z.ctypes.data + m * z.strides[0] + top * z.strides[1]
                    _sum_image(
                        state, sums, a, stride[1] * pixel, a_step, stride[0] * line, dilation * line, part, pitch,
                        panels, j, j + step, out, y.strides[1], y.strides[2], rows, q_size, bias, skip, z.strides[1],
                        z.strides[2], add, floor, y.dtype, y.itemsize,
                    )  # fmt: skip
                    if len(totals) > 0:
                        k, beyond = j * panels.shape[5], (j + step) * panels.shape[5]
                        add_up(
                            out + k * y.itemsize, y.strides[1], y.strides[2], rows, q_size, totals[m], k, beyond,
                            y.itemsize, y.dtype,
                        )  # fmt: skip
    release(state)


@helper()
def _pitch(p_size, q_size, pitch):
    """Pixels from the start of an output's row to the next one's, where tiles run over; 0 where each begins anew."""
    row_by_row = p_size * ((q_size + ROWS - 1) // ROWS)
    return pitch if ((p_size - 1) * pitch + q_size + ROWS - 1) // ROWS < row_by_row else 0


@helper()
def _pad(x, seen, height, columns, pixel, part, parts, above, left):
    """Rows of an image from `above` on, which windows see, and zeros where there are none; columns to the left and
    right, and channels that x has not, stay zero, too."""
    h_size, w_size, c = x.shape
    skipped, count = max(0, -left), min(columns, left + w_size) - max(0, left)
    for i in range(height):
        target = seen + (i * columns + max(0, left)) * pixel
        if not 0 <= above + i < h_size:
            for p in range(parts):
                clear(target + p * part, count * pixel)
            continue
        source = x.ctypes.data + (above + i) * x.strides[0] + skipped * x.strides[1]
        if x.itemsize == 4 and x.strides[1] == 4 * c and 2 * c == pixel:
            split(source, target, part, count * c)
        elif x.itemsize == 4:
            for j in range(count):
                split(source + j * x.strides[1], target + j * pixel, part, c)
        elif x.strides[1] == 2 * c == pixel:
            move(source, target, count * pixel)
        else:
            move_rows(source, x.strides[1], target, pixel, count, 2 * c)


@helper()
def _sum_image(
    state, sums, a, step, a_step, row, outer, part, pitch, panels, first, last,
    out, out_row, out_pixel, p_size, q_size, bias, skip, skip_row, skip_pixel, add, floor, dtype, size,
):  # fmt: skip
    """Some panels of an image's output: for two tiles of pixels after the other. Nothing here can raise.

    A product is finished after the next one was asked for: its sums are there by then, and while vectors are computed
    the tiles go on multiplying.
    """
    parts, _, r_size, taps, depth, width = panels.shape
    runs, length = (1, (p_size - 1) * pitch + q_size) if pitch else (p_size, q_size)
    tiles = (length + ROWS - 1) // ROWS
    steps, c_row, place = taps * depth // ROWS, width * 4, np.int64(sums.ctypes.data)
    count, block = last - first, 2 * ROWS * width * 4
    products = (runs * tiles + 1) // 2 * count
    for n in range(products + 1):
        if n < products:
            t, j = 2 * (n // count), first + n % count
            (run, m), (run_too, m_too) = divmod(t, tiles), divmod(min(t + 1, runs * tiles - 1), tiles)
            here = place + n % 2 * block
            second = here + ROWS * c_row
            multiply(
                state, a + run * row + m * ROWS * step, a + run_too * row + m_too * ROWS * step,
                (step, a_step, part, outer), panels.ctypes.data + j * panels.strides[1], c_row, panels.strides[0],
                steps, r_size, parts, here, second, c_row, False, (here, second), c_row, width > ROWS,
            )  # fmt: skip
        if n > 0:
            t, column, done = 2 * ((n - 1) // count), (first + (n - 1) % count) * width, place + (n - 1) % 2 * block
            shift = bias.ctypes.data + column * 4 if bias.size > 0 else 0
            for tile in (t, min(t + 1, runs * tiles - 1)):
                run, m = divmod(tile, tiles)
                p, q = divmod(m * ROWS, pitch) if pitch else (run, m * ROWS)
                _finish(
                    done + (tile - t) * ROWS * c_row, width, p, q, pitch, p_size, q_size, shift, out + column * size,
                    out_row, out_pixel, skip + column * size, skip_row, skip_pixel, add, floor, bias.dtype, dtype,
                )  # fmt: skip


@helper()
def _finish(
    sums, width, p, q, pitch, p_size, q_size, bias, out, out_row, out_pixel, skip, skip_row, skip_pixel, add, floor,
    dtype, out_dtype,
):  # fmt: skip
    """y = max(sums + bias + z, floor), rounded, for the pixels of a tile that are some of the output's: run by run."""
    i = 0
    while i < ROWS and p < p_size:
        count = min(ROWS - i, (q_size if q < q_size else pitch) - q)
        if count <= 0:  # the run ends with its row
            break
        if q < q_size:
            source, to = sums + i * width * 4, out + p * out_row + q * out_pixel
            more = skip + p * skip_row + q * skip_pixel
            finish(source, width, bias, to, out_pixel, more, skip_pixel, add, floor, count, dtype, out_dtype)
        i, q = i + count, q + count
        if q == pitch:
            p, q = p + 1, 0
