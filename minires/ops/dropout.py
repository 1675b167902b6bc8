"""Dropout: in training each element is zeroed with probability p and the others are scaled, so that the mean stays.

    y = x * m / (1 - p)      dx = dy * m / (1 - p)      m is 1 with probability 1 - p, else 0

Saved for backward: m, a byte per element. Its numbers follow from a key that the default generator draws for each call
(minires.manual_seed): a CUDA graph is fed with a new one at each replay, and drops what a step without it would.

Source: Srivastava et al. 2014, Journal of Machine Learning Research 15.
"""

from __future__ import annotations

from typing import Any

from ..cuda import fed_numbers
from ..dispatch import run
from ..engine import Function, Tensor
from .layout import Layout


class Dropout(Function):
    @staticmethod
    def forward(ctx, x, *, p: float):
        layout = Layout.of(x)
        mask = layout.view(run("dropout_mask", fed_numbers(2, x), n=x.size, p=float(p)).reshape(layout.memory_shape()))
        ctx.save_for_backward(mask)
        return x * _scaled(mask, p, x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (mask,) = ctx.saved_for_backward
        return dy * _scaled(mask, ctx.params["p"], dy.dtype)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`input` with each element zeroed with probability `p` in training; `input` itself otherwise.

    inplace is accepted for PyTorch's sake and changes nothing. ValueError where p is not a probability.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p={p} must be a probability, from 0 to 1")
    return Dropout.apply(input, p=p) if training and p > 0 else input


def _scaled(mask: Any, p: float, dtype: Any) -> Any:
    return mask.astype(dtype) * dtype.type(1 / (1 - p) if p < 1 else 0)
