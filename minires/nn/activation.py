"""Activations and softmax as modules; they have no parameters. Formulas are on the ops' pages."""

from __future__ import annotations

from ..engine import Tensor
from ..ops.activation import relu, sigmoid, tanh
from ..ops.loss import log_softmax, softmax
from .module import Module


class ReLU(Module):
    """max(x, 0). inplace: accepted so that PyTorch's calls run; the result is always a new tensor."""

    def __init__(self, inplace: bool = False):
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return relu(x, self.inplace)

    def extra_repr(self) -> str:
        """As PyTorch's."""
        return "inplace=True" if self.inplace else ""


class Sigmoid(Module):
    """1 / (1 + exp(-x))."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return sigmoid(x)


class Tanh(Module):
    """Hyperbolic tangent."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return tanh(x)


class _OverAxis(Module):
    def __init__(self, dim: int):
        super().__init__()
        if not isinstance(dim, int):
            raise ValueError(f"{type(self).__name__}: dim={dim!r} must be an int, the axis of the classes (usually 1)")
        self.dim = dim

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Softmax(_OverAxis):
    """exp(x) / sum(exp(x)) along axis `dim`."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return softmax(x, self.dim)


class LogSoftmax(_OverAxis):
    """log(softmax(x)) along axis `dim`."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return log_softmax(x, self.dim)
