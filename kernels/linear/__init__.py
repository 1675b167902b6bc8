"""The fully connected layer: fprop, dgrad and wgrad."""

from . import numba_kernels, numpy_kernels, problem, vector_kernels

__all__ = ["numba_kernels", "numpy_kernels", "problem", "vector_kernels"]
