"""The axes of a tensor in another order, or repeated. Nothing is copied: the result shows the memory of x.

    permute     dx = dy with the axes put back         transpose, t
    expand      dx = dy summed over the new axes       repeats along axes of size 1, or along new ones in front

Saved for backward: nothing but the shape of x.
"""

from __future__ import annotations

from typing import Any

from ..device import namespace_of
from ..engine import Function, Tensor
from .layout import axes_of, unbroadcast
from .shape import Shape, numbers


class Permute(Function):
    @staticmethod
    def forward(ctx, x, *, axes: Shape):
        return x.transpose(axes)

    @staticmethod
    def backward(ctx, dy):
        axes = ctx.params["axes"]
        return dy.transpose(sorted(range(len(axes)), key=axes.__getitem__))


class Expand(Function):
    @staticmethod
    def forward(ctx, x, *, shape: Shape):
        return namespace_of(x).broadcast_to(x, shape)

    @staticmethod
    def backward(ctx, dy):
        return unbroadcast(dy, ctx.input_shapes[0])


def permute(input: Tensor, *dims: Any) -> Tensor:
    """Axis `dims[i]` of `input` as axis i."""
    return Permute.apply(input, axes=_all_axes(numbers(dims), input.ndim))


def transpose(input: Tensor, dim0: int, dim1: int) -> Tensor:
    """With these two axes exchanged."""
    first, second = axes_of(dim0, input.ndim)[0], axes_of(dim1, input.ndim)[0]
    exchanged = {first: second, second: first}
    return permute(input, tuple(exchanged.get(i, i) for i in range(input.ndim)))


def t(input: Tensor) -> Tensor:
    """A matrix transposed; a vector or a scalar as it is."""
    if input.ndim > 2:
        raise ValueError(f"t() takes at most two axes, not shape {input.shape}: use transpose or permute")
    return permute(input, tuple(reversed(range(input.ndim))))


def expand(input: Tensor, *sizes: Any) -> Tensor:
    """Repeated to `sizes`, where -1 keeps a size. ValueError where an axis of another size than 1 would change."""
    sizes = numbers(sizes)
    ahead = len(sizes) - input.ndim
    shape = tuple(input.shape[i - ahead] if n == -1 and i >= ahead else n for i, n in enumerate(sizes))
    if (
        ahead < 0
        or min(shape, default=0) < 0
        or any(k not in (1, n) for k, n in zip(input.shape, shape[ahead:], strict=True))
    ):
        raise ValueError(f"expand: {input.shape} cannot be repeated to {sizes}")
    return Expand.apply(input, shape=shape)


def _all_axes(dims: Shape, ndim: int) -> Shape:
    axes = axes_of(dims, ndim)
    if len(axes) != ndim:
        raise ValueError(f"permute: {dims} must name each of the {ndim} axes once")
    return axes
