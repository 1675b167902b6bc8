"""Winograd convolution on the CPU, forward and data gradient (the arithmetic is in `winograd.py`).

    V[e, t, c]  the patches of x, transformed         e: one of the 36 or 16 places of a patch, t: a tile of outputs
    U[e, c, k]  the filters, transformed
    M[e, t, k] = sum over c of V[e, t, c] * U[e, c, k]        a product of matrices for each e, by the register tile
    y           M transformed back, 4x4 or 2x2 outputs for each tile

Transforms go over channels, in vectors. V, U and M are float32 for bfloat16: a tile is widened as it is read, and
rounded once. A tile that hangs over a border is cut out first, with zeros, or put into place after; what comes a few
tiles later is asked for meanwhile. Two orders, by how many filters there are:

    by tiles    few channels, large images: all of U is made first; each thread takes a block of tiles, and its V and M
                stay in the second-level cache from x to y
    by filters  many channels, small images, where U is larger than any cache: all of V is made first; each thread
                takes a panel of filters, and makes the part of U that it needs next
"""

from __future__ import annotations

import numpy as np

from ..cpu.bfloat16 import bits, computed
from ..cpu.casts import cast
from ..cpu.features import has_bfloat16_products, simd
from ..cpu.jit import helper, njit
from ..cpu.microkernel import lanes, lines_of, multiply_fetching, multiply_tile
from ..cpu.parallel import parallel
from ..cpu.transforms import copy, fetch, transform_2d
from ..kept import kept
from ..memory import contiguous, empty, empty_nhwc, to_nhwc, write, zeros
from ..registry import kernel
from .dgrad_add import dgrad_add_kernel
from .epilogue import epilogue, outputs_then
from .genstats import add_up, and_statistics, genstats_kernel, new_sums
from .packing import aligned, panel_width, read_taps
from .problem import CONV2D_DGRAD, CONV2D_FPROP, out_hw
from .winograd import F2, F4, FORMS, TAPS, supports

INPUT, FILTER, OUTPUT, UPSTREAM, GRADIENT = range(5)
transform = transform_2d({patch: (f.input, f.filter, f.output, f.upstream, f.gradient) for patch, f in FORMS.items()})
_VECTOR_BYTES = simd().vector_bytes
_CACHE_BYTES = 3 << 17  # what V and M of a block of tiles may take of the second-level cache
_BY_FILTERS = 3 << 14  # C * K from which U is made in parts
_CHUNK = 128  # channels of such a part
_LEAST_BESIDE_PAIRS, _MOST_BESIDE_PAIRS = 1 << 10, 1 << 15  # C * K where it is faster than products of pairs
_AHEAD = 8  # tiles between the one that is transformed and the one that is asked for


def winograd_kernel(problem, *, rank, error_scale, note, supports=None):
    """`kernel`, with what Winograd's have in common: each is one of float32 and float64, and one of bfloat16."""
    common = dict(device="cpu", step=5, supports=supports or _supports, rank=rank, exact=False)

    def register(fn):
        kernel(
            problem,
            **common,
            dtypes=("bfloat16",),
            error_scale=scale_of_halves(problem, error_scale),
            note=f"{note}; in float32, rounded once",
            name=f"{fn.__name__}_bfloat16",
        )(fn)
        # The scale is generous: what is seen stays below 1.
        return kernel(problem, **common, error_scale=error_scale, error_factor=4.0, note=note)(fn)

    return register


def scale_of_halves(problem, of_winograd):
    """What the error of 16-bit numbers is relative to. Winograd rounds in float32: 4 of its eps, and float16's eps is
    2^13 of them (bfloat16's is larger still). One more eps of the direct scale for the last rounding to 16 bits."""
    share = 4 * 2.0**-13
    return lambda *arrays, **params: problem.error_scale(*arrays, **params) + share * of_winograd(*arrays, **params)


def _supports(x, w, *_, stride, dilation, groups, **__):
    return supports(w.shape[2:], stride, dilation, groups)


def fprop_rank(form):
    def rank(x, w, *_, stride, padding, dilation, **__):
        hw = out_hw(x.shape[2:], w.shape[2:], stride, padding, dilation)
        return rank_of(form, w.shape[0], w.shape[1], hw, x.dtype)

    return rank


def _dgrad_rank(form):
    return lambda dy, w, *, input_hw, **_: rank_of(form, w.shape[0], w.shape[1], input_hw, dy.dtype)


def rank_of(form, k, c, hw, dtype):
    """5, the step of these kernels, for the form that takes fewer products, or as few with less rounding; a little less
    for the other. Below the direct kernels' 4 where whole vectors are twice what there is (a stem's 3 channels), and,
    beside products of pairs, twice as fast, with few channels or with many, as was measured.
    """
    n, fewest, rank = lanes(computed(dtype)), min(FORMS.values(), key=lambda f: f.products_of(hw)), 5.0
    if -(-k // n) * -(-c // n) * n * n > 2 * k * c:
        rank = 3.2
    elif dtype != computed(dtype) and has_bfloat16_products():
        rank = 5.0 if fewest is F4 and _LEAST_BESIDE_PAIRS <= c * k < _MOST_BESIDE_PAIRS else 3.6
    return rank if form is fewest else rank - 0.1


@winograd_kernel(
    CONV2D_FPROP,
    rank=fprop_rank(F4),
    error_scale=F4.fprop_scale,
    note="Winograd F(4x4, 3x3): a quarter of the products",
)
def fprop_winograd(x, w, *, stride, padding, dilation, groups):
    return convolve_winograd(F4, x, w, False, padding, out_hw(x.shape[2:], w.shape[2:], stride, padding, dilation))


@genstats_kernel(fprop_winograd)
def fprop_winograd_genstats(x, w, *, stride, padding, dilation, groups):
    hw = out_hw(x.shape[2:], w.shape[2:], stride, padding, dilation)
    return convolve_winograd(F4, x, w, False, padding, hw, statistics=True)


@winograd_kernel(
    CONV2D_FPROP,
    rank=fprop_rank(F2),
    error_scale=F2.fprop_scale,
    note="Winograd F(2x2, 3x3), for the smallest images: four ninths of the products",
)
def fprop_winograd_2x2(x, w, *, stride, padding, dilation, groups):
    return convolve_winograd(F2, x, w, False, padding, out_hw(x.shape[2:], w.shape[2:], stride, padding, dilation))


@genstats_kernel(fprop_winograd_2x2)
def fprop_winograd_2x2_genstats(x, w, *, stride, padding, dilation, groups):
    hw = out_hw(x.shape[2:], w.shape[2:], stride, padding, dilation)
    return convolve_winograd(F2, x, w, False, padding, hw, statistics=True)


@winograd_kernel(
    CONV2D_DGRAD,
    rank=_dgrad_rank(F4),
    error_scale=F4.dgrad_scale,
    note="Winograd F(4x4, 3x3) over dy, the filter turned round",
)
def dgrad_winograd(dy, w, *, stride, padding, dilation, groups, input_hw):
    return convolve_winograd(F4, dy, w, True, (TAPS - 1 - padding[0], TAPS - 1 - padding[1]), input_hw)


@dgrad_add_kernel(dgrad_winograd)
def dgrad_add_winograd(dy, w, z, *, stride, padding, dilation, groups, input_hw):
    before = TAPS - 1 - padding[0], TAPS - 1 - padding[1]
    return convolve_winograd(F4, dy, w, True, before, input_hw, None, z)


@winograd_kernel(
    CONV2D_DGRAD,
    rank=_dgrad_rank(F2),
    error_scale=F2.dgrad_scale,
    note="Winograd F(2x2, 3x3) over dy, the filter turned round",
)
def dgrad_winograd_2x2(dy, w, *, stride, padding, dilation, groups, input_hw):
    return convolve_winograd(F2, dy, w, True, (TAPS - 1 - padding[0], TAPS - 1 - padding[1]), input_hw)


@dgrad_add_kernel(dgrad_winograd_2x2)
def dgrad_add_winograd_2x2(dy, w, z, *, stride, padding, dilation, groups, input_hw):
    before = TAPS - 1 - padding[0], TAPS - 1 - padding[1]
    return convolve_winograd(F2, dy, w, True, before, input_hw, None, z)


def convolve_winograd(form, x, w, turned, padding, hw, *follows, statistics=False):
    """By F2 or F4: x (N, C, H, W), w (K, C, 3, 3), or turned: (C, K, 3, 3) -> (N, K, *hw), with statistics also mean
    and var. follows: what `epilogue` takes; where there is any of it, K is a whole number of vectors.

    Negative padding leaves out what is at the border.
    """
    x, dtype, k = with_whole_vectors(to_nhwc(x), 3), computed(x.dtype), w.shape[1 if turned else 0]
    (n, _, _, c), wide = x.shape, k + -k % lanes(dtype)
    y, memory = empty_nhwc(n, wide, *hw, x.dtype)
    x, out = bits(x), bits(memory)
    width, then = panel_width(wide, dtype), epilogue(out, *follows)
    tiles, sides = n * form.tiles_of(hw[0]) * form.tiles_of(hw[1]), form.sides
    if c * wide < _BY_FILTERS:
        block = tiles_of_block(form, c + width, dtype)
        panels, sums = transformed_filters(w, turned, sides), new_sums(-(-tiles // block), k, statistics)
        _by_tiles(-(-tiles // block), x, panels, out, padding, tiles, block, width, *then, sums, sides)
    else:
        v = empty((form.patch**2, plane(tiles, c)), dtype)
        block = max(1, min(tiles, 128))
        _transform_patches(-(-tiles // 8), x, v, out, padding, tiles, sides)
        tasks, sums = wide // width * -(-tiles // block), new_sums(-(-tiles // block), k, statistics)
        _by_filters(tasks, _whole_filters(w), turned, v, out, tiles, block, width, *then, sums, sides)
    return and_statistics(y, sums) if wide == k else contiguous(memory[..., :k]).transpose(0, 3, 1, 2)


@kept
def transformed_filters(w, turned, sides):
    """U (panels, places, plane) of filters, whole vectors of them."""
    w = _whole_filters(w)
    k, c = (w.shape[1], w.shape[0]) if turned else w.shape[:2]
    width = panel_width(k, w.dtype)
    panels = empty((k // width, len(sides) ** 2, plane(c, width)), w.dtype)
    _transform_filters(len(panels), w, turned, panels, width, sides)
    return panels


def _whole_filters(w):
    """Filters as the transforms read them: in what they are computed in, whole vectors both ways, in C order."""
    w = w if w.dtype == computed(w.dtype) else cast(w, computed(w.dtype))
    return contiguous(with_whole_vectors(with_whole_vectors(w, 0), 1))


def with_whole_vectors(a, axis):
    """`a`, with zeros up to a whole number of vectors along an axis."""
    missing = -a.shape[axis] % lanes(computed(a.dtype))
    if not missing:
        return a
    padded = zeros(tuple(n + (missing if i == axis else 0) for i, n in enumerate(a.shape)), a.dtype)
    write(padded[tuple(map(slice, a.shape))], a)
    return padded


def tiles_of_block(form, channels, dtype, most=_CACHE_BYTES):
    """How many tiles, with so many numbers at each of their places, take at most so many bytes."""
    return max(16, min(128, most // (form.patch**2 * channels * dtype.itemsize) // 16 * 16))


@njit()
def plane(rows, columns):
    """Numbers between the planes of a transformed array, one for each place, in whole register tiles.

    A multiple of 4096 bytes would put all places into one set of the first-level cache.
    """
    return (rows + 15) // 16 * 16 * columns + 16


@parallel()
def _transform_filters(j, w, turned, panels, width, sides):
    n = w.shape[0 if turned else 1]
    _filters(w, turned, j * width, width, 0, n, panels[j].ctypes.data, panels.shape[2], sides)


@helper()
def _filters(w, turned, output, width, first, n, u, u_plane, sides):
    """U for `width` filters from `output` on, and their n channels from `first` on."""
    patch = len(sides)
    taps = aligned((n * TAPS * TAPS + _VECTOR_BYTES // w.itemsize) * width, w)
    read_taps(w, turned, output, first, n, width, taps)
    start, step = (TAPS * TAPS - 1, -width) if turned else (0, width)
    for i in range(n):
        transform(
            taps.ctypes.data + (i * TAPS * TAPS + start) * width * w.itemsize, TAPS * step, step,
            u + i * width * w.itemsize, patch * u_plane, u_plane, width, FILTER, sides, w.dtype, w.dtype,
        )  # fmt: skip


@helper()
def patches(x, v, v_plane, padding, p, q, first, count, sides, like):
    """V, in the dtype of `like`, for the tiles from `first` on."""
    c, patch, tile = x.shape[3], len(sides), len(sides) - TAPS + 1
    down, across = (p + tile - 1) // tile, (q + tile - 1) // tile
    border, zeros, fresh = aligned(patch * patch * c, x), np.zeros(c, x.dtype), TAPS - 1  # the rest, a neighbour reads
    for t in range(first, first + count):
        fetch_tile(x, t, down, across, tile, fresh - padding[0], fresh - padding[1], 0, c)
        n, top, left = corner(t, down, across, tile)
        source, row, column = seen(x, n, top - padding[0], left - padding[1], patch, 0, c, zeros, border)
        transform(
            source, row, column, v + (t - first) * c * like.itemsize, patch * v_plane, v_plane,
            c, INPUT, sides, x.dtype, like.dtype,
        )  # fmt: skip


@helper(inline=True)
def corner(t, down, across, tile):
    """The image, and the first row and column, of the t-th tile of outputs."""
    n, at = divmod(t, down * across)
    return n, at // across * tile, at % across * tile


@helper()
def fetch_tile(a, t, down, across, tile, top, left, channel, channels):
    """Ask for some channels of the tile _AHEAD of the t-th, moved by (top, left), of a (N, H, W, C).

    A few pixels of many rows: the processor does not foresee that. 16 channels at 32x32 take two thirds of the time.
    """
    (_, h, w, c), (n, i, j) = a.shape, corner(t + _AHEAD, down, across, tile)
    for row in range(i + top, i + top + tile):
        for column in range(j + left, j + left + tile):
            fetch(a.ctypes.data + (((n * h + row) * w + column) * c + channel) * a.itemsize, channels * a.itemsize)


@helper()
def seen(a, n, top, left, side, channel, channels, zeros, border):
    """Some channels of side x side pixels of image n of a (N, H, W, C): their address, and how many numbers lie between
    rows and between columns. Where they hang over they are cut out into `border`; `zeros`: one for each channel."""
    (_, h, w, c), size = a.shape, a.itemsize
    image = np.int64(a.ctypes.data) + (n * h * w * c + channel) * size  # unsigned, it would be a float to Numba
    if 0 <= top <= h - side and 0 <= left <= w - side:
        return image + (top * w + left) * c * size, w * c, c
    at = np.int64(border.ctypes.data)
    for i in range(top, top + side):
        for j in range(left, left + side):
            source = np.int64(zeros.ctypes.data)
            if 0 <= i < h and 0 <= j < w:
                source = image + (i * w + j) * c * size
            copy(source, at + ((i - top) * side + j - left) * channels * size, channels, a.dtype)
    return at, side * channels, channels


@helper()
def _outputs(m, m_plane, y, channel, width, first, count, bias, z, add, floor, sums, sides):
    """y, from M for the tiles from `first` on and the filters from `channel` on. sums: none, or those of the block."""
    (_, p, q, k), patch, tile, size = y.shape, len(sides), len(sides) - TAPS + 1, y.itemsize
    down, across = (p + tile - 1) // tile, (q + tile - 1) // tile
    border, skipped, zeros = aligned(tile * tile * width, y), aligned(tile * tile * width, y), np.zeros(width, y.dtype)
    for t in range(first, first + count):
        fetch_tile(y, t, down, across, tile, 0, 0, channel, width)
        n, top, left = corner(t, down, across, tile)
        place = np.int64(y.ctypes.data) + (((n * p + top) * q + left) * k + channel) * size
        target, row, column, inside = place, q * k, k, top + tile <= p and left + tile <= q
        if not inside:
            target, row, column = np.int64(border.ctypes.data), tile * width, width
        source, skip = m.ctypes.data + (t - first) * width * m.itemsize, target
        if add:
            fetch_tile(z, t, down, across, tile, 0, 0, channel, width)
            skip, _, _ = seen(z, n, top, left, tile, channel, width, zeros, skipped)
        if bias.size > 0:
            outputs_then(
                source, patch * m_plane, m_plane, target, row, column,
                width, bias.ctypes.data + channel * m.itemsize, skip, add, floor, sides, m.dtype, y.dtype,
            )  # fmt: skip
        else:
            transform(
                source, patch * m_plane, m_plane, target, row, column, width, OUTPUT, sides, m.dtype, y.dtype
            )  # fmt: skip
        if not inside:
            for i in range(min(tile, p - top)):
                for j in range(min(tile, q - left)):
                    copy(target + (i * tile + j) * width * size, place + (i * q + j) * k * size, width, y.dtype)
        if len(sums) > 0:
            rows, columns = min(tile, p - top), min(tile, q - left)
            add_up(place, q * k * size, k * size, rows, columns, sums[0], channel, channel + width, size, y.dtype)


@helper()
def _products(v, v_plane, v_row, u, u_plane, c, width, m, m_plane, count, accumulate, sides, like):
    """M (+)= V U for `count` tiles, c channels and one panel of filters, in whole register tiles.

    What the next tile reads of V is asked for during this one.
    """
    size, run = like.itemsize, lines_of(c * like.itemsize)
    for e in range(len(sides) ** 2):
        a, b, out = v + e * v_plane * size, u + e * u_plane * size, m + e * m_plane * size
        if width * size > _VECTOR_BYTES:
            for t in range(0, count, 8):
                further = a + (t + 8) * v_row * size if t + 8 < count else a + v_plane * size
                multiply_fetching(
                    a + t * v_row * size, v_row, 1, b, width, out + t * width * size, width, c, accumulate,
                    further, run, v_row * size, 8, 2, like.dtype,
                )  # fmt: skip
        else:
            for t in range(0, count, 16):
                multiply_tile(
                    a + t * v_row * size, v_row, 1, b, width,
                    out + t * width * size, width, c, accumulate, 16, 1, like.dtype,
                )  # fmt: skip


@parallel()
def _by_tiles(b, x, panels, y, padding, tiles, block, width, bias, z, add, floor, sums, sides):
    first, sums = b * block, sums[b : b + 1]
    _tile_block(x, panels, y, padding, first, min(block, tiles - first), width, bias, z, add, floor, sums, sides)


@helper()
def _tile_block(x, panels, y, padding, first, count, width, bias, z, add, floor, sums, sides):
    c, places = x.shape[3], len(sides) ** 2
    v_plane, m_plane = plane(count, c), plane(count, width)
    v, m = aligned(places * v_plane, panels), aligned(places * m_plane, panels)
    patches(x, v.ctypes.data, v_plane, padding, y.shape[1], y.shape[2], first, count, sides, v)
    for j in range(panels.shape[0]):
        u = panels[j].ctypes.data
        _products(
            v.ctypes.data, v_plane, c, u, panels.shape[2], c, width, m.ctypes.data, m_plane, count, False, sides, v
        )  # fmt: skip
        _outputs(m, m_plane, y, j * width, width, first, count, bias, z, add, floor, sums, sides)


@parallel()
def _transform_patches(b, x, v, y, padding, tiles, sides):
    first = b * 8
    at = v.ctypes.data + first * x.shape[3] * v.itemsize
    patches(x, at, v.shape[1], padding, y.shape[1], y.shape[2], first, min(8, tiles - first), sides, v)


@parallel()
def _by_filters(task, w, turned, v, y, tiles, block, width, bias, z, add, floor, sums, sides):
    blocks = (tiles + block - 1) // block
    j, b = divmod(task, blocks)
    count, sums = min(block, tiles - b * block), sums[b : b + 1]
    _filter_panel(w, turned, v, y, j * width, width, b * block, count, bias, z, add, floor, sums, sides)


@helper()
def _filter_panel(w, turned, v, y, channel, width, first, count, bias, z, add, floor, sums, sides):
    c, places = w.shape[0 if turned else 1], len(sides) ** 2
    u_plane, m_plane = plane(_CHUNK, width), plane(count, width)
    u, m = aligned(places * u_plane, v), aligned(places * m_plane, v)
    for start in range(0, c, _CHUNK):
        n = min(_CHUNK, c - start)
        _filters(w, turned, channel, width, start, n, u.ctypes.data, u_plane, sides)
        at = v.ctypes.data + (first * c + start) * v.itemsize
        _products(
            at, v.shape[1], c, u.ctypes.data, u_plane, n, width, m.ctypes.data, m_plane, count, start > 0, sides, v
        )  # fmt: skip
    _outputs(m, m_plane, y, channel, width, first, count, bias, z, add, floor, sums, sides)
