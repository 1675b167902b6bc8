"""What convolutions and pooling share: the checks of a window's parameters, and images outside of batches."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..engine import Function, Tensor
from .move import kind
from .shape import reshape

Pair = tuple[int, int]


def out_hw(hw: tuple[int, ...], rs: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """(P, Q), how many windows of (R, S) an image of (H, W) has along its axes."""
    axes = zip(hw, rs, stride, padding, dilation, strict=True)
    p, q = ((n + 2 * a - d * (taps - 1) - 1) // u + 1 for n, taps, u, a, d in axes)
    return p, q


def pair(value: Any, name: str, least: int = 1) -> Pair:
    """An int or a pair of ints as a pair; ValueError naming the parameter for anything else."""
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(both) == 1:
        both *= 2
    if len(both) != 2 or not all(
        isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= least for n in both
    ):
        raise ValueError(f"{name}={value!r} must be an int or a pair of ints, each at least {least}")
    return int(both[0]), int(both[1])


def batched(op: type[Function], x: Tensor, params: dict) -> Tensor:
    """`op` on (N, C, H, W), or on (C, H, W) as a batch of one."""
    if x.ndim == 4:
        return op.apply(x, **params)
    y = op.apply(reshape(x, 1, *x.shape), **params)
    return reshape(y, y.shape[1:])


def window(name: str, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Pair, ceil_mode: bool) -> dict:
    """The parameters that max and average share, as their kernels take them. ValueError names sizes that do not fit."""
    check_image(name, x)
    kernel, padding = pair(kernel, "kernel_size"), pair(padding, "padding", least=0)
    stride = kernel if stride is None or stride == () else pair(stride, "stride")
    for n, taps, u, a, d in zip(x.shape[-2:], kernel, stride, padding, dilation, strict=True):
        if a > taps // 2:
            raise ValueError(f"{name}: padding {a} is more than half of kernel_size {taps}")
        if n + 2 * a + (u - 1) * ceil_mode < d * (taps - 1) + 1:
            raise ValueError(f"{name}: {taps} taps with dilation {d} do not fit into {n} pixels padded by {a}")
    return dict(kernel=kernel, stride=stride, padding=padding, ceil_mode=bool(ceil_mode))


def check_image(name: str, x: Tensor) -> None:
    """ValueError unless `x` is an image or a batch of images with pixels and channels (the batch may be empty)."""
    if x.ndim not in (3, 4) or 0 in x.shape[-3:]:
        raise ValueError(f"{name}: input must be (N, C, H, W) or (C, H, W) with at least one pixel, not {x.shape}")


def check_floating(name: str, x: Tensor) -> None:
    """TypeError unless `x` holds real or complex floating numbers."""
    if kind(x.dtype) < 2:
        raise TypeError(f"{name} needs a floating dtype, not {x.dtype}: convert it with .float()")
