"""Convolution of bfloat16 on AMX tiles (cpu/amx.py): the direct kernels' idea, a block of 32 x 32 sums at a time.

    fprop   y[m, k] = sum over r, (s c) of row_r[m, (s c)] * w[r, (s c), k]     m: output pixels, one after the other
    dgrad   fprop over dy, the filter turned round and transposed; at stride u, each residue modulo u by itself

The rows of a tile are 16 pixels of the output, neighbours in memory: of x as it lies where nothing is padded, else of a
copy with zeros around (and its channels filled up to whole tiles), some images at a time, which stays in the
second-level cache. Where rows of the output are short, tiles run over their ends into the next row (`_tiles`), and what
lies between two rows is not written. Filters are packed once per call, two neighbouring channels side by side. Summed
in float32; bias, skip, ReLU and the rounding are done on the block of sums.
"""

from __future__ import annotations

import numpy as np

from ..cpu.amx import configure, new_state, release
from ..cpu.bfloat16 import bits
from ..cpu.features import amx
from ..cpu.jit import get_num_threads, helper
from ..cpu.microkernel import lanes
from ..cpu.parallel import parallel
from ..cpu.transforms import fetch, move
from ..cpu.vectors import load, splat, store_as, where
from ..kept import kept
from ..memory import empty_nhwc, to_nhwc
from ..registry import kernel
from .amx_tile import multiply
from .bfloat16_kernels import paired
from .direct_kernels import residues_are_convolutions
from .epilogue import epilogue
from .numba_kernels import residues
from .packing import aligned, of_residue
from .problem import CONV2D_BIAS_ACT, CONV2D_DGRAD, CONV2D_FPROP, out_hw
from .unfolded import unfolded, unfolded_filters, worthwhile

_LANES = lanes(np.float32)
_ROWS, _STEP = 16, 32  # pixels of a tile; channels of a step
_DTYPES = ("bfloat16",)
_LARGE_FILTERS = 1 << 19  # bytes from which filters leave the second-level cache,
_IMAGES = 1 << 19  # and bytes of the images that each panel of them meets
_TASKS_OF_A_THREAD = 4
_PIXELS = 1 << 17  # numbers of the pixels of a task that reads x as it lies


def _fprop_supports(x, w, *, stride, padding, dilation, groups):
    whole = w.shape[0] % _ROWS == 0 and (w.shape[1] % 2 == 0 or worthwhile(w.shape[1], w.shape[3], dilation))
    return bool(amx()) and _LANES >= 8 and groups == 1 and dilation[1] == 1 and whole


def _rank(_, w, *more, dilation, **params):
    """First, unless most of a tile would be zeros."""
    return 6.0 if min(w.shape[:2]) >= 16 or worthwhile(w.shape[1], w.shape[3], dilation) else 3.8


def _dgrad_rank(_, w, **params):
    return 6.0 if min(w.shape[:2]) >= 16 else 3.8


@kernel(
    CONV2D_FPROP, device="cpu", step=6, supports=_fprop_supports, rank=_rank, dtypes=_DTYPES, note="AMX: 32 x 32 sums"
)
def fprop_amx(x, w, *, stride, padding, dilation, groups):
    return _convolve(x, w, stride, padding, dilation)


def _bias_act_supports(x, w, b, z, *, relu, **params):
    return _fprop_supports(x, w, **params)


@kernel(
    CONV2D_BIAS_ACT,
    device="cpu",
    step=6,
    supports=_bias_act_supports,
    rank=_rank,
    dtypes=_DTYPES,
    note="AMX; bias, skip and ReLU on the block of sums",
)
def bias_act_amx(x, w, b, z, *, stride, padding, dilation, groups, relu):
    return _convolve(x, w, stride, padding, dilation, b, z, relu)


def _dgrad_supports(dy, w, *, stride, padding, dilation, groups, input_hw):
    whole = w.shape[1] % _ROWS == 0 and w.shape[0] % 2 == 0
    return bool(amx()) and _LANES >= 8 and groups == 1 and whole and residues_are_convolutions(w, stride, padding, dilation)


@kernel(
    CONV2D_DGRAD,
    device="cpu",
    step=6,
    supports=_dgrad_supports,
    rank=_dgrad_rank,
    dtypes=_DTYPES,
    note="AMX: stride² convolutions over dy",
)
def dgrad_amx(dy, w, *, stride, padding, dilation, groups, input_hw):
    dy, (_, c, r, s) = to_nhwc(dy), w.shape
    dx, memory = empty_nhwc(dy.shape[0], c, *input_hw, dy.dtype)
    panels = paired(w, True, _STEP)
    for part, (r_taps, rows), (s_taps, cols) in residues(bits(memory), (r, s), stride, padding, dilation):
        at = (-rows[0], -cols[0])
        _multiply(bits(dy), of_residue(panels, r_taps, s_taps), part, (1, 1), at, dilation[0])
    return dx


def _convolve(x, w, stride, padding, dilation, *more):
    x = to_nhwc(x)
    hw = out_hw(x.shape[1:3], w.shape[2:], stride, padding, dilation)
    y, memory = empty_nhwc(x.shape[0], w.shape[0], *hw, x.dtype)
    if worthwhile(w.shape[1], w.shape[3], dilation):
        x = unfolded(x, w.shape[3], hw[1], stride, padding)
        panels, stride, padding = _unfolded_panels(w), (stride[0], 1), (0, 0)
    else:
        panels = paired(w, False, _STEP)
    x = bits(x)
    if panels.shape[1:3] == (1, 1) and padding == (0, 0):  # of one tap, what a stride leaves out is not copied
        x, stride = x[:, :: stride[0], :: stride[1]], (1, 1)
    _multiply(x, panels, bits(memory), stride, padding, dilation[0], *more)
    return y


@kept
def _unfolded_panels(w):
    return paired(unfolded_filters(w), False, _STEP)


def _multiply(x, panels, y, stride, padding, dilation, *more):
    """y (N, P, Q, K), of any strides but contiguous K, from x (N, H, W, C), panels of filters (panels of K, R, S, C/2,
    width), and what `epilogue` takes."""
    (n, h, w, c), threads = x.shape, get_num_threads()
    if y.size == 0:
        return
    bias, z, add, floor = epilogue(y, *more)
    lies_so = panels.shape[1:3] == (1, 1) and padding == (0, 0) and y.shape[1:3] == (h, w) and c % _STEP == 0
    if lies_so and x.flags.c_contiguous and y.flags.c_contiguous and n * h * w >= _ROWS:
        groups = -(-panels.nbytes // _LARGE_FILTERS)
        blocks = min(n * h * w // _ROWS, max(n * h * w * c // _PIXELS, _TASKS_OF_A_THREAD * threads // groups))
        x, y, z = (a.reshape(-1, a.shape[3]) for a in (x, y, z))
        _multiply_pixels(blocks * groups, x, panels, y, blocks, groups, bias, z, add, floor)
        return
    images = -(-n // (_TASKS_OF_A_THREAD * threads))
    at_once = 1
    if panels.nbytes > _LARGE_FILTERS:
        images = at_once = max(1, min(-(-n // threads), _IMAGES // max(1, x[:1].nbytes)))
    parts = -(-n // images)
    groups = min(len(panels), -(-threads // parts))
    _multiply_images(
        parts * groups, x, panels, y, stride, padding, dilation, images, at_once, groups, bias, z, add, floor
    )


@parallel()
def _multiply_pixels(task, x, panels, y, blocks, groups, bias, z, add, floor):
    """1x1: all images are one row of pixels, read as they lie."""
    group, block = divmod(task, blocks)
    first, last = len(panels) * group // groups, len(panels) * (group + 1) // groups
    start = min(len(x) * block // blocks, len(x) - _ROWS)
    count = max(len(x) * (block + 1) // blocks - start, _ROWS)
    state, sums = new_state(), aligned(2 * _ROWS * panels.shape[4], bias)
    configure(state)
    _sum_image(
        state, sums, x[start].ctypes.data, x.strides[0], 0, 0, 0, True, panels, first, last,
        y[start].ctypes.data, 0, y.strides[0], 1, count, bias, z[start].ctypes.data, 0, z.strides[0], add, floor, y.dtype,
    )  # fmt: skip
    release(state)


@parallel()
def _multiply_images(
    task, x, panels, y, stride, padding, dilation, images, at_once, groups, bias, z, add, floor
):  # fmt: skip
    part, group = divmod(task, groups)
    first, last = len(panels) * group // groups, len(panels) * (group + 1) // groups
    start, stop = part * images, min((part + 1) * images, x.shape[0])
    (_, p_size, q_size, _), (_, r_size, taps, pairs, _) = y.shape, panels.shape
    height = (p_size - 1) * stride[0] + (r_size - 1) * dilation + 1
    columns = ((q_size - 1) * stride[1] + taps + stride[1] - 1) // stride[1] * stride[1]
    size = height * columns * 2 * pairs
    spare = _ROWS * stride[1] * 2 * pairs  # tiles hang over at the end
    seen = aligned(at_once * size + spare, x)
    seen[:] = 0
    pitch = _pitch(p_size, q_size, stride[0] * (columns // stride[1]))
    pixel = 4 * pairs
    line = columns * pixel
    state, sums = new_state(), aligned(2 * _ROWS * panels.shape[4], bias)
    configure(state)
    for i in range(start, stop, at_once):
        last_image = min(i + at_once, stop)
        for m in range(i, last_image):
            _pad(x[m], seen.ctypes.data + (m - i) * size * 2, height, columns, pixel, padding)
        # One panel of many meets all images, then the next.
        for j in range(first, last, 1 if at_once > 1 else last - first):
            for m in range(i, last_image):
                a = seen.ctypes.data + (m - i) * size * 2
                out, skip = y.ctypes.data + m * y.strides[0], z.ctypes.data + m * z.strides[0]
                _sum_image(
                    state, sums, a, stride[1] * pixel, stride[0] * line, dilation * line, pitch, False, panels,
                    j, j + 1 if at_once > 1 else last, out, y.strides[1], y.strides[2], p_size, q_size,
                    bias, skip, z.strides[1], z.strides[2], add, floor, y.dtype,
                )  # fmt: skip
    release(state)


@helper()
def _pitch(p_size, q_size, pitch):
    """Pixels from the start of an output's row to the next one's, where tiles run over; 0 where each begins anew."""
    row_by_row = p_size * ((q_size + _ROWS - 1) // _ROWS)
    return pitch if ((p_size - 1) * pitch + q_size + _ROWS - 1) // _ROWS < row_by_row else 0


@helper()
def _pad(x, seen, height, columns, pixel, padding):
    """The rows of an image that windows see, in the midst of zeros; channels that x has not stay zero, too."""
    h_size, w_size, c = x.shape
    skipped, count = max(0, -padding[1]), min(columns, padding[1] + w_size) - max(0, padding[1])
    for i in range(max(0, padding[0]), min(height, padding[0] + h_size)):
        source = x.ctypes.data + (i - padding[0]) * x.strides[0] + skipped * x.strides[1]
        target = seen + (i * columns + max(0, padding[1])) * pixel
        fetch(source + 4 * x.strides[0], count * x.strides[1])
        if x.strides[1] == pixel:
            move(source, target, count * pixel)
        else:
            for j in range(count):
                move(source + j * x.strides[1], target + j * pixel, c * x.itemsize)


@helper()
def _sum_image(
    state, sums, a, step, row, outer, pitch, whole, panels, first, last,
    out, out_row, out_pixel, p_size, q_size, bias, skip, skip_row, skip_pixel, add, floor, dtype,
):  # fmt: skip
    """Some panels of an image's output: for two tiles of pixels after the other. Nothing here can raise.

    whole: a run's last tile ends with it (and computes some pixels again), as nothing may be read after it.
    """
    _, r_size, taps, depth, width = panels.shape
    runs, length = (1, (p_size - 1) * pitch + q_size) if pitch else (p_size, q_size)
    tiles = (length + _ROWS - 1) // _ROWS
    pairs, c_row = taps * depth, width * 4
    for t in range(0, runs * tiles, 2):
        run, m = divmod(t, tiles)
        run_too, m_too = divmod(min(t + 1, runs * tiles - 1), tiles)
        m, m_too = m * _ROWS, m_too * _ROWS
        if whole:
            m, m_too = min(m, length - _ROWS), min(m_too, length - _ROWS)
        (p, q), (p_too, q_too) = (divmod(m, pitch), divmod(m_too, pitch)) if pitch else ((run, m), (run_too, m_too))
        for j in range(first, last):
            multiply(
                state, a + run * row + m * step, a + run_too * row + m_too * step, step, outer,
                panels[j].ctypes.data, c_row, pairs, r_size, sums.ctypes.data, sums.ctypes.data + _ROWS * c_row, c_row,
                False, width > _ROWS,
            )  # fmt: skip
            column = j * width
            shift = bias.ctypes.data + column * 4 if bias.size > 0 else 0
            _finish(
                sums.ctypes.data, width, p, q, pitch, p_size, q_size, shift, out + column * 2, out_row, out_pixel,
                skip + column * 2, skip_row, skip_pixel, add, floor, bias.dtype, dtype,
            )  # fmt: skip
            _finish(
                sums.ctypes.data + _ROWS * c_row, width, p_too, q_too, pitch, p_size, q_size, shift, out + column * 2,
                out_row, out_pixel, skip + column * 2, skip_row, skip_pixel, add, floor, bias.dtype, dtype,
            )  # fmt: skip


@helper()
def _finish(
    sums, width, p, q, pitch, p_size, q_size, bias, out, out_row, out_pixel, skip, skip_row, skip_pixel, add, floor,
    dtype, out_dtype,
):  # fmt: skip
    """y = max(sums + bias + z, floor), rounded, for the pixels of a tile that are some of the output's."""
    least = splat(floor, _LANES, dtype)
    for i in range(_ROWS):
        if q < q_size and p < p_size:
            target, more = out + p * out_row + q * out_pixel, skip + p * skip_row + q * skip_pixel
            for l in range(0, width, _LANES):
                v = load(sums + (i * width + l) * 4, _LANES, dtype)
                if bias:
                    v = v + load(bias + l * 4, _LANES, dtype)
                    if add:
                        v = v + load(more + l * 2, _LANES, out_dtype)
                    v = where(v <= least, least, v)  # a NaN stays
                store_as(target + l * 2, v, out_dtype)
        q += 1
        if q == pitch:
            p, q = p + 1, 0
