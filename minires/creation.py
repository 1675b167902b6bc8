"""New tensors. Shapes are given as numbers or as one tuple; dtype is float32 unless the values say otherwise.

All take `dtype`, `device` ("cpu", "cuda", "cuda:N") and `requires_grad`; random ones draw from the default generator.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .device import CPU, device_of, is_cuda_array, to_device
from .device import device as as_device
from .engine import Tensor
from .ops.shape import numbers
from .random import default_generator

_FLOAT = np.dtype(np.float32)


def tensor(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """A tensor with a copy of `data`: numbers, nested lists, an array or a Tensor.

    Python floats become float32, ints int64, bools bool; arrays keep their dtype. TypeError for what is no number.
    """
    if isinstance(data, Tensor):
        data = data.array
    if is_cuda_array(data):
        array = data.copy()
    else:
        array = np.array(data)
        if array.dtype.kind not in "biufcV":
            raise TypeError(f"a tensor holds numbers, not {array.dtype} (from {type(data).__name__})")
        if not isinstance(data, (np.ndarray, np.generic)) and array.dtype.kind in "fc":
            array = array.astype(_FLOAT if array.dtype.kind == "f" else np.complex64)
    return _made(array, dtype, device_of(array) if device is None else device, requires_grad)


def as_tensor(data: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
    """`data` as a tensor, without a copy where it is a Tensor or an array of that dtype and device already."""
    if isinstance(data, Tensor):
        return data.to(device=device, dtype=dtype)
    if isinstance(data, np.ndarray) or is_cuda_array(data):
        return Tensor(data).to(device=device, dtype=dtype)
    return tensor(data, dtype=dtype, device=device)


def from_numpy(array: np.ndarray) -> Tensor:
    """A tensor that shows the memory of a NumPy array: a write to one is seen in the other.

    Backward does not notice what is written into the array itself, or through a second tensor of it: of what an op has
    saved, only writes through the tensor that the op was given are counted.
    """
    if not isinstance(array, np.ndarray):
        raise TypeError(f"from_numpy needs a NumPy array, not {type(array).__name__}: use tensor(...)")
    return Tensor(array)


def full(size: Any, fill_value: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Filled with `fill_value`, whose kind (bool, int, float) decides the dtype where none is given."""
    return _made(np.full(size, fill_value, dtype or tensor(fill_value).dtype), None, device, requires_grad)


def zeros(*size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Filled with 0."""
    return _made(np.zeros(_sizes(size), dtype or _FLOAT), None, device, requires_grad)


def ones(*size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Filled with 1."""
    return _made(np.ones(_sizes(size), dtype or _FLOAT), None, device, requires_grad)


def empty(*size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Not filled: whatever the memory held."""
    return _made(np.empty(_sizes(size), dtype or _FLOAT), None, device, requires_grad)


def randn(*size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Drawn from the normal distribution with mean 0 and variance 1."""
    values = default_generator.standard_normal(_sizes(size), _drawn(dtype))
    return _made(values, dtype, device, requires_grad)


def rand(*size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Drawn evenly from [0, 1)."""
    return _made(default_generator.random(_sizes(size), _drawn(dtype)), dtype, device, requires_grad)


def randint(low: int, high: Any, size: Any = None, *, dtype: Any = None, device: Any = None) -> Tensor:
    """Integers (int64) drawn evenly from low, ..., high - 1; `randint(high, size)` draws from 0."""
    if size is None:
        low, high, size = 0, low, high
    return _made(default_generator.integers(low, high, size), dtype, device, False)


def randperm(n: int, *, dtype: Any = None, device: Any = None) -> Tensor:
    """The integers 0, ..., n - 1 (int64) in random order."""
    return _made(default_generator.permutation(n), dtype, device, False)


def arange(
    start: Any, end: Any = None, step: Any = 1, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """start, start + step, ... before `end`; `arange(end)` starts at 0. int64 if all are integers, else float32."""
    if end is None:
        start, end = 0, start
    values = np.arange(start, end, step)
    return _made(values, dtype or (_FLOAT if values.dtype.kind == "f" else np.int64), device, requires_grad)


def linspace(
    start: float, end: float, steps: int, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """`steps` numbers at equal distances from `start` to `end`, both included."""
    return _made(np.linspace(start, end, steps), dtype or _FLOAT, device, requires_grad)


def eye(n: int, m: int | None = None, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """The n x m matrix (n x n) with 1 on its diagonal."""
    return _made(np.eye(n, m, dtype=dtype or _FLOAT), None, device, requires_grad)


def zeros_like(input: Tensor, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Zeros of the shape, memory order, dtype and device of `input`."""
    return full_like(input, 0, dtype=dtype, device=device, requires_grad=requires_grad)


def ones_like(input: Tensor, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Ones of the shape, memory order, dtype and device of `input`."""
    return full_like(input, 1, dtype=dtype, device=device, requires_grad=requires_grad)


def full_like(
    input: Tensor, fill_value: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """`fill_value` in the shape, memory order, dtype and device of `input`."""
    array = np.full_like(input.array, fill_value, dtype or input.dtype)
    return _made(array, None, input.device if device is None else device, requires_grad)


def randn_like(input: Tensor, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """`randn` in the shape, dtype and device of `input`."""
    device = input.device if device is None else device
    return randn(input.shape, dtype=dtype or input.dtype, device=device, requires_grad=requires_grad)


def _drawn(dtype: Any) -> Any:
    """The dtype in which to draw: NumPy draws float32 and float64."""
    return np.float64 if dtype is not None and np.dtype(dtype) == np.float64 else np.float32


def _sizes(size: tuple) -> tuple[int, ...]:
    """`f(2, 3)` and `f((2, 3))` alike; ValueError for a negative size."""
    sizes = numbers(size)
    if any(n < 0 for n in sizes):
        raise ValueError(f"size {tuple(sizes)} has a negative number: sizes count from 0")
    return sizes


def _made(array: Any, dtype: Any, device: Any, requires_grad: bool) -> Tensor:
    if dtype is not None:
        array = array.astype(dtype, copy=False)
    return Tensor(to_device(array, CPU if device is None else as_device(device)), requires_grad)
