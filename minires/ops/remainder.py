"""Division that rounds down, and what it leaves: the remainder has the sign of b, as Python's.

    q = floor(a / b)      no gradient (it would be 0 almost everywhere)
    y = a - b * q         da = dy      db = -dy * q

each summed over the axes along which that operand was broadcast. Saved for backward: q, where db is needed.
"""

from __future__ import annotations

from typing import Any

from ..engine import Function, Tensor
from .layout import unbroadcast
from .move import kind, operands


class Remainder(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a // b if ctx.needs_grad[1] else None)
        return a % b

    @staticmethod
    def backward(ctx, dy):
        (q,), (a, b) = ctx.saved_for_backward, ctx.input_shapes
        return unbroadcast(dy, a) if ctx.needs_grad[0] else None, None if q is None else unbroadcast(-dy * q, b)


def floor_divide(input: Any, other: Any) -> Tensor:
    """floor(input / other) of each two elements, without gradient. ZeroDivisionError for an integer by 0."""
    a, b = _divisible("floor_divide", input, other)
    return Tensor(a.array // b.array)


def remainder(input: Any, other: Any) -> Tensor:
    """input - other * floor(input / other) of each two elements. ZeroDivisionError for an integer by 0."""
    return Remainder.apply(*_divisible("remainder", input, other))


def _divisible(name: str, input: Any, other: Any) -> tuple[Tensor, Tensor]:
    a, b = operands(input, other)
    if kind(b.dtype) < 2 and not b.array.all():
        raise ZeroDivisionError(f"{name}: an integer is divided by 0; convert with .float() for inf or nan")
    return a, b
