"""Batches of small images from a data set of uint8: gathered, normalised, cropped, mirrored, cut out."""

from . import cuda_kernels, numpy_kernels, problem

__all__ = ["cuda_kernels", "numpy_kernels", "problem"]
