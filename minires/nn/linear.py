"""y = x @ weight.T + bias, as a module."""

from __future__ import annotations

import math
from typing import Any

from ..engine import Tensor
from ..ops.matmul import linear
from . import init
from .module import Module, Parameter
from .parameters import at_least_one, new_parameter


class Linear(Module):
    """(..., in_features) to (..., out_features).

    weight (out_features, in_features), bias (out_features,) or None, both uniform in +-1 / sqrt(in_features) at first.
    """

    weight: Parameter
    bias: Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None):
        super().__init__()
        at_least_one("Linear", in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.weight = new_parameter((out_features, in_features), device, dtype)
        self.bias = new_parameter((out_features,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """As PyTorch's."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
