"""Convolution as a module; the formula is in ops/conv.py."""

from __future__ import annotations

import math
from typing import Any, Literal

from ..engine import Tensor
from ..ops.conv import conv2d
from ..ops.windows import Pair, pair
from . import init
from .module import Module, Parameter
from .parameters import at_least_one, new_parameter


class Conv2d(Module):
    """Convolve (N, C, H, W) into (N, K, P, Q); see `functional.conv2d`.

    weight (out_channels, in_channels / groups, *kernel_size), bias (out_channels,) or None. stride, padding, dilation:
    an int or a pair; padding also "same" or "valid". Initialised as in PyTorch: uniform in +-1 / sqrt(fan_in).
    Raises ValueError naming a size that makes no sense, or channels that groups does not divide.
    """

    weight: Parameter
    bias: Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | Literal["same", "valid"] = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        at_least_one("Conv2d", in_channels=in_channels, out_channels=out_channels, groups=groups)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"Conv2d: groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}"
            )
        if padding_mode != "zeros":
            raise ValueError(
                f"Conv2d: padding_mode={padding_mode!r} must be 'zeros'; pad the input yourself for others"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = pair(kernel_size, "kernel_size")
        self.stride, self.dilation = pair(stride, "stride"), pair(dilation, "dilation")
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f"Conv2d: padding={padding!r} must be 'same', 'valid' or numbers")
            if padding == "same" and self.stride != (1, 1):
                raise ValueError(f"Conv2d: padding='same' needs stride 1, not {self.stride}")
        self.padding: Any = padding if isinstance(padding, str) else pair(padding, "padding", least=0)
        self.padding_mode = padding_mode
        self.weight = new_parameter((out_channels, in_channels // groups, *self.kernel_size), device, dtype)
        self.bias = new_parameter((out_channels,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(init.fans(self.weight)[0])
            init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) to (N, K, P, Q) or (K, P, Q)."""
        window = self.stride, self.padding, self.dilation, self.groups
        return conv2d(x, self.weight, self.bias, *window, statistics=self.training)

    def extra_repr(self) -> str:
        """As PyTorch's: sizes, then what is not the default."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != (0, 0):
            text += f", padding={self.padding!r}" if isinstance(self.padding, tuple) else f", padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        return text if self.bias is not None else text + ", bias=False"
