"""Dropout as a module; the formula is in ops/dropout.py."""

from __future__ import annotations

from ..engine import Tensor
from ..ops.dropout import dropout
from .module import Module


class Dropout(Module):
    """In training, set each element to 0 with probability p and divide the others by 1 - p; in evaluation, nothing.

    inplace: accepted so that PyTorch's calls run; the result is always a new tensor.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False):
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"Dropout: p={p} must be a probability, in [0, 1]")
        self.p, self.inplace = p, inplace

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        """As PyTorch's."""
        return f"p={self.p}, inplace={self.inplace}"
