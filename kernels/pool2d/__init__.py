"""Max and average pooling over two-dimensional windows."""

from . import cuda_kernels, numba_kernels, numpy_kernels, problem, vector_kernels

__all__ = ["cuda_kernels", "numba_kernels", "numpy_kernels", "problem", "vector_kernels"]
