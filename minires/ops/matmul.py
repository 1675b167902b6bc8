"""Matrix products.

    matmul   y = a b           da = dy b^T       db = a^T dy      (over the last two axes; others broadcast)
    linear   y = x w^T + b     dx = dy w         dw = dy^T x      db = sum of dy over rows

matmul: a (..., M, K), b (..., K, N), y (..., M, N); a vector a stands for (1, K) and a vector b for (K, 1), and that
axis is gone from y. A gradient is summed over the axes along which its input was broadcast.
linear: x (..., I), w (O, I), b (O,), y (..., O); all axes of x but the last are rows of one matrix.

Saved for backward: both factors, each only where the other one's gradient is needed.
"""

from __future__ import annotations

import math
from typing import Any

from ..autocast import autocasts
from ..dispatch import run
from ..engine import Function, Tensor
from .layout import sum_axes, unbroadcast


class MatMul(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a if ctx.needs_grad[1] else None, b if ctx.needs_grad[0] else None)
        return (a @ b).astype(a.dtype, copy=False)  # of bfloat16 NumPy makes float32

    @staticmethod
    def backward(ctx, dy):
        a, b = ctx.saved_for_backward
        dtype = dy.dtype
        a_shape, b_shape = ctx.input_shapes
        if len(b_shape) == 1:  # the axes of size 1 that are gone from y
            dy = dy[..., None]
        if len(a_shape) == 1:
            dy = dy[..., None, :]
        da = _shaped(dy @ _matrix(b, column=True).swapaxes(-1, -2), a_shape, -2) if ctx.needs_grad[0] else None
        db = _shaped(_matrix(a, column=False).swapaxes(-1, -2) @ dy, b_shape, -1) if ctx.needs_grad[1] else None
        return tuple(None if d is None else d.astype(dtype, copy=False) for d in (da, db))


def _matrix(a: Any, *, column: bool) -> Any:
    """A vector as the matrix that it stands for."""
    if a.ndim > 1:
        return a
    return a[:, None] if column else a[None, :]


def _shaped(grad: Any, shape: tuple[int, ...], axis: int) -> Any:
    """The gradient of a factor: without the axis that made a vector a matrix, and summed over broadcast axes."""
    return unbroadcast(grad.squeeze(axis) if len(shape) == 1 else grad, shape)


class Linear(Function):
    fresh = True

    @staticmethod
    def forward(ctx, x, w, b):
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        ctx.save_for_backward(rows if ctx.needs_grad[1] else None, w if ctx.needs_grad[0] else None)
        return run("linear_fprop", rows, w, b).reshape(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx, dy):
        rows, w = ctx.saved_for_backward
        x_shape = ctx.input_shapes[0]
        dy = dy.reshape(math.prod(x_shape[:-1]), dy.shape[-1])
        dx = run("linear_dgrad", dy, w).reshape(x_shape) if ctx.needs_grad[0] else None
        dw = run("linear_wgrad", rows, dy) if ctx.needs_grad[1] else None
        db = sum_axes(dy, 0) if ctx.needs_grad[2] else None
        return dx, dw, db


@autocasts
def matmul(input: Tensor, other: Tensor) -> Tensor:
    """The matrix product of `input` (..., M, K) or (K,) and `other` (..., K, N) or (K,); see the page's head.

    ValueError names shapes that do not fit, TypeError dtypes that differ.
    """
    if not input.ndim or not other.ndim:
        raise ValueError(f"matmul needs at least one axis, not {input.shape} and {other.shape}: use * for numbers")
    k = other.shape[0] if other.ndim == 1 else other.shape[-2]
    if input.shape[-1] != k:
        raise ValueError(f"matmul: {input.shape} has rows of {input.shape[-1]}, {other.shape} columns of {k}")
    if not all(n == m or 1 in (n, m) for n, m in zip(input.shape[-3::-1], other.shape[-3::-1], strict=False)):
        raise ValueError(f"matmul: the leading axes of {input.shape} and {other.shape} do not broadcast")
    _check_dtypes("matmul", input, other)
    return MatMul.apply(input, other)


@autocasts
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input @ weight.T + bias for `input` (..., I), `weight` (O, I), `bias` (O,); returns (..., O).

    ValueError names shapes that do not fit, TypeError dtypes that differ.
    """
    if weight.ndim != 2 or not input.ndim or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: input {input.shape} must be (..., I) and weight {weight.shape} (O, I)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias has shape {bias.shape}, weight {weight.shape} needs ({weight.shape[0]},)")
    _check_dtypes("linear", input, weight, *([] if bias is None else [bias]))
    return Linear.apply(input, weight, bias)


def _check_dtypes(name: str, *tensors: Tensor) -> None:
    if len({t.dtype for t in tensors}) > 1:
        raise TypeError(f"{name}: dtypes {', '.join(str(t.dtype) for t in tensors)} differ; convert with .to(dtype)")
