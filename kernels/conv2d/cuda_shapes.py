"""What the CUDA convolutions' launchers share: the struct that kernels get, layouts of weights, slices of long sums."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cuda.launch import blocks
from ..memory import empty, empty_nhwc, namespace
from .problem import out_hw

CONV = np.dtype([(name, np.int32) for name in "N H W C K P Q R S u v a b l m Cg Kg".split()])  # struct Conv of conv.cuh
_BLOCKS_WANTED = 1024  # enough to keep the largest GPU busy to the end
_LEAST_PIXELS = 64  # of a slice


@dataclass(frozen=True)
class Shapes:
    """One call: the struct, its fields by name (upper and lower case apart), the result as NCHW and as its memory."""

    z: np.ndarray
    result: Any
    memory: Any

    def __getitem__(self, letter: str) -> int:
        return int(self.z[letter])

    def grouped(self) -> bool:
        return self["Cg"] != self["C"]

    def size(self, letters: str) -> int:
        """The product of the sizes that the letters stand for: size("NPQ") pixels of y."""
        return math.prod(self[letter] for letter in letters)


def fprop_shapes(x, w, stride, padding, dilation, groups) -> Shapes:
    (n, c, *hw), (k, _, *rs) = x.shape, w.shape
    pq = out_hw(hw, rs, stride, padding, dilation)
    z = _struct(n, hw, c, k, pq, rs, stride, padding, dilation, groups)
    return Shapes(z, *empty_nhwc(n, k, *pq, x.dtype, x))


def dgrad_shapes(dy, w, stride, padding, dilation, groups, input_hw) -> Shapes:
    (n, k, *pq), (_, cg, *rs) = dy.shape, w.shape
    z = _struct(n, input_hw, cg * groups, k, pq, rs, stride, padding, dilation, groups)
    return Shapes(z, *empty_nhwc(n, cg * groups, *input_hw, dy.dtype, dy))


def wgrad_shapes(x, dy, stride, padding, dilation, groups, kernel_hw) -> Shapes:
    (n, c, *hw), (_, k, *pq) = x.shape, dy.shape
    dw = empty((k, c // groups, *kernel_hw), x.dtype, x)
    return Shapes(_struct(n, hw, c, k, pq, kernel_hw, stride, padding, dilation, groups), dw, dw)


def _struct(n, hw, c, k, pq, rs, stride, padding, dilation, groups):
    return np.array((n, *hw, c, k, *pq, *rs, *stride, *padding, *dilation, c // groups, k // groups), CONV)


def dense(a: Any) -> Any:
    """C-contiguous: itself, or a copy."""
    return namespace(a).ascontiguousarray(a)


def slices_of(pixels: int, tiles: int, step: int) -> tuple[int, int]:
    """(slices, pixels of each, a multiple of `step`) of a sum that `tiles` blocks form.

    By shape alone, so that the order of additions is the same on every GPU."""
    most = max(1, pixels // _LEAST_PIXELS)
    each = max(1, blocks(blocks(pixels, min(most, max(1, _BLOCKS_WANTED // tiles))), step)) * step
    return max(1, blocks(pixels, each)), each
