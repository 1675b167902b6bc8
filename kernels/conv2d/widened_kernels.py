"""Convolution of 16-bit numbers by the float32 kernels: the exact ones, and Winograd where that is the best.

(Or, on a host with AMX, float32 in three parts, which is no exact kernel either, but loses no more than a direct one.)
"""

from __future__ import annotations

from ..widened import widened
from .bias_act_kernels import winograd_scale
from .problem import CONV2D_BIAS_ACT, CONV2D_DGRAD, CONV2D_FPROP, CONV2D_WGRAD
from .winograd import F4, supports
from .winograd_kernels import scale_of_halves


def _scale(problem, of_winograd):
    """Winograd's scale where it can be meant, else the direct one."""
    winograd = scale_of_halves(problem, of_winograd)

    def scale(*arrays, stride, dilation, groups, **params):
        taps = params.get("kernel_hw") or arrays[1].shape[2:]
        window = dict(stride=stride, dilation=dilation, groups=groups)
        return (winograd if supports(taps, **window) else problem.error_scale)(*arrays, **window, **params)

    return scale


for _problem, _of_winograd in (
    (CONV2D_FPROP, F4.fprop_scale),
    (CONV2D_DGRAD, F4.dgrad_scale),
    (CONV2D_WGRAD, F4.wgrad_scale),
    (CONV2D_BIAS_ACT, winograd_scale(F4)),
):
    widened(_problem)
    # F(4x4) stands for both forms: as a rule it loses more.
    widened(_problem, step=3, exact=False, error_scale=_scale(_problem, _of_winograd))
