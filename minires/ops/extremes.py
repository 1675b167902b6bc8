"""The largest and smallest elements, and where they stand.

    pick    y = x[k], k the index of the largest along an axis     dx[k] = dy, 0 elsewhere         max, min, topk
    amax    y = largest over axes                                  dx = dy / ties where x == y     amax, max of all

Saved for backward: the indices, or x and y. Indices are integers without gradients. (The conventions are PyTorch's.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..device import namespace_of
from ..engine import Function, Tensor
from .choice import maximum, minimum
from .layout import Layout, axes_of, keep, reduced_axes
from .shape import squeeze


class Extreme(NamedTuple):
    """Values, and their indices (int64) along the axis; unpack it as `values, indices = x.max(1)`."""

    values: Tensor
    indices: Tensor


class Pick(Function):
    """y = x at `indices` along `axis`: shape of `indices`, whose entries differ along the axis."""

    @staticmethod
    def forward(ctx, x, indices, *, axis: int):
        ctx.layout = Layout.of(x)
        ctx.save_for_backward(indices)
        return namespace_of(x).take_along_axis(x, indices, axis)

    @staticmethod
    def backward(ctx, dy):
        (indices,), xp = ctx.saved_for_backward, namespace_of(dy)
        dx = ctx.layout.full(0, dy.dtype, xp)
        grid: list[Any] = list(xp.ogrid[tuple(slice(n) for n in indices.shape)])
        grid[ctx.params["axis"]] = indices
        dx[tuple(grid)] = dy
        return dx, None


class Amax(Function):
    @staticmethod
    def forward(ctx, x, *, axes: tuple[int, ...], keepdim: bool, least: bool):
        y = x.min(axes, keepdims=keepdim) if least else x.max(axes, keepdims=keepdim)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, y = ctx.saved_for_backward
        axes = ctx.params["axes"]
        ties = x == keep(y, axes, x.ndim)
        return ties * (keep(dy, axes, x.ndim) / ties.sum(axes, dtype=dy.dtype, keepdims=True))


def amax(input: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """The largest element over `dim` (an axis, several, or None for all)."""
    return Amax.apply(input, axes=reduced_axes(dim, input.ndim), keepdim=keepdim, least=False)


def amin(input: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """The smallest element over `dim` (an axis, several, or None for all)."""
    return Amax.apply(input, axes=reduced_axes(dim, input.ndim), keepdim=keepdim, least=True)


def argmax(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """The index (int64) of the first largest element along `dim`, or in the flattened tensor for None."""
    return Tensor(_first(input.array.argmax, input.ndim, dim, keepdim))


def argmin(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """The index (int64) of the first smallest element along `dim`, or in the flattened tensor for None."""
    return Tensor(_first(input.array.argmin, input.ndim, dim, keepdim))


def max(input: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    """The largest of all elements; with an axis `dim`, (values, indices) along it; with a Tensor, `maximum`."""
    if isinstance(dim, Tensor):
        return maximum(input, dim)
    return amax(input) if dim is None else _along(input, input.array.argmax, dim, keepdim)


def min(input: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    """The smallest of all elements; with an axis `dim`, (values, indices) along it; with a Tensor, `minimum`."""
    if isinstance(dim, Tensor):
        return minimum(input, dim)
    return amin(input) if dim is None else _along(input, input.array.argmin, dim, keepdim)


def topk(input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Extreme:
    """(values, indices) of the k largest (or smallest) elements along `dim`, always sorted, best first."""
    (axis,) = axes_of(dim, input.ndim)
    if not 0 <= k <= input.shape[axis]:
        raise ValueError(f"topk: k={k} must lie between 0 and the size of axis {axis}, {input.shape[axis]}")
    order = input.array.argsort(axis)
    if largest:
        order = namespace_of(order).flip(order, axis)
    indices = Tensor(order[(slice(None),) * axis + (slice(k),)])
    return Extreme(Pick.apply(input, indices, axis=axis), indices)


def _along(x: Tensor, search: Any, dim: int, keepdim: bool) -> Extreme:
    (axis,) = axes_of(dim, x.ndim)
    indices = Tensor(search(axis, keepdims=True))
    values = Pick.apply(x, indices, axis=axis)
    return Extreme(values, indices) if keepdim else Extreme(squeeze(values, axis), squeeze(indices, axis))


def _first(search: Any, ndim: int, dim: int | None, keepdim: bool) -> Any:
    """`search` is an array's argmax or argmin. NumPy and CuPy give the first one, in int64."""
    if dim is None:
        return search().reshape((1,) * ndim if keepdim else ())
    return search(dim, keepdims=keepdim)
