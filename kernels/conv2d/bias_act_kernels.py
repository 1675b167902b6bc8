"""Convolution for inference on the CPU: each tile gets bias, skip and ReLU when it is written (epilogue.py)."""

from __future__ import annotations

import numpy as np

from ..cpu.bfloat16 import computed
from ..cpu.jit import helper
from ..cpu.microkernel import lanes
from ..cpu.parallel import parallel
from ..memory import to_nhwc
from ..registry import kernel
from .direct_kernels import convolve_direct, fprop_supports
from .numba_kernels import fprop_im2col_tile
from .pointwise_kernels import convolve_pointwise
from .pointwise_kernels import fprop_supports as pointwise_supports
from .problem import CONV2D_BIAS_ACT, out_hw
from .winograd import F2, F4, supports
from .winograd_kernels import convolve_winograd, fprop_rank, winograd_kernel


def _direct_supports(x, w, b, z, *, relu, **params):
    return fprop_supports(x, w, **params)


def winograd_scale(form):
    """What errors are relative to where the convolution is Winograd's."""

    def scale(x, w, b, z, *, relu, **params):
        y = form.fprop_scale(x, w, **params) + np.abs(b)[:, None, None]
        return y if z is None else y + np.abs(z)

    return scale


def _winograd_supports(x, w, b, z, *, stride, dilation, groups, **_):
    """bfloat16 in whole vectors alone: `_finished` is for float32 and float64."""
    whole = w.shape[0] % lanes(computed(x.dtype)) == 0 or x.dtype == computed(x.dtype)
    return whole and supports(w.shape[2:], stride, dilation, groups)


def _pointwise_supports(x, w, b, z, *, relu, **params):
    return pointwise_supports(x, w, **params)


@kernel(CONV2D_BIAS_ACT, device="cpu", step=3, note="fprop_im2col_tile, then one pass in place")
def bias_act_im2col_tile(x, w, b, z, *, stride, padding, dilation, groups, relu):
    y = fprop_im2col_tile(x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return _finished(y, b, z, relu)


@kernel(CONV2D_BIAS_ACT, device="cpu", step=4, supports=_direct_supports, note="fprop_direct_tile with an epilogue")
def bias_act_direct_tile(x, w, b, z, *, stride, padding, dilation, groups, relu):
    return convolve_direct(x, w, stride, padding, dilation, b, z, relu)


@kernel(CONV2D_BIAS_ACT, device="cpu", step=5, supports=_pointwise_supports, note="fprop_pointwise with an epilogue")
def bias_act_pointwise(x, w, b, z, *, stride, padding, dilation, groups, relu):
    return convolve_pointwise(x, w, stride, b, z, relu)


@winograd_kernel(
    CONV2D_BIAS_ACT,
    supports=_winograd_supports,
    rank=fprop_rank(F4),
    error_scale=winograd_scale(F4),
    note="fprop_winograd with an epilogue",
)
def bias_act_winograd(x, w, b, z, *, stride, padding, dilation, groups, relu):
    return _winograd(F4, x, w, b, z, out_hw(x.shape[2:], w.shape[2:], stride, padding, dilation), padding, relu)


@winograd_kernel(
    CONV2D_BIAS_ACT,
    supports=_winograd_supports,
    rank=fprop_rank(F2),
    error_scale=winograd_scale(F2),
    note="fprop_winograd_2x2 with an epilogue",
)
def bias_act_winograd_2x2(x, w, b, z, *, stride, padding, dilation, groups, relu):
    return _winograd(F2, x, w, b, z, out_hw(x.shape[2:], w.shape[2:], stride, padding, dilation), padding, relu)


def _winograd(form, x, w, b, z, hw, padding, relu):
    if w.shape[0] % lanes(computed(x.dtype)) == 0:
        return convolve_winograd(form, x, w, False, padding, hw, b, z, relu)
    return _finished(convolve_winograd(form, x, w, False, padding, hw), b, z, relu)


def _finished(y, b, z, relu):
    """act(y + b (+ z)), over y where it lies channels-last."""
    memory = to_nhwc(y)
    _finish(
        memory.shape[0] * memory.shape[1], memory, b.copy(), memory if z is None else to_nhwc(z), z is not None, relu
    )
    return memory.transpose(0, 3, 1, 2)


@parallel()
def _finish(row, y, b, z, has_z, relu):
    n, p = divmod(row, y.shape[1])
    _finish_row(y[n, p], b, z[n, p], has_z, relu)


@helper()
def _finish_row(y, b, z, has_z, relu):
    for q in range(y.shape[0]):
        for k in range(y.shape[1]):
            v = y[q, k] + b[k]
            if has_z:
                v += z[q, k]
            y[q, k] = y.dtype.type(0) if relu and v <= 0 else v
