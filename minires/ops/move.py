"""Between devices and dtypes: `Tensor.to`, and the common dtype of two operands.

    y = x on another device and/or of another dtype          dx = dy back where and what x was

Saved for backward: nothing but x's device and dtype.

Promotion is PyTorch's: of the kinds bool < integer < floating < complex the higher one decides (int64 + float32 is
float32, where NumPy says float64); within a kind, tensors with axes decide over those without, else NumPy's rule.
A Python number never changes a tensor's dtype within its kind.
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from ..device import Device, device_of, namespace_of, to_device
from ..device import device as as_device
from ..dispatch import run
from ..engine import Function, Tensor

_DEFAULTS = tuple(np.dtype(name) for name in ("bool", "int64", "float32", "complex64"))


class Move(Function):
    @staticmethod
    def forward(ctx, x, *, device: Device, dtype: np.dtype):
        ctx.source = device_of(x), x.dtype
        return _cast(to_device(x, device), dtype)

    @staticmethod
    def backward(ctx, dy):
        device, dtype = ctx.source
        if kind(dy.dtype) > kind(dtype):  # x was real and y complex
            dy = dy.real
        return _cast(to_device(dy, device), dtype)


def _cast(x: Any, dtype: np.dtype) -> Any:
    return x if x.dtype == dtype else run("cast", x, dtype=dtype.name)


def to(input: Tensor, device: Any = None, dtype: Any = None) -> Tensor:
    """`input` on `device` and of `dtype`; the tensor itself where it is both already.

    Gradients flow through it between floating dtypes; an integer or bool result has none.
    """
    device = input.device if device is None else as_device(device)
    dtype = input.dtype if dtype is None else np.dtype(dtype)
    if device == input.device and dtype == input.dtype:
        return input
    return Move.apply(input if kind(dtype) >= 2 else input.detach(), device=device, dtype=dtype)


def kind(dtype: np.dtype) -> int:
    """0 bool, 1 integer, 2 floating (bfloat16 too, whose NumPy kind is V), 3 complex."""
    return {"b": 0, "i": 1, "u": 1, "c": 3}.get(dtype.kind, 2)


def promoted(*tensors: Tensor) -> np.dtype:
    """The dtype in which these tensors meet; see the page's head."""
    highest = max(kind(t.dtype) for t in tensors)
    deciding = [t for t in tensors if kind(t.dtype) == highest]
    deciding = [t for t in deciding if t.ndim] or deciding
    return np.result_type(*(t.dtype for t in deciding))


def operands(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Two operands, one a Tensor and the other a Tensor, an array or a number, as Tensors of one dtype.

    TypeError where neither is a Tensor or one is something else.
    """
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        raise TypeError(f"one operand must be a Tensor, not {type(a).__name__} and {type(b).__name__}: use tensor(...)")
    a, b = operand(a, b), operand(b, a)
    dtype = promoted(a, b)
    return to(a, dtype=dtype), to(b, dtype=dtype)


def operand(value: Any, like: Any) -> Tensor:
    """A Tensor, array or number as a Tensor; a number takes the dtype of the Tensor `like`, if its kind fits in."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, numbers.Number):
        needed = np.asarray(value).dtype
        dtype = like.dtype if kind(needed) <= kind(like.dtype) else _DEFAULTS[kind(needed)]
        if kind(dtype) == 3 and like.dtype == np.float64:
            dtype = np.dtype(np.complex128)
        return Tensor(namespace_of(like.array).asarray(value, dtype))
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return Tensor(value)
    raise TypeError(f"an operand must be a Tensor, an array or a number, not {type(value).__name__}")


def floating(x: Tensor) -> Tensor:
    """`x`, as float32 where it holds integers or bools: what exp or a division makes of them."""
    return x if kind(x.dtype) >= 2 else to(x, dtype=np.float32)
