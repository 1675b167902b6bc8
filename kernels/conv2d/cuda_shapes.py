"""What every CUDA convolution passes to its kernels."""

from __future__ import annotations

import numpy as np

CONV = np.dtype([(name, np.int32) for name in "N H W C K P Q R S u v a b l m Cg Kg".split()])  # struct Conv of conv.cuh


def conv(n, hw, c, k, pq, rs, stride, padding, dilation, groups):
    """struct Conv of kernels/cuda/include/conv.cuh."""
    return np.array((n, *hw, c, k, *pq, *rs, *stride, *padding, *dilation, c // groups, k // groups), CONV)
