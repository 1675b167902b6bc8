"""Activation functions of each element.

    relu       y = max(x, 0)               dx = dy where y > 0, else 0
    sigmoid    y = 1 / (1 + exp(-x))       dx = dy * y * (1 - y)
    tanh       y = tanh x                  dx = dy * (1 - y²)

Any shape. Saved for backward: y alone; x is not needed. ReLU keeps a NaN, and its gradient at 0 is 0 (as in PyTorch).
Complex numbers are rectified by their real part.
"""

from __future__ import annotations

from ..device import namespace_of
from ..dispatch import run
from ..engine import Function, Tensor
from .move import floating


class ReLU(Function):
    @staticmethod
    def forward(ctx, x):
        y = run("relu_fprop", x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        return run("relu_bwd", dy, *ctx.saved_for_backward)


class Sigmoid(Function):
    @staticmethod
    def forward(ctx, x):
        xp = namespace_of(x)
        e = xp.exp(xp.where(x.real < 0, x, -x))  # of no positive number: it cannot overflow
        y = xp.where(x.real < 0, e, xp.ones_like(e)) / (1 + e)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_for_backward
        return dy * (y * (1 - y))


class Tanh(Function):
    @staticmethod
    def forward(ctx, x):
        y = namespace_of(x).tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_for_backward
        return dy * (1 - y * y)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(input, 0) of each element.

    inplace: accepted so that PyTorch's calls run; the result is always a new tensor.
    """
    return ReLU.apply(input)


def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + exp(-input)) of each element, accurate on both sides; float32 for integers."""
    return Sigmoid.apply(floating(input))


def tanh(input: Tensor) -> Tensor:
    """The hyperbolic tangent of each element; float32 for integers."""
    return Tanh.apply(floating(input))
