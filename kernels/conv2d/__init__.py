"""Two-dimensional convolution: fprop, dgrad and wgrad (cuDNN's names for forward, data gradient, weight gradient)."""

from . import (
    bias_act_kernels,
    direct_kernels,
    numba_kernels,
    numpy_kernels,
    problem,
    winograd,
    winograd_kernels,
    winograd_wgrad,
)

__all__ = [
    "bias_act_kernels",
    "direct_kernels",
    "numba_kernels",
    "numpy_kernels",
    "problem",
    "winograd",
    "winograd_kernels",
    "winograd_wgrad",
]
