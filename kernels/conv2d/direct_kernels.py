"""Convolution on the CPU without patches: register tiles read the padded rows of the image themselves.

In channels-last memory the S taps of a filter's row, with their C channels, are one run of memory, and the run of the
next output pixel begins v*C numbers later. So a tile of neighbouring output pixels is a matrix whose rows overlap:

    fprop   y[q, k] = sum over r, (s c) of row_r[q*v*C + (s c)] * w[r, (s c), k]
    dgrad   fprop over dy, the filter turned round and transposed; at stride u, pixels of each residue modulo u share
            their taps and are a convolution of their own
    wgrad   dw[r, (s c), k] = sum over p, q of row_(p+r)[q*v*C + (s c)] * dy[p, q, k]

Images are copied, strip by strip, into a padded buffer that stays in the cache (strips.py); the patches of im2col are
R*S copies.
Needs: columns not dilated, groups=1, and (for whole vectors) a multiple of the vector width of output channels.
"""

from __future__ import annotations

import numpy as np

from ..cpu.features import simd
from ..cpu.jit import helper
from ..cpu.microkernel import lanes, multiply_tile_2d
from ..cpu.parallel import parallel
from ..memory import empty_nhwc, to_nhwc, zeros
from ..registry import kernel
from .dgrad_add import dgrad_add_kernel
from .epilogue import epilogue
from .genstats import and_statistics, genstats_kernel, new_sums
from .numba_kernels import residues, taps_of_residue
from .packing import of_residue, pack, panel_width, unpacked
from .problem import CONV2D_DGRAD, CONV2D_FPROP, CONV2D_WGRAD, out_hw
from .strips import multiply_strips

# Rows of a tile. Eight rows at any stride leave registers for their addresses (sixteen ran at 0.6 of the speed);
# rows of a transposed tile lie side by side and need no addresses of their own.
_ROWS, _TRANSPOSED_ROWS = 8, 16
_MOST_ROWS = 16
_VECTOR_BYTES = simd().vector_bytes
_PARTIALS = 1 << 24  # numbers that the partial sums of wgrad may take


def fprop_supports(x, w, *, stride, padding, dilation, groups):
    return groups == 1 and dilation[1] == 1 and w.shape[0] % lanes(x.dtype) == 0


def _dgrad_supports(dy, w, *, stride, padding, dilation, groups, input_hw):
    whole = w.shape[1] % lanes(dy.dtype) == 0
    return groups == 1 and whole and residues_are_convolutions(w, stride, padding, dilation)


def residues_are_convolutions(w, stride, padding, dilation):
    """Whether dgrad is convolutions over dy, padded, of neighbouring columns."""
    # What comes before dy can be padded, what is not read of it cannot: no residue may begin after dy's first pixel.
    begins = [
        offsets[:1]
        for axis in (0, 1)
        for a in range(stride[axis])
        for _, offsets in [taps_of_residue(a, w.shape[2 + axis], stride[axis], padding[axis], dilation[axis])]
    ]
    side_by_side = dilation == (1, 1) or (stride == (1, 1) and dilation[1] == 1)
    return side_by_side and np.all(np.concatenate(begins) <= 0)


def _wgrad_supports(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    return groups == 1 and dilation[1] == 1 and dy.shape[1] % lanes(x.dtype) == 0


@kernel(CONV2D_FPROP, device="cpu", step=4, supports=fprop_supports, note="no patches: tiles read the padded rows")
def fprop_direct_tile(x, w, *, stride, padding, dilation, groups):
    return convolve_direct(x, w, stride, padding, dilation)


@genstats_kernel(fprop_direct_tile)
def fprop_direct_tile_genstats(x, w, *, stride, padding, dilation, groups):
    return convolve_direct(x, w, stride, padding, dilation, statistics=True)


def convolve_direct(x, w, stride, padding, dilation, *follows, statistics=False):
    """fprop, and after it what `follows`: b, z and relu of `epilogue`; with statistics y, mean and var."""
    x, sums = to_nhwc(x), new_sums(x.shape[0], w.shape[0], statistics)
    y, memory = empty_nhwc(
        x.shape[0], w.shape[0], *out_hw(x.shape[1:3], w.shape[2:], stride, padding, dilation), x.dtype
    )
    panels, after = _runs(pack(w, False)), epilogue(memory, *follows)
    multiply_strips(x, panels, memory, w.shape[3], stride, padding, dilation[0], *after, sums)
    return and_statistics(y, sums)


@kernel(CONV2D_DGRAD, device="cpu", step=4, supports=_dgrad_supports, note="no patches: stride² convolutions over dy")
def dgrad_direct_tile(dy, w, *, stride, padding, dilation, groups, input_hw):
    return _dgrad(dy, w, stride, padding, dilation, input_hw)


@dgrad_add_kernel(dgrad_direct_tile)
def dgrad_add_direct_tile(dy, w, z, *, stride, padding, dilation, groups, input_hw):
    return _dgrad(dy, w, stride, padding, dilation, input_hw, z)


def _dgrad(dy, w, stride, padding, dilation, input_hw, z=None):
    dy, (_, c, r, s) = to_nhwc(dy), w.shape
    dx, memory = empty_nhwc(dy.shape[0], c, *input_hw, dy.dtype)
    panels = pack(w, True)
    for part, (r_taps, rows), (s_taps, cols) in residues(memory, (r, s), stride, padding, dilation):
        chosen = _runs(of_residue(panels, r_taps, s_taps))
        before = (-rows[0], -cols[0])
        multiply_strips(dy, chosen, part, len(s_taps), (1, 1), before, dilation[0], *epilogue(part, None, z))
    return dx


@kernel(
    CONV2D_WGRAD,
    device="cpu",
    step=4,
    supports=_wgrad_supports,
    note="no patches: transposed tiles read the padded rows",
)
def wgrad_direct_tile(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    x, dy, (r, s) = to_nhwc(x), to_nhwc(dy), kernel_hw
    (n, _, _, k), c = dy.shape, x.shape[3]
    rows = _ROWS if panel_width(k, x.dtype) > lanes(x.dtype) else _TRANSPOSED_ROWS
    taps = -(-s * c // rows) * rows  # whole tiles; the rest is scratch
    # The sum over images is split by shape alone, never by threads: the same bits on any machine size.
    splits = max(1, min(n, 16, _PARTIALS // (r * taps * k)))
    partial = zeros((splits, r, taps, k), x.dtype)
    _wgrad(len(partial), x, dy, partial, s, stride, padding, dilation[0])
    return unpacked(partial.reshape(splits, -1), (panel_width(k, x.dtype), k, taps * k, c * k), (k, c, r, s), x.dtype)


def _runs(panels):
    """(panels, R, S, C, width) -> (panels, R, S*C, width): a filter's row is one run."""
    return panels.reshape(*panels.shape[:2], -1, panels.shape[-1])


@helper()
def _padded(x, height, q_size, taps, stride, padding):
    """The rows that the windows see, zeros around, and columns enough for tiles that hang over at the end."""
    h_size, _, c = x.shape
    columns = ((q_size + _MOST_ROWS - 1) // _MOST_ROWS * _MOST_ROWS - 1) * stride + taps + (_MOST_ROWS + c - 1) // c
    rows = np.empty((height, columns, c), x.dtype)
    for i in range(height):
        h = i - padding[0]
        if 0 <= h < h_size:
            row, line, first = rows[i].reshape(-1), x[h].reshape(-1), padding[1] * c
            size = min(row.size - first, line.size)
            row[:first] = 0
            for l in range(size):  # an assignment of slices brings the compiler all that Numba has for its errors
                row[first + l] = line[l]
            row[first + size :] = 0
        else:
            rows[i] = 0
    return rows


@parallel()
def _wgrad(t, x, dy, partial, taps, stride, padding, dilation):
    n, splits = x.shape[0], partial.shape[0]
    first, last = n * t // splits, n * (t + 1) // splits
    for i in range(first, last):
        _wgrad_image(x[i], dy[i], partial[t], taps, stride, padding, dilation)


@helper()
def _wgrad_image(x, dy, dw, taps, stride, padding, dilation):
    c, (p_size, q_size, k), (r_size, run, _) = x.shape[2], dy.shape, dw.shape
    rows = _padded(x, (p_size - 1) * stride[0] + (r_size - 1) * dilation + 1, q_size, taps, stride[1], padding)
    step, line, vector = stride[1] * c, rows.shape[1] * c, _VECTOR_BYTES // x.itemsize
    wide = k % (2 * vector) == 0
    tile_rows, width = (_ROWS, 2 * vector) if wide else (_TRANSPOSED_ROWS, vector)
    for r in range(r_size):
        for i in range(0, run, tile_rows):
            a = rows.ctypes.data + (r * dilation * line + i) * x.itemsize
            for j in range(0, k, width):
                b, out = dy.ctypes.data + j * x.itemsize, dw.ctypes.data + ((r * run + i) * k + j) * x.itemsize
                if wide:
                    multiply_tile_2d(
                        a, 1, step, stride[0] * line, b, k, q_size * k,
                        out, k, q_size, p_size, True, _ROWS, 2, x.dtype,
                    )  # fmt: skip
                else:
                    multiply_tile_2d(
                        a, 1, step, stride[0] * line, b, k, q_size * k,
                        out, k, q_size, p_size, True, _TRANSPOSED_ROWS, 1, x.dtype,
                    )  # fmt: skip
