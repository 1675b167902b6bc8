"""The fused convolutions of training on the CPU: the definitions, and the ladder's best convolution with array code.

They fuse nothing: what a GPU saves by it, a CPU with its large caches gets from `bn_relu` (minires/ops/fused.py). They
are here so that networks built of fused blocks run everywhere.
"""

from __future__ import annotations

from typing import Any

from ..registry import kernel, kernels
from .fused_problem import (
    CONV2D_NORM_ACT_DGRAD,
    CONV2D_NORM_ACT_FPROP,
    CONV2D_NORM_ACT_WGRAD,
    activated,
    masked_sums,
    norm_act_dgrad_reference,
    norm_act_fprop_reference,
    norm_act_wgrad_reference,
    whole_gradient,
    with_statistics,
)

_DEFINITION = "the definition, window by window"
kernel(CONV2D_NORM_ACT_FPROP, device="cpu", step=0, note=_DEFINITION, dtypes=("any",))(norm_act_fprop_reference)
kernel(CONV2D_NORM_ACT_DGRAD, device="cpu", step=0, note=_DEFINITION, dtypes=("any",))(norm_act_dgrad_reference)
kernel(CONV2D_NORM_ACT_WGRAD, device="cpu", step=0, note=_DEFINITION, dtypes=("any",))(norm_act_wgrad_reference)
_NOTE = "the best convolution, array code around it"


def _best(problem: str, *arrays: Any, **params: Any) -> Any:
    """The convolution by the ladder's best kernel."""
    rivals = [k for k in kernels(problem, "cpu") if k.exact and k.takes(*arrays, **params)]
    return max(rivals, key=lambda k: k.rank_for(*arrays, **params))(*arrays, **params)


@kernel(CONV2D_NORM_ACT_FPROP, device="cpu", step=1, note=_NOTE)
def norm_act_fprop_array(x, scale, shift, w, *, stride, padding, dilation, groups):
    window = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    return with_statistics(_best("conv2d_fprop", activated(x, scale, shift), w, **window))


@kernel(CONV2D_NORM_ACT_DGRAD, device="cpu", step=1, note=_NOTE)
def norm_act_dgrad_array(dy, y, f, w, x, scale, shift, mean, inv_std, *, stride, padding, dilation, groups, input_hw):
    window = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    dv = _best("conv2d_dgrad", whole_gradient(dy, y, f), w, **window, input_hw=input_hw)
    return masked_sums(dv, x, scale, shift, mean, inv_std)


@kernel(CONV2D_NORM_ACT_WGRAD, device="cpu", step=1, note=_NOTE)
def norm_act_wgrad_array(x, scale, shift, dy, y, f, *, stride, padding, dilation, groups, kernel_hw):
    window = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    factors = activated(x, scale, shift), whole_gradient(dy, y, f)
    return _best("conv2d_wgrad", *factors, **window, kernel_hw=kernel_hw)
