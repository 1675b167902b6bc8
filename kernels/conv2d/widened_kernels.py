"""Convolution of 16-bit numbers by the float32 kernels: the exact ones, and Winograd where that is the best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..cpu.features import has_bfloat16_products
from ..registry import Problem
from ..widened import widened
from .bias_act_kernels import winograd_scale
from .problem import CONV2D_BIAS_ACT, CONV2D_DGRAD, CONV2D_FPROP, CONV2D_WGRAD
from .winograd import F4

# Winograd rounds in float32: 4 of its eps, of which one of float16 is 2^13 (bfloat16's is larger still). One more eps
# of the direct scale for the last rounding to 16 bits. F(4x4) stands for both forms: as a rule it loses more.
_SHARE = 4 * 2.0**-13
# Winograd in float32, with a quarter of the products, is where nothing multiplies pairs of bfloat16 by one instruction.
_RANK = 2.5 if has_bfloat16_products() else 5.0


def _scale(problem: Problem, of_winograd: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arrays, **params: problem.error_scale(*arrays, **params) + _SHARE * of_winograd(*arrays, **params)


def _rank(*arrays, **params):
    return _RANK


for _problem, _of_winograd in (
    (CONV2D_FPROP, F4.fprop_scale),
    (CONV2D_DGRAD, F4.dgrad_scale),
    (CONV2D_WGRAD, F4.wgrad_scale),
    (CONV2D_BIAS_ACT, winograd_scale(F4)),
):
    widened(_problem)
    widened(_problem, step=3, rank=_rank, exact=False, error_scale=_scale(_problem, _of_winograd))
