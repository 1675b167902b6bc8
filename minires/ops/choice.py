"""Choices between elements.

    y = max(a, b)          dy goes to the larger one, half to each where they are equal
    y = clamp(x)           dx = dy where x lies between the limits (or on one), 0 elsewhere
    y = where(c, a, b)     dy goes to the one that was chosen

each summed over the axes along which that operand was broadcast. Saved for backward: masks.
"""

from __future__ import annotations

from typing import Any

from ..device import namespace_of
from ..engine import Function, Tensor
from .layout import unbroadcast
from .move import operands
from .pointwise import neg


class Maximum(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a > b, a < b)
        return namespace_of(a).maximum(a, b)

    @staticmethod
    def backward(ctx, dy):
        a_wins, b_wins = ctx.saved_for_backward
        half = dy * (1 - 0.5 * (a_wins == b_wins)).astype(dy.dtype)
        a, b = ctx.input_shapes
        return unbroadcast(half * ~b_wins, a), unbroadcast(half * ~a_wins, b)


class Clamp(Function):
    @staticmethod
    def forward(ctx, x, *, min: Any, max: Any):
        y = x.clip(min, max)
        ctx.save_for_backward(x == y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (inside,) = ctx.saved_for_backward
        return dy * inside


class Where(Function):
    @staticmethod
    def forward(ctx, a, b, *, condition: Any):
        return namespace_of(a).where(condition, a, b)

    @staticmethod
    def backward(ctx, dy):
        chosen = ctx.params["condition"]
        return unbroadcast(dy * chosen, ctx.input_shapes[0]), unbroadcast(dy * ~chosen, ctx.input_shapes[1])


def maximum(input: Any, other: Any) -> Tensor:
    """The larger of each two elements; nan where one is nan."""
    return Maximum.apply(*operands(input, other))


def minimum(input: Any, other: Any) -> Tensor:
    """The smaller of each two elements; nan where one is nan."""
    a, b = operands(input, other)
    return neg(Maximum.apply(neg(a), neg(b)))


def clamp(input: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """`input` with its elements moved to the nearer limit where they lie outside; a limit of None is none."""
    if min is None and max is None:
        raise ValueError("clamp needs min, max or both")
    return Clamp.apply(input, min=min, max=max)


def where(condition: Tensor, input: Any, other: Any) -> Tensor:
    """`input` where `condition` (a bool Tensor) holds, else `other`."""
    if condition.dtype != bool:
        raise TypeError(f"where: the condition must be a bool Tensor, not {condition.dtype}")
    a, b = operands(input, other)
    return Where.apply(a, b, condition=condition.array)
