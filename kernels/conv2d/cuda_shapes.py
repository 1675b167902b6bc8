"""What the CUDA convolutions' launchers share: the struct that kernels get, layouts of weights, slices of long sums."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cuda.launch import Function, Launch, blocks, launch
from ..memory import empty, empty_nhwc, namespace
from .problem import out_hw

CONV = np.dtype([(name, np.int32) for name in "N H W C K P Q R S u v a b l m Cg Kg".split()])  # struct Conv of conv.cuh
_LEAST_PIXELS = 64  # of a slice
# Estimates for tiles of 128 x 128 on an H200, not measured: blocks at once, two on each of 132 SMs; steps that a
# block's beginning and end take as long as; steps that writing and reading a tile of partial sums takes, by all SMs.
_AT_ONCE, _FILL, _PARTIAL, _MOST_WAVES = 264, 4, 1 / 16, 4
_SHARERS = 8  # threads that share a weight


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


@functools.lru_cache(4096)
def slices_of(pixels: int, tiles: int, step: int) -> tuple[int, int]:
    """(slices, pixels of each, a multiple of `step`) of a sum over pixels that `tiles` blocks form, `step` at a time.

    More slices keep more of the GPU busy, and write and read more partial sums: the least estimated time is taken, in
    steps of one block. By shape alone, so that the order of additions is the same on every GPU.
    """
    steps, most = blocks(pixels, step), max(1, pixels // _LEAST_PIXELS)
    best, least = (1, max(1, steps)), math.inf
    for wanted in range(1, min(most, blocks(_MOST_WAVES * _AT_ONCE, tiles)) + 1):
        each = max(1, blocks(steps, wanted))
        slices = max(1, blocks(steps, each))
        time = blocks(tiles * slices, _AT_ONCE) * (each + _FILL) + tiles * slices * _PARTIAL
        if time < least:
            best, least = (slices, each), time
    return best[0], best[1] * step


def add_slices(function: Function, parts: Any, s: Shapes, slices: int) -> None:
    """Launch what adds wgrad's slices up into the result; several threads share a weight where slices are many."""
    sharers = _SHARERS if slices >= 2 * _SHARERS else 1
    grid = (blocks(s.memory.size, 256 // sharers),)
    launch(Launch(function, grid, (256,), (parts, s.memory, s.z, slices, sharers)))
