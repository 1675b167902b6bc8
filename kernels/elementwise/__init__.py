"""Elementwise kernels of a residual block: ReLU forward and backward, and the addition of the skip."""

from . import bfloat16_kernels, cuda_kernels, numba_kernels, numpy_kernels, problem

__all__ = ["bfloat16_kernels", "cuda_kernels", "numba_kernels", "numpy_kernels", "problem"]
