"""Choices between elements.

    maximum    y = max(a, b)          da = dy where a is larger, dy / 2 where they are equal, 0 elsewhere; db likewise
    clamp      y = clamp(x)           dx = dy where x lies between the limits (or on one), 0 elsewhere
    where      y = where(c, a, b)     da = dy where a was chosen, 0 elsewhere; db likewise

each summed over the axes along which that operand was broadcast. Saved for backward: masks.
"""

from __future__ import annotations

from typing import Any

from ..device import namespace_of
from ..engine import Function, Tensor
from .layout import unbroadcast
from .move import operand, operands, promoted, to
from .pointwise import neg


class Maximum(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a > b, a < b)
        return namespace_of(a).maximum(a, b)

    @staticmethod
    def backward(ctx, dy):
        a_wins, b_wins = ctx.saved_for_backward
        xp = namespace_of(dy)
        half = xp.where(a_wins == b_wins, dy / 2, dy).astype(dy.dtype, copy=False)
        a, b = ctx.input_shapes
        return unbroadcast(_where(~b_wins, half), a), unbroadcast(_where(~a_wins, half), b)


class Clamp(Function):
    @staticmethod
    def forward(ctx, x, *, min: Any, max: Any):
        y = x.clip(min, max).astype(x.dtype, copy=False)
        ctx.save_for_backward(x == y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (inside,) = ctx.saved_for_backward
        return _where(inside, dy)


class Where(Function):
    @staticmethod
    def forward(ctx, condition, a, b):
        ctx.save_for_backward(condition)
        return namespace_of(a).where(condition, a, b)

    @staticmethod
    def backward(ctx, dy):
        (chosen,), (_, a, b) = ctx.saved_for_backward, ctx.input_shapes
        return None, unbroadcast(_where(chosen, dy), a), unbroadcast(_where(~chosen, dy), b)


def _where(chosen: Any, dy: Any) -> Any:
    """dy where `chosen`, else 0: also where dy is infinite, of which a product with 0 would make nan."""
    xp = namespace_of(dy)
    return xp.where(chosen, dy, xp.zeros((), dy.dtype))


def maximum(input: Any, other: Any) -> Tensor:
    """The larger of each two elements; nan where one is nan."""
    return Maximum.apply(*operands(input, other))


def minimum(input: Any, other: Any) -> Tensor:
    """The smaller of each two elements; nan where one is nan."""
    a, b = operands(input, other)
    return neg(Maximum.apply(neg(a), neg(b)))


def clamp(input: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """`input` with its elements moved to the nearer limit where they lie outside; a limit of None is none.

    The limits are numbers, or Tensors that broadcast; where both are given and cross, `max` wins.
    """
    limits = [limit for limit in (min, max) if limit is not None]
    if not limits:
        raise ValueError("clamp needs min, max or both")
    if any(isinstance(limit, Tensor) for limit in limits):
        input = input if min is None else _limited(input, min, least=True)
        return input if max is None else _limited(input, max, least=False)
    dtype = promoted(input, *(operand(limit, input) for limit in limits))
    return Clamp.apply(to(input, dtype=dtype), min=min, max=max)


def _limited(x: Tensor, limit: Any, least: bool) -> Tensor:
    """As `maximum` and `minimum`, but where both are equal all of dy goes to x, as in PyTorch."""
    x, limit = operands(x, limit)
    outside: Any = x < limit if least else x > limit
    return where(outside | (limit != limit), limit, x)


def where(condition: Tensor, input: Any, other: Any) -> Tensor:
    """`input` where `condition` (a bool Tensor) holds, else `other`."""
    if condition.dtype != bool:
        raise TypeError(f"where: the condition must be a bool Tensor, not {condition.dtype}")
    a, b = operands(input, other)
    return Where.apply(condition, a, b)
