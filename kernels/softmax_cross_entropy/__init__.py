"""Softmax and cross-entropy in one: log-sum-exp, the loss of each row, and the gradient."""

from . import cuda_kernels, numba_kernels, numpy_kernels, problem

__all__ = ["cuda_kernels", "numba_kernels", "numpy_kernels", "problem"]
