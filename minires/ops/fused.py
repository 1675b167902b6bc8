"""Fused ops: the same numbers as a readable line of plain ops, in fewer passes over memory.

Batch normalisation, the addition of the skip and the ReLU each read and write a whole activation; together they read
x (and the residual) and write y once. One Function does it, `BatchNorm` in batch_norm.py, where its backward is
derived. In inference batch normalisation is a part of the convolution's weights and bias (`nn.fuse_for_inference`), and
bias, skip and ReLU follow the convolution while its output is in the cache: `ConvBiasAct`, of which y is saved beside x
and w; with g = dy where y > 0 (all of dy without ReLU):

    conv_bias_act    y = relu(conv2d(x, w) + b + z)    dx = dgrad of g    dw = wgrad of g    db = sum of g    dz = g

The readable line is each function's first line, and what the tests hold it to.
"""

from __future__ import annotations

from typing import Any, Literal

from ..autocast import autocasts
from ..dispatch import run
from ..engine import Function, Tensor, state
from .activation import relu as rectified
from .arithmetic import add
from .batch_norm import batch_norm, normalise
from .conv import checked, conv2d
from .layout import sum_axes
from .windows import Pair, out_hw


class ConvBiasAct(Function):
    @staticmethod
    def forward(ctx, x, w, b, z, *, activate: bool, **geometry: Any):
        y = run("conv2d_bias_act", x, w, b, z, **geometry, relu=activate)
        ctx.save_for_backward(x, w, y if activate else None)
        return y

    @staticmethod
    def backward(ctx, dy):
        (x, w, y), geometry = ctx.saved_for_backward, dict(ctx.params)
        g = run("relu_bwd", dy, y) if geometry.pop("activate") else dy
        dw = run("conv2d_wgrad", x, g, **geometry, kernel_hw=w.shape[2:]) if ctx.needs_grad[1] else None
        dx = run("conv2d_dgrad", g, w, **geometry, input_hw=x.shape[2:]) if ctx.needs_grad[0] else None
        return dx, dw, sum_axes(g, (0, 2, 3)) if ctx.needs_grad[2] else None, g if ctx.needs_grad[3] else None


@autocasts
def conv_bias_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | Literal["same", "valid"] = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    relu: bool = True,
) -> Tensor:
    """`relu(add(conv2d(input, weight, bias, stride, padding, dilation, groups), residual))`

    residual: None, or what is added. relu=False leaves the ReLU out. Shapes and errors are those of `conv2d`, for
    batches (N, C, H, W). A residual of another shape than the result (broadcast) or dtype takes that line.
    """
    x, geometry = checked(input, weight, bias, stride, padding, dilation, groups)
    like = residual is None or (residual.dtype == x.dtype and residual.shape == _output_shape(x, weight, **geometry))
    if state.fuse and like:
        return ConvBiasAct.apply(x, weight, bias, residual, activate=relu, **geometry)
    y = conv2d(input, weight, bias, stride, padding, dilation, groups)
    y = y if residual is None else add(y, residual)
    return rectified(y) if relu else y


def _output_shape(x: Tensor, w: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> tuple[int, ...]:
    return x.shape[0], w.shape[0], *out_hw(x.shape[2:], w.shape[2:], stride, padding, dilation)


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
        return rectified(batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps))
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
        return rectified(add(batch_norm(input, *statistics), residual))
    return normalise(input, residual, *statistics, relu=True)
