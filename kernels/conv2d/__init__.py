"""Two-dimensional convolution: fprop, dgrad and wgrad (cuDNN's names for forward, data gradient, weight gradient)."""

from . import (
    bias_act_kernels,
    cuda_bias_act,
    cuda_kernels,
    cuda_tensor_cores,
    cuda_vectorised,
    direct_kernels,
    numba_kernels,
    numpy_kernels,
    packing,
    pointwise_kernels,
    problem,
    wgrad_kernels,
    widened_kernels,
    winograd,
    winograd_kernels,
    winograd_wgrad,
)

__all__ = [
    "bias_act_kernels",
    "cuda_bias_act",
    "cuda_kernels",
    "cuda_tensor_cores",
    "cuda_vectorised",
    "direct_kernels",
    "numba_kernels",
    "numpy_kernels",
    "packing",
    "pointwise_kernels",
    "problem",
    "wgrad_kernels",
    "widened_kernels",
    "winograd",
    "winograd_kernels",
    "winograd_wgrad",
]
