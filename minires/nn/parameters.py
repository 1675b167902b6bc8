"""What layers share: making a parameter or buffer, and checking sizes."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..device import device as as_device
from ..device import to_device
from ..engine import Tensor
from .module import Parameter


def new_tensor(shape: tuple[int, ...], device: Any, dtype: Any) -> Tensor:
    """An uninitialised Tensor; device None is the CPU, dtype None float32."""
    array = np.empty(shape, np.float32 if dtype is None else dtype)
    return Tensor(to_device(array, as_device("cpu" if device is None else device)))


def new_parameter(shape: tuple[int, ...], device: Any, dtype: Any) -> Parameter:
    """An uninitialised Parameter; device None is the CPU, dtype None float32."""
    return Parameter(new_tensor(shape, device, dtype))


def at_least_one(layer: str, **sizes: Any) -> None:
    """ValueError naming the first size that is not an int of at least 1."""
    for name, value in sizes.items():
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{layer}: {name}={value!r} must be an int of at least 1")
