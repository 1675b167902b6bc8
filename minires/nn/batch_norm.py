"""Batch normalisation as a module; the formula is in ops/batch_norm.py.

    running <- (1 - momentum) * running + momentum * (mean of the batch, unbiased variance of the batch)

In training the batch's own statistics normalise; in evaluation the running ones do.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from ..dispatch import call_noted
from ..engine import Tensor
from ..ops.batch_norm import batch_norm
from ..ops.fused import bn_add_relu, bn_relu
from . import init
from .module import Module, Parameter
from .parameters import at_least_one, new_parameter, new_tensor


class _BatchNorm(Module):
    """What BatchNorm1d and BatchNorm2d share: all but the shapes.

    momentum: the weight of the newest batch in the running statistics; None for the plain mean of all batches.
    affine: whether there are weight and bias, (C,) each; bias=False: weight alone. track_running_stats: without it
    there are no running statistics, and evaluation normalises with the batch's own.
    """

    weight: Parameter | None
    bias: Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    _optional_keys = ("num_batches_tracked",)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ):
        super().__init__()
        at_least_one(type(self).__name__, num_features=num_features)
        if not eps >= 0:
            raise ValueError(f"{type(self).__name__}: eps={eps} must be at least 0")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        shape = (num_features,)
        self.weight = new_parameter(shape, device, dtype) if affine else None
        self.bias = new_parameter(shape, device, dtype) if affine and bias else None
        tracked = track_running_stats
        self.register_buffer("running_mean", new_tensor(shape, device, dtype) if tracked else None)
        self.register_buffer("running_var", new_tensor(shape, device, dtype) if tracked else None)
        self.register_buffer("num_batches_tracked", new_tensor((), device, np.int64) if tracked else None)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batches seen."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            init.zeros_(self.running_mean)
            init.ones_(self.running_var)
            init.zeros_(self.num_batches_tracked)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, and running statistics as new."""
        self.reset_running_stats()
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def settings(self) -> dict[str, Any]:
        """The arguments of the ops beside the input; counts the batch."""
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            batches: Any = self.num_batches_tracked.array
            call_noted(operator.iadd, batches, 1)
            self.num_batches_tracked.version[0] += 1
            if self.momentum is None:
                momentum = 1.0 / float(batches)
        return {
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "weight": self.weight,
            "bias": self.bias,
            "training": self.training or self.running_mean is None,
            "momentum": momentum,
            "eps": self.eps,
        }

    def extra_repr(self) -> str:
        """As PyTorch's."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        )

    def _check(self, x: Tensor, *ndims: int) -> None:
        if x.ndim not in ndims or x.shape[1] != self.num_features:
            shape = {(4,): "(N, C, H, W)", (2, 3): "(N, C) or (N, C, L)"}[ndims]
            raise ValueError(f"{type(self).__name__}({self.num_features}): input has shape {x.shape}, not {shape}")


class BatchNorm2d(_BatchNorm):
    """Normalise every channel of (N, C, H, W) over N, H and W, then scale by weight and shift by bias."""

    def forward(self, x: Tensor, add: Tensor | None = None, relu: bool = False) -> Tensor:
        """bn(x); with `add` bn(x) + add; with `relu` max(. , 0) of it, in one pass over memory.

        `bn(x, add=skip, relu=True)` is the fused form of `relu(bn(x) + skip)` and equal to it. add: like x.
        """
        self._check(x, 4)
        settings = self.settings()
        if not relu:
            y = batch_norm(x, **settings)
            return y if add is None else y + add
        return bn_relu(x, **settings) if add is None else bn_add_relu(x, add, **settings)


class BatchNorm1d(_BatchNorm):
    """Normalise every channel of (N, C) or (N, C, L) over N and L, then scale by weight and shift by bias."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        self._check(x, 2, 3)
        return batch_norm(x, **self.settings())
