"""One step of stochastic gradient descent, in place."""

from . import cuda_kernels, numba_kernels, numpy_kernels, problem

__all__ = ["cuda_kernels", "numba_kernels", "numpy_kernels", "problem"]
