"""Gradients divided by the scale of the loss, and whether all of them are finite."""

from . import cuda_kernels, numba_kernels, numpy_kernels, problem

__all__ = ["cuda_kernels", "numba_kernels", "numpy_kernels", "problem"]
