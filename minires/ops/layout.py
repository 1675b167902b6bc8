"""What the ops share about shapes and memory order.

An activation is logically NCHW and lies channels-last. NumPy's elementwise functions keep that order by themselves;
what an op allocates or spreads out itself (the gradient of a sum, of an index, of a pad) is made here, in the memory
order of the input it belongs to, so that the kernel that reads it next need not copy it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from ..device import namespace_of
from ..dispatch import call_noted


class Layout(NamedTuple):
    """Shape and memory order of an array, without the array. order: its axes, from the largest stride to the least."""

    shape: tuple[int, ...]
    order: tuple[int, ...]

    @staticmethod
    def of(x: Any, shape: tuple[int, ...] | None = None) -> Layout:
        """The layout of `x`; with `shape`, that shape in the memory order of `x`."""
        strides = x.strides
        return Layout(x.shape if shape is None else shape, tuple(sorted(range(x.ndim), key=lambda i: -abs(strides[i]))))

    def memory_shape(self) -> tuple[int, ...]:
        """The shape in which the memory is C-contiguous; `view` turns an array of it round."""
        return tuple(self.shape[i] for i in self.order)

    def view(self, memory: Any) -> Any:
        """A C-contiguous array of `memory_shape` as an array of `shape`."""
        return memory.transpose(sorted(range(len(self.order)), key=self.order.__getitem__))

    def full(self, value: Any, dtype: Any, xp: Any) -> Any:
        """A new array of this layout, filled with a number or an array that broadcasts to it."""
        if isinstance(value, (int, float)) and value == 0:
            return self.view(xp.zeros(self.memory_shape(), dtype))
        y = self.view(xp.empty(self.memory_shape(), dtype))
        y[...] = value
        return y


def unbroadcast(dy: Any, shape: tuple[int, ...]) -> Any:
    """The gradient of an input of `shape` that was broadcast to the shape of `dy`: `dy` summed over those axes."""
    if dy.shape == shape:
        return dy
    ahead = dy.ndim - len(shape)
    spread = [i for i, n in enumerate(shape, ahead) if n == 1 and dy.shape[i] != 1]
    return sum_axes(dy, (*range(ahead), *spread), keepdims=True).reshape(shape)


def sum_axes(a: Any, axes: int | Sequence[int], keepdims: bool = False, divisor: float = 1) -> Any:
    """The sum of `a` over `axes`, divided by `divisor`; the dtype of `a`.

    Floats narrower than float64 are added in it: NumPy adds the rows one after the other where it sums over leading
    axes, and a float32 that has reached 2^24 does not change by adding 1 to it.
    """
    axes = axes if isinstance(axes, int) else tuple(axes)
    narrow = a.dtype.kind in "fV" and a.dtype.itemsize < 8
    wide = np.float64 if narrow else a.dtype
    kept = {*range(a.ndim)} - {i % a.ndim for i in np.atleast_1d(axes)} if not keepdims and a.ndim > 1 else ()
    if len(kept) == 1:  # the gradient of a bias
        y = namespace_of(a).empty(a.shape[min(kept)], a.dtype)
        call_noted(_sum_into, y, a, axes, wide, divisor)
        return y
    y = a.sum(axes, dtype=wide, keepdims=keepdims)
    return (y if divisor == 1 else y / divisor).astype(a.dtype, copy=False)


def _sum_into(y: Any, a: Any, axes: Any, dtype: Any, divisor: float) -> None:
    total = a.sum(axes, dtype=dtype)
    y[...] = total if divisor == 1 else total / divisor


def axes_of(dim: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """The axes that `dim` names, none of them negative; None names all. NumPy's AxisError for one that is not there."""
    return tuple(range(ndim)) if dim is None else normalize_axis_tuple(dim, ndim, "dim")


def reduced_axes(dim: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """The axes to reduce over: those of `dim`, and all where it names none (as in PyTorch)."""
    return axes_of(dim, ndim) or axes_of(None, ndim)


def count(shape: Sequence[int], axes: Sequence[int]) -> int:
    """How many elements a reduction over `axes` sums up."""
    return math.prod(shape[i] for i in axes)


def keep(y: Any, axes: Sequence[int], ndim: int) -> Any:
    """A reduced array with its reduced axes back, of size 1, whether or not they were kept."""
    if y.ndim == ndim:
        return y
    sizes = iter(y.shape)
    return y.reshape([1 if i in axes else next(sizes) for i in range(ndim)])
