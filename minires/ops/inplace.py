"""Writing in place, as PyTorch does it. Attached to Tensor by tensor.py.

Without a graph (gradients disabled, or no operand requires one) the values are written into the memory, and every
tensor that shares it sees them. With a graph the same Tensor object goes on with the result and its node, as in a
residual block's `out += x`; tensors that shared its memory keep the old values (in PyTorch they would see the new
ones). A leaf that requires gradients cannot be changed within the graph, and no values can be written into one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..device import namespace_of
from ..engine import Tensor, state
from ..random import default_generator
from .arithmetic import add, div, mul, sub
from .choice import clamp
from .indexing import raw
from .move import kind, to


def _in_place(op: Callable[..., Tensor]) -> Callable[..., Any]:
    def method(self: Tensor, *args: Any, **params: Any) -> Tensor:
        if state.grad_enabled and self.requires_grad and self.node is None:
            raise RuntimeError(
                "a leaf that requires gradients cannot be changed in place within the graph: do it inside no_grad()"
            )
        y = op(self, *args, **params)
        if y.shape != self.shape or kind(y.dtype) > kind(self.dtype):
            raise ValueError(
                f"the result of an in-place {op.__name__} is {y.dtype} of shape {y.shape} and does not fit "
                f"into {self.dtype} of shape {self.shape}"
            )
        if y.node is None:
            _overwrite(self, ..., y)
            return self
        y = to(y, dtype=self.dtype)
        if self.node is not None and y.node is not None and self.node.retaining() is self:  # `.grad` is of the result
            self.node.retaining, y.node.retaining = y.node.retaining, self.node.retaining
        self.array, self.node, self.version = y.array, y.node, y.version
        self.requires_grad = True
        return self

    method.__name__ = f"{op.__name__}_"
    method.__doc__ = f"`{op.__name__}` in place; returns the tensor. See the page's head."
    return method


def _write(x: Tensor, index: Any, value: Any) -> Tensor:
    """Overwrite elements, which no gradient could flow through."""
    if state.grad_enabled and (x.requires_grad or getattr(value, "requires_grad", False)):
        raise RuntimeError("cannot write values into a tensor within the graph: do it inside no_grad() or on .data")
    _overwrite(x, index, value)
    return x


def _overwrite(x: Tensor, index: Any, value: Any) -> None:
    value = getattr(value, "array", value)
    x.array[index] = value
    x.version[0] += 1
    for hook in state.hooks:
        hook.written(x.array, index, value)


def _same_shape(x: Tensor, value: Any) -> Any:
    shape = np.shape(getattr(value, "array", value))
    if shape != x.shape:
        raise ValueError(f"cannot copy a value of shape {shape} into a tensor of shape {x.shape}")
    return value


class InPlace:
    """`self` is a Tensor throughout."""

    add_ = __iadd__ = _in_place(add)
    sub_ = __isub__ = _in_place(sub)
    mul_ = __imul__ = _in_place(mul)
    div_ = __itruediv__ = _in_place(div)
    clamp_ = _in_place(clamp)

    def __setitem__(self: Any, index: Any, value: Any) -> None:
        """Overwrite the elements at `index` with a Tensor, array or number; outside the graph only (RuntimeError)."""
        _write(self, raw(index, self), value)

    data = property(
        lambda self: self.detach(),
        lambda self, value: _overwrite(self, ..., _same_shape(self, value)),
        doc="The same array, outside the graph. Assigning to it copies values of the same shape into the memory.",
    )

    def copy_(self: Any, value: Any) -> Any:
        """Overwrite all elements with those of a Tensor or array of the same shape; outside the graph only."""
        return _write(self, ..., _same_shape(self, value))

    def fill_(self: Any, value: Any) -> Any:
        """Set every element to `value`; outside the graph only."""
        return _write(self, ..., value)

    def zero_(self: Any) -> Any:
        """Set every element to 0; outside the graph only."""
        return _write(self, ..., 0)

    def normal_(self: Any, mean: float = 0, std: float = 1) -> Any:
        """Draw every element from the normal distribution; outside the graph only."""
        return _write(self, ..., _draw(self, default_generator.standard_normal) * std + mean)

    def uniform_(self: Any, low: float = 0, high: float = 1) -> Any:
        """Draw every element evenly from [low, high); outside the graph only."""
        return _write(self, ..., _draw(self, default_generator.random) * (high - low) + low)


def _draw(x: Tensor, draw: Callable[..., Any]) -> Any:
    dtype = "float64" if x.dtype == "float64" else "float32"
    return namespace_of(x.array).asarray(draw(x.shape, dtype))
