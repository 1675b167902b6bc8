"""Arithmetic of two operands, with broadcasting; numbers are operands too (their dtype gives way, see move.py).

    add    y = a + b       da = dy                     db = dy
    sub    y = a - b       da = dy                     db = -dy
    mul    y = a * b       da = dy * b                 db = dy * a
    div    y = a / b       da = dy / b                 db = -dy * y / b
    pow    y = a ** b      da = dy * b * a**(b - 1)    db = dy * y * log(a)

each summed over the axes along which that operand was broadcast. Saved for backward: of the other operand and of y,
what the formula reads. In a ** b, da is 0 where b is 0, and db is 0 where a is 0 (as in PyTorch).
"""

from __future__ import annotations

from numbers import Number
from typing import Any

import numpy as np

from ..autocast import autocasts
from ..device import namespace_of
from ..dispatch import run
from ..engine import Function, Tensor
from .layout import unbroadcast
from .move import floating, operands


class Add(Function):
    @staticmethod
    def forward(ctx, a, b):
        if a.shape == b.shape and a.ndim and a.dtype.kind in "fcV":  # the residual sum
            return run("add_fprop", a, b)
        return a + b

    @staticmethod
    def backward(ctx, dy):  # where the shapes are equal both inputs get this very dy; nobody writes into it
        return tuple(unbroadcast(dy, s) if n else None for s, n in zip(ctx.input_shapes, ctx.needs_grad, strict=True))


class Sub(Function):
    @staticmethod
    def forward(ctx, a, b):
        return a - b

    @staticmethod
    def backward(ctx, dy):
        a, b = ctx.input_shapes
        return unbroadcast(dy, a) if ctx.needs_grad[0] else None, -unbroadcast(dy, b) if ctx.needs_grad[1] else None


class Mul(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a if ctx.needs_grad[1] else None, b if ctx.needs_grad[0] else None)
        return a * b

    @staticmethod
    def backward(ctx, dy):
        a, b = ctx.saved_for_backward
        da = unbroadcast(dy * b, ctx.input_shapes[0]) if ctx.needs_grad[0] else None
        db = unbroadcast(dy * a, ctx.input_shapes[1]) if ctx.needs_grad[1] else None
        return da, db


class Div(Function):
    @staticmethod
    def forward(ctx, a, b):
        y = a / b
        ctx.save_for_backward(b, y if ctx.needs_grad[1] else None)
        return y

    @staticmethod
    def backward(ctx, dy):
        b, y = ctx.saved_for_backward
        da = dy / b
        db = unbroadcast(-da * y, ctx.input_shapes[1]) if ctx.needs_grad[1] else None
        return unbroadcast(da, ctx.input_shapes[0]), db


class Pow(Function):
    @staticmethod
    def forward(ctx, a, b):
        y = a**b
        ctx.save_for_backward(a, b, y if ctx.needs_grad[1] else None)
        return y

    @staticmethod
    def backward(ctx, dy):
        a, b, y = ctx.saved_for_backward
        xp, da, db = namespace_of(a), None, None
        if ctx.needs_grad[0]:
            da = unbroadcast(dy * b * a ** xp.where(b == 0, 0, b - 1), a.shape)
        if ctx.needs_grad[1]:
            db = unbroadcast(dy * y * xp.log(xp.where(a == 0, xp.ones_like(a), a)), b.shape)
        return da, db


class PowNumber(Function):
    """y = x ** p for a number p: NumPy squares by a product, and backward needs x alone.

    dx = dy * p * x ** (p - 1)
    """

    @staticmethod
    def forward(ctx, x, *, p: Any):
        ctx.save_for_backward(x)
        return (x**p).astype(x.dtype, copy=False)  # of bfloat16 NumPy makes float32

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_for_backward
        p = ctx.params["p"]
        return dy * 0 if p == 0 else dy * (p * x ** (p - 1)).astype(x.dtype, copy=False)


def add(input: Any, other: Any, *, alpha: Any = 1) -> Tensor:
    """input + alpha * other."""
    if alpha != 1:
        other = mul(other, alpha) if isinstance(other, Tensor) else other * alpha
    return Add.apply(*operands(input, other))


def sub(input: Any, other: Any, *, alpha: Any = 1) -> Tensor:
    """input - alpha * other."""
    if alpha != 1:
        other = mul(other, alpha) if isinstance(other, Tensor) else other * alpha
    return Sub.apply(*operands(input, other))


def mul(input: Any, other: Any) -> Tensor:
    """input * other."""
    return Mul.apply(*operands(input, other))


def div(input: Any, other: Any) -> Tensor:
    """input / other; float32 for integers by integers."""
    a, b = operands(input, other)
    return Div.apply(floating(a), floating(b))


@autocasts
def pow(input: Any, exponent: Any) -> Tensor:
    """input ** exponent. Of integers, an integer; a negative exponent there is NumPy's ValueError."""
    if isinstance(exponent, Number) and isinstance(input, Tensor):
        return PowNumber.apply(operands(input, exponent)[0], p=np.asarray(exponent).item())
    return Pow.apply(*operands(input, exponent))
