"""Elementwise kernels of a residual block: ReLU forward and backward, and the addition of the skip."""

from . import cuda_kernels, numba_kernels, numpy_kernels, problem

__all__ = ["cuda_kernels", "numba_kernels", "numpy_kernels", "problem"]
