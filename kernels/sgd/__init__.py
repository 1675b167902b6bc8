"""One step of stochastic gradient descent, in place."""

from . import numba_kernels, numpy_kernels, problem

__all__ = ["numba_kernels", "numpy_kernels", "problem"]
