"""Comparisons and logic: bool Tensors without gradients. Attached to Tensor by tensor.py."""

from __future__ import annotations

import operator
from collections.abc import Callable
from numbers import Number
from typing import Any

from ..engine import Tensor
from .layout import axes_of


def _compared(op: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def method(self: Tensor, other: Any) -> Tensor:
        if isinstance(other, Tensor):
            other = other.array
        elif not isinstance(other, Number) and not hasattr(other, "dtype"):
            return NotImplemented  # so that `tensor == None` is False
        return Tensor(op(self.array, other))

    method.__name__ = op.__name__
    method.__doc__ = f"Elementwise `{op.__name__}` with a Tensor, an array or a number, as a Tensor without gradient."
    return method


class Comparisons:
    """`==` is elementwise, as in PyTorch; a Tensor's hash is its identity."""

    eq = __eq__ = _compared(operator.eq)
    ne = __ne__ = _compared(operator.ne)
    lt = __lt__ = _compared(operator.lt)
    le = __le__ = _compared(operator.le)
    gt = __gt__ = _compared(operator.gt)
    ge = __ge__ = _compared(operator.ge)
    __and__ = __rand__ = _compared(operator.and_)
    __or__ = __ror__ = _compared(operator.or_)
    __xor__ = __rxor__ = _compared(operator.xor)
    __hash__ = object.__hash__

    def __invert__(self: Any) -> Any:
        """The negation of bools, or of the bits of integers."""
        return Tensor(~self.array)

    def any(self: Any, dim: Any = None, keepdim: bool = False) -> Any:
        """Whether any element over `dim` (None: all) is not zero."""
        return Tensor(self.array.any(axes_of(dim, self.ndim), keepdims=keepdim))

    def all(self: Any, dim: Any = None, keepdim: bool = False) -> Any:
        """Whether all elements over `dim` (None: all) are not zero."""
        return Tensor(self.array.all(axes_of(dim, self.ndim), keepdims=keepdim))
