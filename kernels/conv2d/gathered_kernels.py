"""Convolution on the CPU with dilated columns: what each tile of pixels sees is copied, tap by tap, beside it.

See gathered.py. Where the direct kernels (direct_kernels.py), which copy less, can go they are as fast or up to a tenth
faster, from 64 to 512 channels, at strides 1 and 2; they need the taps of a filter's row to be one run of memory.
"""

from __future__ import annotations

import numpy as np

from ..cpu.microkernel import lanes
from ..memory import empty_nhwc, to_nhwc
from ..registry import kernel
from .dgrad_add import dgrad_add_kernel
from .epilogue import epilogue
from .gathered import multiply_gathered
from .genstats import and_statistics, genstats_kernel
from .numba_kernels import residues
from .packing import of_residue, pack
from .problem import CONV2D_BIAS_ACT, CONV2D_DGRAD, CONV2D_FPROP, out_hw


def _fprop_supports(x, w, *, stride, padding, dilation, groups):
    n = lanes(x.dtype)
    return groups == 1 and w.shape[0] % n == 0 and w.shape[1] % n == 0 and x.size > 0


def _dgrad_supports(dy, w, *, stride, padding, dilation, groups, input_hw):
    return _fprop_supports(dy, w, stride=stride, padding=padding, dilation=dilation, groups=groups)


def _bias_act_supports(x, w, b, z, *, relu, **params):
    return _fprop_supports(x, w, **params)


def _rank(*_, **params):
    return 3.5  # after the direct kernels


@kernel(
    CONV2D_FPROP, device="cpu", step=4, supports=_fprop_supports, rank=_rank, note="what a tile sees is copied first"
)
def fprop_gathered_tile(x, w, *, stride, padding, dilation, groups):
    return _convolve(x, w, stride, padding, dilation)


@genstats_kernel(fprop_gathered_tile)
def fprop_gathered_tile_genstats(x, w, *, stride, padding, dilation, groups):
    return _convolve(x, w, stride, padding, dilation, statistics=True)


@kernel(
    CONV2D_BIAS_ACT,
    device="cpu",
    step=4,
    supports=_bias_act_supports,
    rank=_rank,
    note="fprop_gathered_tile with an epilogue",
)
def bias_act_gathered_tile(x, w, b, z, *, stride, padding, dilation, groups, relu):
    return _convolve(x, w, stride, padding, dilation, b, z, relu)


def _convolve(x, w, stride, padding, dilation, *follows, statistics=False):
    x, taps = to_nhwc(x), w.shape[2:]
    y, memory = empty_nhwc(x.shape[0], w.shape[0], *out_hw(x.shape[1:3], taps, stride, padding, dilation), x.dtype)
    rows, cols = (np.arange(n) * d - p for n, d, p in zip(taps, dilation, padding, strict=True))
    after = epilogue(memory, *follows)
    return and_statistics(y, multiply_gathered(x, pack(w, False), memory, rows, cols, stride, *after, statistics))


@kernel(CONV2D_DGRAD, device="cpu", step=4, supports=_dgrad_supports, rank=_rank, note="stride² such products over dy")
def dgrad_gathered_tile(dy, w, *, stride, padding, dilation, groups, input_hw):
    return _dgrad(dy, w, stride, padding, dilation, input_hw)


@dgrad_add_kernel(dgrad_gathered_tile)
def dgrad_add_gathered_tile(dy, w, z, *, stride, padding, dilation, groups, input_hw):
    return _dgrad(dy, w, stride, padding, dilation, input_hw, z)


def _dgrad(dy, w, stride, padding, dilation, input_hw, z=None):
    dy, (_, c, r, s) = to_nhwc(dy), w.shape
    dx, memory = empty_nhwc(dy.shape[0], c, *input_hw, dy.dtype)
    panels = pack(w, True)
    for part, (r_taps, rows), (s_taps, cols) in residues(memory, (r, s), stride, padding, dilation):
        multiply_gathered(dy, of_residue(panels, r_taps, s_taps), part, rows, cols, (1, 1), *epilogue(part, None, z))
    return dx
