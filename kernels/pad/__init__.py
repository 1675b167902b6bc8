"""Padding, between the numbers too."""

from . import numba_kernels, numpy_kernels, problem

__all__ = ["numba_kernels", "numpy_kernels", "problem"]
