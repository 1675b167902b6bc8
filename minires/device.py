"""Which array library a device means, and how arrays move. CuPy is imported here (and in kernels/cuda), lazily."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Device:
    """A device: type "cpu" or "cuda", and for cuda an index. `Device("cuda:1") == Device("cuda", 1)`."""

    type: str
    index: int | None = None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"

    def __repr__(self) -> str:
        return f"device({str(self)!r})"


CPU = Device("cpu")


def device(spec: str | Device) -> Device:
    """`device("cpu")`, `device("cuda")`, `device("cuda:1")`. ValueError names anything else."""
    if isinstance(spec, Device):
        return spec
    kind, colon, index = spec.partition(":")
    if kind == "cpu" and not colon:
        return CPU
    if kind == "cuda" and (not colon or index.isdigit()):
        return Device("cuda", int(index) if colon else 0)
    raise ValueError(f"unknown device {spec!r}: use 'cpu', 'cuda' or 'cuda:N'")


def is_cuda_array(array: Any) -> bool:
    """Whether it is a CuPy array; never imports CuPy to find out."""
    return type(array).__module__.partition(".")[0] == "cupy"


def device_of(*arrays: Any) -> Device:
    """The one device on which the arrays lie; TypeError where they lie on several."""
    devices = {Device("cuda", a.device.id) if is_cuda_array(a) else CPU for a in arrays if a is not None}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise TypeError(f"arrays lie on different devices: {names}; move them with .to(device)")
    return devices.pop() if devices else CPU


def array_module(device: Device) -> ModuleType:
    """numpy or cupy. RuntimeError says what to install where CuPy or a GPU is missing."""
    if device.type == "cpu":
        return np
    if importlib.util.find_spec("cupy") is None:
        raise RuntimeError(f"device {device} needs CuPy, which is not installed: pip install cupy-cuda13x")
    if not cuda.is_available():
        raise RuntimeError(f"device {device} needs an NVIDIA GPU with its driver, and CuPy finds none; use 'cpu'")
    return importlib.import_module("cupy")


def namespace_of(*arrays: Any) -> ModuleType:
    """The array module of the arrays: `xp.exp(x)` in code that serves both devices."""
    return sys.modules["cupy"] if device_of(*arrays).type == "cuda" else np


def to_device(array: Any, target: Device) -> Any:
    """The array on `target`: itself if it is there already, else a copy."""
    if device_of(array) == target:
        return array
    if target.type == "cpu":
        return array.get()
    with (xp := array_module(target)).cuda.Device(target.index):
        return xp.asarray(array)


class cuda:
    """`minires.cuda`, as far as it concerns whether there is one."""

    @staticmethod
    def is_available() -> bool:
        """True where CuPy is installed and finds a GPU."""
        if importlib.util.find_spec("cupy") is None:
            return False
        try:
            return importlib.import_module("cupy").cuda.runtime.getDeviceCount() > 0
        except Exception:  # cupy raises its own CUDARuntimeError, or ImportError where a CUDA library is missing
            return False
