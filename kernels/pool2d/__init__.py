"""Max and average pooling over two-dimensional windows."""

from . import numba_kernels, numpy_kernels, problem

__all__ = ["numba_kernels", "numpy_kernels", "problem"]
