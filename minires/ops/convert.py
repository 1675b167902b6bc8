"""Out of the Tensor and back: dtypes, devices, NumPy, Python numbers, text. Attached to Tensor by tensor.py."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..device import CPU, Device, is_cuda_array, to_device
from ..engine import Function, Tensor, state
from .move import kind, to


class Clone(Function):
    """y = x in memory of its own; dx = dy."""

    @staticmethod
    def forward(ctx, x):
        return x.copy("K")

    @staticmethod
    def backward(ctx, dy):
        return dy


class Conversions:
    """`self` is a Tensor throughout."""

    def to(self: Any, *args: Any, device: Any = None, dtype: Any = None, non_blocking: builtins.bool = False) -> Any:
        """On another device and/or of another dtype: `to("cuda")`, `to(float64)`, `to("cpu", float32)`, `to(other)`.

        The tensor itself where nothing changes. Gradients come back to the device and dtype they belong to.
        non_blocking is accepted for PyTorch's sake.
        """
        for arg in args:
            if isinstance(arg, Tensor):
                device, dtype = arg.device, arg.dtype
            elif isinstance(arg, (str, Device)):
                device = arg
            elif not isinstance(arg, builtins.bool):
                dtype = arg
        return to(self, device, dtype)

    def cpu(self: Any) -> Any:
        """On the CPU."""
        return to(self, CPU)

    def cuda(self: Any, index: builtins.int = 0) -> Any:
        """On the GPU of that index."""
        return to(self, Device("cuda", index))

    def double(self: Any) -> Any:
        """As float64."""
        return to(self, dtype=np.float64)

    def half(self: Any) -> Any:
        """As float16."""
        return to(self, dtype=np.float16)

    def long(self: Any) -> Any:
        """As int64."""
        return to(self, dtype=np.int64)

    def float(self: Any) -> Any:
        """As float32."""
        return to(self, dtype=np.float32)

    def int(self: Any) -> Any:
        """As int32."""
        return to(self, dtype=np.int32)

    def bool(self: Any) -> Any:
        """As bool: whether an element is not zero."""
        return to(self, dtype=np.bool_)

    def clone(self: Any) -> Any:
        """A copy in memory of its own; gradients flow through."""
        return Clone.apply(self)

    def contiguous(self: Any) -> Any:
        """The tensor itself: memory order is the kernels' own matter here, and `view` works with any."""
        return self

    def numpy(self: Any) -> np.ndarray:
        """The NumPy array itself, not a copy, also of a tensor that requires gradients. TypeError on a GPU."""
        if is_cuda_array(self.array):
            raise TypeError(f"a tensor on {self.device} has no NumPy array: use .cpu().numpy()")
        state.reads += 1
        return self.array

    def __array__(self: Any, dtype: Any = None, copy: builtins.bool | None = None) -> np.ndarray:
        return np.array(self.numpy(), dtype, copy=copy)

    def item(self: Any) -> Any:
        """The one element as a Python number. ValueError where there are more or none."""
        if self.array.size != 1:
            raise ValueError(f"item() needs a tensor of one element, not of shape {self.shape}: use tolist()")
        state.reads += 1
        value = self.array.item()
        return value if isinstance(value, (builtins.int, builtins.float, complex)) else builtins.float(value)

    def tolist(self: Any) -> Any:
        """The elements as Python numbers, in nested lists."""
        state.reads += 1
        return to_device(self.array, CPU).tolist()

    def __float__(self: Any) -> builtins.float:
        return builtins.float(self.item())

    def __int__(self: Any) -> builtins.int:
        return builtins.int(self.item())

    def __bool__(self: Any) -> builtins.bool:
        if self.array.size != 1:
            raise ValueError(f"a tensor of shape {self.shape} has no single truth value: use .any() or .all()")
        return builtins.bool(self.item())

    def __index__(self: Any) -> builtins.int:
        if kind(self.dtype) > 1:
            raise TypeError(f"only an integer tensor can be an index, not {self.dtype}")
        return builtins.int(self.item())

    def __format__(self: Any, spec: str) -> str:
        return format(self.item(), spec) if spec and self.ndim == 0 else format(repr(self), spec)

    def __len__(self: Any) -> builtins.int:
        if not self.ndim:
            raise TypeError("a tensor without axes has no len()")
        return self.shape[0]

    def __iter__(self: Any) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __repr__(self: Any) -> str:
        values = np.array2string(to_device(self.array, CPU), separator=", ", prefix="tensor(", precision=4)
        notes = [] if self.dtype in (np.float32, np.int64, np.bool_) else [f"dtype={self.dtype}"]
        notes += [] if self.device == CPU else [f"device={self.device}"]
        notes += [f"op={self.node.name}"] if self.node else ["requires_grad=True"] if self.requires_grad else []
        return f"tensor({', '.join([values, *notes])})"
