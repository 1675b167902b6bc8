"""The largest and smallest elements, and where they stand.

    y = x[k], k the index of the largest along an axis     dx[k] = dy, 0 elsewhere         max, min, topk along an axis
    y = largest over axes                                  dx = dy / ties where x == y     amax, max of all

Saved for backward: the indices, or x and y. Indices are integers without gradients. (The conventions are PyTorch's.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..device import namespace_of
from ..engine import Function, Tensor
from .choice import maximum, minimum
from .layout import Layout, axes_of, keep
from .shape import squeeze


class Extreme(NamedTuple):
    """Values, and their indices (int64) along the axis; unpack it as `values, indices = x.max(1)`."""

    values: Tensor
    indices: Tensor


class Pick(Function):
    """y = x at `indices` along `axis`: shape of `indices`, whose entries differ along the axis."""

    @staticmethod
    def forward(ctx, x, *, indices: Any, axis: int):
        grid: list[Any] = list(namespace_of(x).ogrid[tuple(slice(n) for n in indices.shape)])
        grid[axis] = indices
        ctx.layout, ctx.picked = Layout.of(x), tuple(grid)
        return x[ctx.picked]

    @staticmethod
    def backward(ctx, dy):
        dx = ctx.layout.full(0, dy.dtype, namespace_of(dy))
        dx[ctx.picked] = dy
        return dx


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
    return Amax.apply(input, axes=axes_of(dim, input.ndim), keepdim=keepdim, least=False)


def amin(input: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """The smallest element over `dim` (an axis, several, or None for all)."""
    return Amax.apply(input, axes=axes_of(dim, input.ndim), keepdim=keepdim, least=True)


def argmax(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """The index (int64) of the first largest element along `dim`, or in the flattened tensor for None."""
    return Tensor(_first(input.array.argmax, dim, keepdim))


def argmin(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """The index (int64) of the first smallest element along `dim`, or in the flattened tensor for None."""
    return Tensor(_first(input.array.argmin, dim, keepdim))


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
    indices = order[(slice(None),) * axis + (slice(k),)]
    return Extreme(Pick.apply(input, indices=indices, axis=axis), Tensor(indices))


def _along(x: Tensor, search: Any, dim: int, keepdim: bool) -> Extreme:
    (axis,) = axes_of(dim, x.ndim)
    indices = _first(search, axis, True)
    values = Pick.apply(x, indices=indices, axis=axis)
    if keepdim:
        return Extreme(values, Tensor(indices))
    return Extreme(squeeze(values, axis), Tensor(indices.squeeze(axis)))


def _first(search: Any, dim: int | None, keepdim: bool) -> Any:
    """`search` is an array's argmax or argmin. NumPy and CuPy give the first one, in int64."""
    return search(dim, keepdims=True) if keepdim and dim is not None else search(dim)
