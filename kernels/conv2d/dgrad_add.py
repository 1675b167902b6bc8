"""The data gradient of a convolution, added to the gradient that its input has from elsewhere: at a skip connection.

    dx = dgrad(dy, w) + z

z lies like dx, and is not written into. The sum is formed before dx leaves the registers or the cache, where a pass of
its own reads both and writes one. cuDNN: cudnnConvolutionBackwardData with beta = 1.
"""

from __future__ import annotations

import functools

import numpy as np

from ..cpu.microkernel import lanes
from ..registry import Problem, kernel
from .beside import register_beside
from .problem import CONV2D_DGRAD, dgrad_reference

_LANES = lanes(np.float32)


def dgrad_add_reference(dy, w, z, *, stride, padding, dilation, groups, input_hw):
    """dx: every window gets back its share of dy; and z."""
    params = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, input_hw=input_hw)
    return dgrad_reference(dy, w, **params) + z


def _inputs(case, rng):
    arrays, params = CONV2D_DGRAD.inputs(case, rng)
    z = rng.standard_normal((case.params["n"], case.params["c"], *case.params["hw"]))
    return arrays | dict(z=z), params


def _flops(dy, w, z, **params):
    return CONV2D_DGRAD.flops(dy, w, **params) + int(np.prod(z.shape))


def _bytes_moved(dy, w, z, **params):
    return CONV2D_DGRAD.bytes_moved(dy, w, **params) + z.dtype.itemsize * int(np.prod(z.shape))


@functools.cache
def _scale(of_dx, finer=1.0):
    return lambda dy, w, z, **params: of_dx(dy, w, **params) + np.abs(z)


CONV2D_DGRAD_ADD = Problem(
    "conv2d_dgrad_add",
    dgrad_add_reference,
    _inputs,
    CONV2D_DGRAD.cases,
    _flops,
    _bytes_moved,
    _scale(CONV2D_DGRAD.error_scale),
)
kernel(CONV2D_DGRAD_ADD, device="cpu", step=0, note="the definition, window by window", dtypes=("any",))(
    dgrad_add_reference
)


def dgrad_add_kernel(dgrad):
    """Register the decorated function beside a kernel of dgrad."""

    def register(fn):
        note = "which adds what there is already"
        register_beside(CONV2D_DGRAD_ADD, dgrad, fn, supports=_supports, scale=_scale, note=note)
        return fn

    return register


def _supports(dy, w, z, *, stride, **_):
    """Without a stride, which takes dx apart; whole vectors of channels. Of 1x1 a pass of its own is as fast or faster:
    few products hide that z comes from memory, which such a pass reads as it likes best. (AMX, float32, from 256 to
    1024 channels at 14x14: 3.1 ms, apart 2.2 and 0.4; at 56x56 and 28x28 alike.)"""
    several = w.shape[2:] != (1, 1)
    return several and dy.size > 0 and stride == (1, 1) and z.dtype == dy.dtype and w.shape[1] % _LANES == 0
