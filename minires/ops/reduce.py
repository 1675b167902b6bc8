"""Sums over axes, and what is made of them.

    sum     y = sum x                   dx = dy, spread over the axes
    mean    y = sum x / n               dx = dy / n, spread
    norm    y = (sum |x|^p)^(1/p)       dx = dy * sign(x) * (|x| / y)^(p - 1)      p = 2: dy * x / y;  0 where y is 0

Saved for backward: nothing for sum and mean (only the shape and memory order of x), x and y for the norm.
The norm of p = inf is the largest |x|, its gradient shared among all that reach it (extremes.py).
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..autocast import autocasts
from ..device import namespace_of
from ..engine import Function, Tensor
from .arithmetic import div, pow, sub
from .extremes import amax
from .layout import Layout, count, keep, reduced_axes, sum_axes
from .move import kind, to
from .pointwise import abs

Axes = tuple[int, ...]
Dim = int | Sequence[int] | None


class Sum(Function):
    @staticmethod
    def forward(ctx, x, *, axes: Axes, keepdim: bool):
        ctx.layout = Layout.of(x)
        return sum_axes(x, axes, keepdim)

    @staticmethod
    def backward(ctx, dy):
        dy = keep(dy, ctx.params["axes"], len(ctx.layout.shape))
        return ctx.layout.full(dy, dy.dtype, namespace_of(dy))


class Mean(Function):
    @staticmethod
    def forward(ctx, x, *, axes: Axes, keepdim: bool):
        ctx.layout = Layout.of(x)
        return sum_axes(x, axes, keepdim, count(x.shape, axes) or math.nan)

    @staticmethod
    def backward(ctx, dy):
        layout, axes = ctx.layout, ctx.params["axes"]
        dy = keep(dy, axes, len(layout.shape))
        return layout.full(dy / builtins.max(count(layout.shape, axes), 1), dy.dtype, namespace_of(dy))


class Norm(Function):
    @staticmethod
    def forward(ctx, x, *, p: float, axes: Axes, keepdim: bool):
        xp = namespace_of(x)
        if p == 2:
            y = xp.sqrt(sum_axes(x * x, axes, keepdim))
        else:
            y = sum_axes(xp.abs(x) ** p, axes, keepdim) ** (1 / p)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, y = ctx.saved_for_backward
        xp, p, axes = namespace_of(x), ctx.params["p"], ctx.params["axes"]
        dy, y = keep(dy, axes, x.ndim), keep(y, axes, x.ndim)
        if p == 2:
            return x * (dy * (y != 0) / xp.where(y == 0, xp.ones_like(y), y))
        share = xp.abs(x) / xp.where(y == 0, xp.ones_like(y), y)
        return dy * xp.sign(x) * share ** (p - 1)


@autocasts
def sum(input: Tensor, dim: Dim = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """The sum over `dim` (an axis, several, or None for all). Integers and bools are summed in int64."""
    if dtype is None and kind(input.dtype) < 2:
        dtype = np.int64
    return Sum.apply(to(input, dtype=dtype), axes=reduced_axes(dim, input.ndim), keepdim=keepdim)


def mean(input: Tensor, dim: Dim = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """The mean over `dim` (an axis, several, or None for all). TypeError for integers: convert them first."""
    input = to(input, dtype=dtype)
    if kind(input.dtype) < 2:
        raise TypeError(f"mean of {input.dtype}: convert it first, with .float() or mean(..., dtype=float32)")
    return Mean.apply(input, axes=reduced_axes(dim, input.ndim), keepdim=keepdim)


@autocasts
def norm(input: Tensor, p: float | str = 2, dim: Dim = None, keepdim: bool = False) -> Tensor:
    """The p-norm of the elements over `dim` (None: of all); p from 1 to inf, or "fro", which is 2.

    Its gradient at the zero vector is 0, as PyTorch's.
    """
    p = 2 if p == "fro" else p
    if kind(input.dtype) < 2:
        raise TypeError(f"norm of {input.dtype}: convert it first, with .float()")
    if isinstance(p, str) or not p >= 1:
        raise ValueError(f"norm: p={p!r} must be a number from 1 to inf, or 'fro'")
    if p == math.inf:
        return amax(abs(input), dim, keepdim)
    if p == 1:
        return sum(abs(input), dim, keepdim)
    return Norm.apply(input, p=p, axes=reduced_axes(dim, input.ndim), keepdim=keepdim)


@autocasts
def var(
    input: Tensor, dim: Dim = None, *, correction: int = 1, unbiased: bool | None = None, keepdim: bool = False
) -> Tensor:
    """The variance over `dim`: sum (x - mean)^2 / (n - correction); biased with correction 0 or unbiased=False.

    Infinite, or nan where all elements are equal, if n <= correction.
    """
    n = _freedom(input, dim, correction, unbiased)
    return div(sum(pow(sub(input, mean(input, dim, True)), 2), dim, keepdim), n)


@autocasts
def std(
    input: Tensor, dim: Dim = None, *, correction: int = 1, unbiased: bool | None = None, keepdim: bool = False
) -> Tensor:
    """The standard deviation over `dim`, the root of `var`; its gradient is 0 where all elements are equal."""
    n = _freedom(input, dim, correction, unbiased)
    return div(norm(sub(input, mean(input, dim, True)), 2, dim, keepdim), n**0.5)


def _freedom(x: Tensor, dim: Dim, correction: int, unbiased: bool | None) -> int:
    correction = correction if unbiased is None else int(unbiased)
    return builtins.max(count(x.shape, reduced_axes(dim, x.ndim)) - correction, 0)
