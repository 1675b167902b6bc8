"""Convolution of 16-bit numbers by the float32 kernels: the exact ones, and Winograd where that is the best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..registry import Problem
from ..widened import widened
from . import winograd
from .bias_act_kernels import winograd_scale
from .problem import CONV2D_BIAS_ACT, CONV2D_DGRAD, CONV2D_FPROP, CONV2D_WGRAD

# Winograd rounds in float32: 4 of its eps, of which one of float16 is 2^13 (bfloat16's is larger still). One more eps
# of the direct scale for the last rounding to 16 bits.
_SHARE = 4 * 2.0**-13


_CHANNELS = 64  # from which Winograd's products, a quarter as many, are faster than bfloat16's by pairs


def _rank(a, b, *_, **__):
    """Of Winograd: a and b have each of C and K as one of their sizes."""
    return 5.0 if min(a.shape[1], b.shape[1], b.shape[0] if b.ndim == 4 else 0) >= _CHANNELS else 2.5


def _scale(problem: Problem, of_winograd: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arrays, **params: problem.error_scale(*arrays, **params) + _SHARE * of_winograd(*arrays, **params)


for _problem, _of_winograd in (
    (CONV2D_FPROP, winograd.fprop_scale),
    (CONV2D_DGRAD, winograd.dgrad_scale),
    (CONV2D_WGRAD, winograd.wgrad_scale),
    (CONV2D_BIAS_ACT, winograd_scale),
):
    widened(_problem)
    widened(_problem, step=3, exact=False, error_scale=_scale(_problem, _of_winograd))
