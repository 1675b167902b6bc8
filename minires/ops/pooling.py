"""Pooling over windows of an image: the greatest number, or the average.

    max_pool2d            y = max over the window                dx = dy at the first pixel that was the maximum
    avg_pool2d            y = sum over the window / d            dx = sum of dy / d over the windows that saw a pixel
    adaptive_avg_pool2d   y = A_h x A_w^T per channel            dx = A_h^T dy A_w

x (N, C, H, W), y (N, C, P, Q). P = (H + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1, rounded down, or with
`ceil_mode` up (but no window starts beyond the image and its left padding). d is the number of taps within the padded
image, or within the image alone without `count_include_pad`, or `divisor_override`. Row i of A_h (P, H) averages the
rows from floor(i H / P) up to ceil((i + 1) H / P); where H divides by P this is a plain average pooling.

Saved for backward: max the index of each maximum, the averages nothing: they are linear.
"""

from __future__ import annotations

from typing import Any

from ..device import namespace_of
from ..dispatch import run
from ..engine import Function, Tensor
from .move import kind
from .windows import Pair, batched, check_floating, check_image, pair, window


class MaxPool2d(Function):
    @staticmethod
    def forward(ctx, x, **window: Any):
        y, indices = run("maxpool2d_fprop", x, **window)
        ctx.save_for_backward(indices)
        return y

    @staticmethod
    def backward(ctx, dy):
        (indices,) = ctx.saved_for_backward
        return run("maxpool2d_bwd", dy, indices, **ctx.params, input_hw=ctx.input_shapes[0][2:])


class AvgPool2d(Function):
    @staticmethod
    def forward(ctx, x, *, divisor: int | None, **window: Any):
        y = run("avgpool2d_fprop", x, **window)
        if divisor is not None:  # back to sums, by the number of taps of each window
            rows, cols = _taps(x.shape[2:], y.shape[2:], window, namespace_of(x))
            ctx.factor = (rows[:, None] * cols / divisor).astype(x.dtype)
            y = y * ctx.factor
        return y

    @staticmethod
    def backward(ctx, dy):
        window = dict(ctx.params)
        if window.pop("divisor") is not None:
            dy = dy * ctx.factor
        return run("avgpool2d_bwd", dy, **window, input_hw=ctx.input_shapes[0][2:])


def _taps(hw: Pair, pq: Pair, window: dict, xp: Any) -> tuple[Any, Any]:
    """Per axis, how many taps of each window lie within the padded image: all, but for the last with `ceil_mode`."""
    axes = zip(hw, pq, window["kernel"], window["stride"], window["padding"], strict=True)
    rows, cols = (xp.minimum(taps, n + 2 * a - xp.arange(size) * u) for n, size, taps, u, a in axes)
    return rows, cols


class AdaptiveAvgPool2d(Function):
    @staticmethod
    def forward(ctx, x, *, size: Pair):
        a_h, a_w = (_averages(n, m, x) for n, m in zip(x.shape[2:], size, strict=True))
        return _both_axes(a_h, x, a_w)

    @staticmethod
    def backward(ctx, dy):
        a_h, a_w = (_averages(n, m, dy) for n, m in zip(ctx.input_shapes[0][2:], dy.shape[2:], strict=True))
        return _both_axes(a_h.T, dy, a_w.T)


def _averages(n: int, size: int, like: Any) -> Any:
    """The matrix (size, n) whose row i averages its share of n pixels."""
    xp = namespace_of(like)
    i, pixel = xp.arange(size)[:, None], xp.arange(n)
    inside = (pixel >= i * n // size) & (pixel < -(-(i + 1) * n // size))
    return (inside / inside.sum(1, keepdims=True)).astype(like.dtype)


def _both_axes(a_h: Any, x: Any, a_w: Any) -> Any:
    """a_h x a_w^T for every image and channel, kept channels-last."""
    n, c, h, _ = x.shape
    x = a_w @ x.transpose(0, 2, 3, 1)  # (Q, W) (N, H, W, C) -> (N, H, Q, C)
    y = (a_h @ x.reshape(n, h, a_w.shape[0] * c)).astype(a_h.dtype, copy=False)  # (P, H) (N, H, QC) -> (N, P, QC)
    return y.reshape(n, a_h.shape[0], a_w.shape[0], c).transpose(0, 3, 1, 2)


def max_pool2d(
    input: Tensor,
    kernel_size: int | Pair,
    stride: int | Pair | None = None,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The maximum of each window of `input` (N, C, H, W) or (C, H, W); stride None means kernel_size.

    A NaN in a window is its maximum. Padding counts as -inf and may be at most half the kernel. ValueError names sizes
    that do not fit, TypeError a dtype without order.
    """
    if kind(input.dtype) != 2:
        raise TypeError(f"max_pool2d needs a real floating dtype, not {input.dtype}: convert it with .float()")
    dilation = pair(dilation, "dilation")
    shape = window("max_pool2d", input, kernel_size, stride, padding, dilation, ceil_mode)
    return batched(MaxPool2d, input, dict(shape, dilation=dilation))


def avg_pool2d(
    input: Tensor,
    kernel_size: int | Pair,
    stride: int | Pair | None = None,
    padding: int | Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The average of each window of `input` (N, C, H, W) or (C, H, W); stride None means kernel_size.

    count_include_pad: whether the zeros of the padding count. divisor_override: divide each sum by this instead.
    Errors as in `max_pool2d`.
    """
    check_floating("avg_pool2d", input)
    if divisor_override == 0:
        raise ValueError("avg_pool2d: divisor_override must not be 0")
    shape = window("avg_pool2d", input, kernel_size, stride, padding, (1, 1), ceil_mode)
    include = count_include_pad or divisor_override is not None
    return batched(AvgPool2d, input, dict(shape, count_include_pad=include, divisor=divisor_override))


def adaptive_avg_pool2d(input: Tensor, output_size: int | tuple[int | None, int | None] | None) -> Tensor:
    """`input` (N, C, H, W) or (C, H, W) averaged down (or repeated up) to `output_size` (P, Q); None keeps a size.

    (1, 1) is the average of the whole image. ValueError names sizes that do not fit.
    """
    check_floating("adaptive_avg_pool2d", input)
    check_image("adaptive_avg_pool2d", input)
    hw = input.shape[-2:]
    both = tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size,) * 2
    size = pair(tuple(hw[i] if m is None and i < 2 else m for i, m in enumerate(both)), "output_size")
    if any(n % m for n, m in zip(hw, size, strict=True)):
        return batched(AdaptiveAvgPool2d, input, dict(size=size))
    return avg_pool2d(input, (hw[0] // size[0], hw[1] // size[1]))
