"""Modules that change the shape, or nothing."""

from __future__ import annotations

from typing import Any

from ..engine import Tensor
from ..ops.shape import flatten
from .module import Module


class Flatten(Module):
    """Join axes start_dim to end_dim into one: (N, C, H, W) to (N, C * H * W) by default."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1):
        super().__init__()
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, x: Tensor) -> Tensor:
        """The same values, in C order."""
        return flatten(x, self.start_dim, self.end_dim)

    def extra_repr(self) -> str:
        """As PyTorch's."""
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"


class Identity(Module):
    """Returns what it is given. Takes and ignores any arguments, so it can replace any layer."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def forward(self, x: Any) -> Any:
        """x itself."""
        return x
