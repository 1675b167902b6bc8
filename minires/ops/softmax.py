"""Softmax and its logarithm over one axis.

    log_softmax   y = x - m - log(sum of exp(x - m))      dx = dy - exp(y) * (sum of dy)
    softmax       y = exp(x - m) / (sum of exp(x - m))    dx = y * (dy - (sum of dy * y))

m is the maximum along the axis; subtracting it changes nothing but keeps exp from overflowing. Saved for backward: y.
(dy_j / dx_k of log_softmax is [j = k] - exp(y_k), of softmax y_j ([j = k] - y_k).)
"""

from __future__ import annotations

from typing import Any

from ..autocast import autocasts
from ..device import namespace_of
from ..engine import Function, Tensor
from .layout import axes_of
from .move import floating, to
from .shape import reshape


class LogSoftmax(Function):
    @staticmethod
    def forward(ctx, x, *, axis: int):
        y = log_softmax_array(x, axis)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,), axis = ctx.saved_for_backward, ctx.params["axis"]
        return dy - namespace_of(y).exp(y) * dy.sum(axis, keepdims=True)


class Softmax(Function):
    @staticmethod
    def forward(ctx, x, *, axis: int):
        exps = namespace_of(x).exp(_shifted(x, axis))
        y = exps / exps.sum(axis, keepdims=True)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,), axis = ctx.saved_for_backward, ctx.params["axis"]
        return y * (dy - (dy * y).sum(axis, keepdims=True))


def log_softmax_array(x: Any, axis: int) -> Any:
    """The forward formula on an array; `cross_entropy` needs it too."""
    xp, shifted = namespace_of(x), _shifted(x, axis)
    return shifted - xp.log(xp.exp(shifted).sum(axis, keepdims=True))


def _shifted(x: Any, axis: int) -> Any:
    """x - m; m is real for complex x too, so that the op stays analytic (m cancels)."""
    return x - x.real.max(axis, keepdims=True) if x.size else x


@autocasts
def log_softmax(input: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """The logarithm of the softmax of `input` over axis `dim`; computed in `dtype`, if given. Same shape."""
    return _along(LogSoftmax, input, dim, dtype)


@autocasts
def softmax(input: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """exp(input), scaled to sum 1 over axis `dim`; computed in `dtype`, if given. Same shape."""
    return _along(Softmax, input, dim, dtype)


def _along(op: type[Function], x: Tensor, dim: int, dtype: Any) -> Tensor:
    x = floating(to(x, dtype=dtype))
    if not x.ndim and dim in (0, -1):  # a number is a row of one, as in PyTorch
        return reshape(_along(op, reshape(x, 1), 0, None), ())
    return op.apply(x, axis=axes_of(dim, x.ndim)[0])
