"""Which elements dropout keeps."""

from . import cuda_kernels, numpy_kernels, problem

__all__ = ["cuda_kernels", "numpy_kernels", "problem"]
