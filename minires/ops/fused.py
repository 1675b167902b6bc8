"""Fused ops: the same numbers as a readable line of plain ops, in fewer passes over memory.

Batch normalisation, the addition of the skip and the ReLU each read and write a whole activation; together they read
x (and the residual) and write y once. One Function does it, `BatchNorm` in batch_norm.py, where its backward is
derived. The readable line is each function's first line, and what the tests hold it to.
"""

from __future__ import annotations

from ..engine import Tensor, state
from .activation import relu
from .arithmetic import add
from .batch_norm import batch_norm, normalise


def bn_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`relu(batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps))`

    Shapes and errors are those of `batch_norm`.
    """
    if not state.fuse:  # within unfused()
        return relu(batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps))
    return normalise(input, None, running_mean, running_var, weight, bias, training, momentum, eps, relu=True)


def bn_add_relu(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`relu(add(batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps), residual))`

    A residual of another shape (broadcast) or dtype takes that line; one like the input is fused.
    """
    statistics = running_mean, running_var, weight, bias, training, momentum, eps
    if not state.fuse or residual.shape != input.shape or residual.dtype != input.dtype:
        return relu(add(batch_norm(input, *statistics), residual))
    return normalise(input, residual, *statistics, relu=True)
