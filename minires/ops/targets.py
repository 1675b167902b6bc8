"""What the losses share: class targets and their weights, and the reduction of a loss per row to one number.

none   y = l            dl = dy
sum    y = sum l        dl = dy for every row
mean   y = sum l / d    dl = dy / d for every row      d = sum of the rows' weights, or the number of rows
"""

from __future__ import annotations

import math
from typing import Any, cast

from ..cuda import is_current_stream_capturing
from ..device import namespace_of
from ..engine import Tensor
from .move import kind, to

REDUCTIONS = ("none", "mean", "sum")


def reduced(loss: Any, reduction: str, divisor: float) -> Any:
    """The loss of each row reduced; a mean over nothing is NaN, as in PyTorch."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / _or_nan(divisor)


def spread(dy: Any, shape: tuple[int, ...], reduction: str, divisor: float) -> Any:
    """The gradient of `reduced`: dy's share for every row, read-only."""
    if reduction == "mean":
        dy = dy / _or_nan(divisor)
    return namespace_of(dy).broadcast_to(dy, shape)


def _or_nan(divisor: Any) -> Any:
    """NaN for 0; an array, which the host may not look at, divides by 0 itself."""
    return divisor if hasattr(divisor, "shape") else divisor or math.nan


def check_reduction(name: str, reduction: str) -> None:
    """ValueError for anything but "none", "mean" and "sum"."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction={reduction!r} must be one of {', '.join(map(repr, REDUCTIONS))}")


def class_axis(x: Any) -> int:
    """The axis of the classes: (K,), (N, K) or (N, K, d1, ...)."""
    return 0 if x.ndim == 1 else 1


def class_targets(
    name: str, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor | None, Any]:
    """(target, weights, divisor): the classes as int64, 0 for ignored rows; the weight of each row, 0 for ignored ones
    (None: all 1); and the sum of the weights, an array where a CUDA graph is captured.

    ValueError names a shape that does not fit or a number that is no class (a graph weighs its row NaN: the host may
    not look), TypeError a dtype.
    """
    check_input(name, input, weight)
    classes, t = input.shape[class_axis(input)], cast(Any, target.array)
    wanted = input.shape[:1] * (input.ndim > 1) + input.shape[2:]
    if t.dtype.kind not in "iu":
        raise TypeError(f"{name}: class targets must be integers, not {t.dtype}; convert them with .long()")
    if t.shape != wanted:
        raise ValueError(
            f"{name}: input {input.shape} needs class targets of shape {wanted}, not {t.shape} "
            "(probabilities would be floating and of the input's shape)"
        )
    ignored = t == ignore_index
    wrong = ~ignored & ((t < 0) | (t >= classes))
    if is_current_stream_capturing():
        return _unseen(t, ignored, wrong, weight, input.array.real.dtype)
    if wrong.any():
        at = [int(i[0]) for i in wrong.nonzero()]
        where = "" if not at else f" at row {at[0]}" if len(at) == 1 else f" at {tuple(at)}"
        raise ValueError(f"{name}: target {int(t[tuple(at)])}{where} is not a class: there are {classes}")
    if weight is None and not ignored.any():
        return to(target, dtype="int64"), None, t.size
    t = t.astype("int64")
    t[ignored] = 0
    weights = (~ignored).astype(input.array.real.dtype)
    if weight is not None:
        weights *= weight.array[t]
    return Tensor(t), Tensor(weights), float(weights.sum())


def _unseen(t: Any, ignored: Any, wrong: Any, weight: Tensor | None, dtype: Any) -> tuple[Tensor, Tensor, Any]:
    """`class_targets` without a look at a number."""
    xp = namespace_of(t)
    t = xp.where(ignored | wrong, 0, t).astype("int64")
    weights = xp.where(wrong, math.nan, ~ignored).astype(dtype)
    if weight is not None:
        weights *= weight.array[t]
    wide = weights.astype("float32") if dtype.itemsize == 2 else weights  # float16 counts to 2048
    return Tensor(t), Tensor(weights), wide.sum().astype(dtype)


def check_input(name: str, input: Tensor, weight: Tensor | None) -> None:
    """ValueError unless `input` has an axis of classes, with a weight for each; TypeError unless it is floating."""
    if kind(input.dtype) < 2:
        raise TypeError(f"{name}: input must be floating, not {input.dtype}; convert it with .float()")
    if not input.ndim or not input.shape[class_axis(input)]:
        raise ValueError(f"{name}: input must be (N, K), (K,) or (N, K, d1, ...) with K >= 1, not {input.shape}")
    classes = input.shape[class_axis(input)]
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"{name}: weight has shape {weight.shape}, {classes} classes need ({classes},)")
