"""Other shapes of the same elements, and pieces put together. Backward undoes what forward did to the shape.

    reshape     dx = dy in the shape of x               view, flatten, squeeze, unsqueeze are reshapes
    pad         dx = dy without its border
    cat         dx_i = the slice of dy that x_i fills   stack is cat along a new axis

Saved for backward: shapes alone. A reshape shows the memory of x where NumPy can, else it copies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from ..device import namespace_of
from ..dispatch import run
from ..engine import Function, Tensor
from .layout import axes_of
from .move import promoted, to

Shape = tuple[int, ...]


class Reshape(Function):
    @staticmethod
    def forward(ctx, x, *, shape: Shape):
        return x.reshape(shape)

    @staticmethod
    def backward(ctx, dy):
        return dy.reshape(ctx.input_shapes[0])


class Pad(Function):
    @staticmethod
    def forward(ctx, x, *, before: Shape, after: Shape, value: Any):
        ctx.inside = tuple(slice(a, a + n) for a, n in zip(before, x.shape, strict=True))
        return run("pad", x, before=before, after=after, interior=(0,) * x.ndim, value=value)

    @staticmethod
    def backward(ctx, dy):
        return dy[ctx.inside]


class Cat(Function):
    @staticmethod
    def forward(ctx, *xs, axis: int):
        return namespace_of(*xs).concatenate(xs, axis)

    @staticmethod
    def backward(ctx, dy):
        axis = ctx.params["axis"]
        ends = itertools.accumulate(shape[axis] for shape in ctx.input_shapes)
        ahead = (slice(None),) * axis
        return tuple(
            dy[(*ahead, slice(end - shape[axis], end))] for end, shape in zip(ends, ctx.input_shapes, strict=True)
        )


def numbers(args: tuple) -> Shape:
    """`f(2, 3)` and `f((2, 3))` alike: the numbers as a tuple."""
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], Sequence) else args


def reshape(input: Tensor, *shape: Any) -> Tensor:
    """The elements in logical (row-major) order in another shape; one size may be -1. ValueError where it cannot be."""
    return Reshape.apply(input, shape=numbers(shape))


view = reshape  # PyTorch's view refuses to copy; ours is reshape, because activations lie channels-last


def flatten(input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """The axes from `start_dim` to `end_dim`, both included, as one."""
    if not input.ndim:
        return reshape(input, 1)
    start, end = axes_of(start_dim, input.ndim)[0], axes_of(end_dim, input.ndim)[0]
    if start > end:
        raise ValueError(f"flatten: start_dim={start_dim} lies behind end_dim={end_dim}")
    return reshape(input, *input.shape[:start], math.prod(input.shape[start : end + 1]), *input.shape[end + 1 :])


def squeeze(input: Tensor, dim: Any = None) -> Tensor:
    """Without the axes `dim` (None: any) that have size 1; an axis of another size stays."""
    gone = [i for i in axes_of(dim, input.ndim) if input.shape[i] == 1]
    return reshape(input, tuple(n for i, n in enumerate(input.shape) if i not in gone))


def unsqueeze(input: Tensor, dim: int) -> Tensor:
    """With a new axis of size 1 at `dim`."""
    (axis,) = axes_of(dim, input.ndim + 1)
    return reshape(input, (*input.shape[:axis], 1, *input.shape[axis:]))


def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float = 0) -> Tensor:
    """`input` with a border of `value`; `pad` is (left, right) of the last axis, then of the one before it, and so on.

    For an image that is (left, right, top, bottom). ValueError for negative numbers (slice instead) and other modes.
    """
    pad = tuple(pad)
    if mode != "constant":
        raise ValueError(f"pad: mode={mode!r} is not supported, only 'constant'")
    if len(pad) % 2 or len(pad) > 2 * input.ndim or any(n < 0 for n in pad):
        raise ValueError(
            f"pad={pad} must be pairs of numbers from 0, last axis first, at most {input.ndim} pairs; to crop, slice"
        )
    untouched = (0,) * (input.ndim - len(pad) // 2)
    return Pad.apply(input, before=untouched + pad[-2::-2], after=untouched + pad[::-2], value=value)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The tensors one after the other along `dim`; their other sizes must be equal.

    Among tensors with more axes those of shape (0,) are skipped, as in PyTorch: lists that began empty.
    """
    if not tensors:
        raise ValueError("cat needs at least one tensor")
    dtype = promoted(*tensors)
    if any(t.ndim != 1 for t in tensors):
        tensors = [t for t in tensors if t.shape != (0,)]
    (axis,) = axes_of(dim, tensors[0].ndim)
    return Cat.apply(*(to(t, dtype=dtype) for t in tensors), axis=axis)


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Tensors of one shape along a new axis `dim`."""
    return cat([unsqueeze(t, dim) for t in tensors], dim)
