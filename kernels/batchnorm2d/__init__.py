"""Two-dimensional batch normalisation: forward in training and evaluation, and backward, with add and ReLU fused in."""

from . import cuda_kernels, numba_kernels, numpy_kernels, problem, vector_kernels

__all__ = ["cuda_kernels", "numba_kernels", "numpy_kernels", "problem", "vector_kernels"]
