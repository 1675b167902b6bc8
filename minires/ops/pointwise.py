"""Functions of each element.

    neg     y = -x           dx = -dy
    abs     y = |x|          dx = dy * sign x
    sqrt    y = sqrt x       dx = dy / (2 y)
    exp     y = exp x        dx = dy * y
    log     y = log x        dx = dy / x
    sin     y = sin x        dx = dy * cos x
    cos     y = cos x        dx = -dy * sin x

Saved for backward: y for exp and sqrt, nothing for neg, x for the others. |x| has gradient 0 at 0, and sqrt an
infinite one (as in PyTorch). Of integers, all but neg and |x| are float32.
"""

from __future__ import annotations

from ..autocast import autocasts
from ..device import namespace_of
from ..engine import Function, Tensor
from .move import floating


class Neg(Function):
    @staticmethod
    def forward(ctx, x):
        return -x

    @staticmethod
    def backward(ctx, dy):
        return -dy


class Abs(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return namespace_of(x).abs(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_for_backward
        return dy * namespace_of(x).sign(x)


class Exp(Function):
    @staticmethod
    def forward(ctx, x):
        y = namespace_of(x).exp(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_for_backward
        return dy * y


class Log(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return namespace_of(x).log(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_for_backward
        return dy / x


class Sqrt(Function):
    @staticmethod
    def forward(ctx, x):
        y = namespace_of(x).sqrt(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_for_backward
        return dy / (2 * y)


class Sin(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return namespace_of(x).sin(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_for_backward
        return dy * namespace_of(x).cos(x)


class Cos(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return namespace_of(x).cos(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_for_backward
        return -dy * namespace_of(x).sin(x)


def neg(input: Tensor) -> Tensor:
    """-input. TypeError for bools."""
    if input.dtype == bool:
        raise TypeError("neg: a bool tensor has no negative; use ~ to invert a mask")
    return Neg.apply(input)


def abs(input: Tensor) -> Tensor:
    """The absolute value of each element."""
    return Abs.apply(input)


@autocasts
def exp(input: Tensor) -> Tensor:
    """e to the power of each element."""
    return Exp.apply(floating(input))


@autocasts
def log(input: Tensor) -> Tensor:
    """The natural logarithm of each element."""
    return Log.apply(floating(input))


def sqrt(input: Tensor) -> Tensor:
    """The square root of each element; nan for a negative one."""
    return Sqrt.apply(floating(input))


def sin(input: Tensor) -> Tensor:
    """The sine of each element, in radians."""
    return Sin.apply(floating(input))


def cos(input: Tensor) -> Tensor:
    """The cosine of each element, in radians."""
    return Cos.apply(floating(input))
