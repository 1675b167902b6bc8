"""What a Tensor can do: operators and methods. Importing this page attaches them to `engine.Tensor`.

Most are ops of the same name, whose first argument is the tensor.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

from .. import engine
from ..device import is_cuda_array
from ..dispatch import run
from ..engine import Tensor
from . import arithmetic, axes, choice, extremes, indexing, pointwise, reduce, shape
from .activation import relu, sigmoid, tanh
from .compare import Comparisons
from .convert import Conversions
from .inplace import InPlace
from .matmul import matmul
from .move import kind, operand
from .remainder import floor_divide, remainder
from .softmax import log_softmax, softmax


def _reflected(op: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    return lambda self, other: op(other, self)


def _matmul(a: Any, b: Any) -> Tensor:
    return matmul(operand(a, b), operand(b, a))  # `x @ array` too


class Methods(Comparisons, Conversions, InPlace):
    """The operators and methods of Tensor."""

    add, sub, mul, div, pow = arithmetic.add, arithmetic.sub, arithmetic.mul, arithmetic.div, arithmetic.pow
    __add__, __sub__, __mul__, __truediv__, __pow__ = add, sub, mul, div, pow
    __radd__, __rsub__, __rmul__ = _reflected(add), _reflected(sub), _reflected(mul)
    __rtruediv__, __rpow__ = _reflected(div), _reflected(pow)
    floor_divide, remainder = floor_divide, remainder
    __floordiv__, __mod__ = floor_divide, remainder
    __rfloordiv__, __rmod__ = _reflected(floor_divide), _reflected(remainder)
    matmul, __matmul__, __rmatmul__ = matmul, _matmul, _reflected(_matmul)
    neg = __neg__ = pointwise.neg
    abs = __abs__ = pointwise.abs
    exp, log, sqrt, sin, cos = pointwise.exp, pointwise.log, pointwise.sqrt, pointwise.sin, pointwise.cos
    relu, sigmoid, tanh, softmax, log_softmax = relu, sigmoid, tanh, softmax, log_softmax
    clamp, maximum, minimum = choice.clamp, choice.maximum, choice.minimum
    sum, mean, norm, var, std = reduce.sum, reduce.mean, reduce.norm, reduce.var, reduce.std
    max, min, amax, amin = extremes.max, extremes.min, extremes.amax, extremes.amin
    argmax, argmin, topk = extremes.argmax, extremes.argmin, extremes.topk
    reshape, view, flatten = shape.reshape, shape.view, shape.flatten
    squeeze, unsqueeze = shape.squeeze, shape.unsqueeze
    permute, transpose, t, expand = axes.permute, axes.transpose, axes.t, axes.expand
    __getitem__ = indexing.getitem

    def size(self: Any, dim: int | None = None) -> Any:
        """The shape, a tuple of ints; with `dim` the size of that axis."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self: Any) -> int:
        """How many axes there are."""
        return self.ndim

    def numel(self: Any) -> int:
        """How many elements there are."""
        return self.array.size

    def is_floating_point(self: Any) -> bool:
        """Whether the dtype is a floating one."""
        return kind(self.dtype) == 2

    def expand_as(self: Any, other: Any) -> Any:
        """Repeated to the shape of `other`."""
        return self.expand(*other.shape)

    def view_as(self: Any, other: Any) -> Any:
        """In the shape of `other`."""
        return self.reshape(*other.shape)

    T = property(lambda self: self.permute(*reversed(range(self.ndim))), doc="With the axes in reverse order.")
    is_cuda = property(lambda self: is_cuda_array(self.array), doc="Whether it lies on a GPU.")


for _family in reversed(Methods.__mro__[:-1]):
    for _name, _value in vars(_family).items():
        if builtins.callable(_value) or isinstance(_value, property):
            setattr(Tensor, _name, _value)


def _accumulate(total: Any, share: Any) -> Any:
    """The array total + share, written into `total` where that can be: how the engine sums gradients."""
    if not total.ndim:  # NumPy's 0-d results are scalars
        return total + share
    run("accumulate", total, share)
    return total


engine.accumulate = _accumulate
