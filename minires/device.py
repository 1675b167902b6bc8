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
    for a in arrays:
        if a is not None and type(a) is not np.ndarray:
            break
    else:  # nearly always, and asked before every kernel
        return CPU
    devices = {Device("cuda", a.device.id) if is_cuda_array(a) else CPU for a in arrays if a is not None}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise TypeError(f"arrays lie on different devices: {names}; move them with .to(device)")
    return devices.pop() if devices else CPU


def array_module(device: Device) -> ModuleType:
    """numpy or cupy. RuntimeError says what is missing for a GPU, and what to do about it."""
    if device.type == "cpu":
        return np
    if importlib.util.find_spec("cupy") is None:
        raise RuntimeError(f"device {device} needs CuPy, which is not installed: pip install 'minires[cuda]'")
    cupy, missing = _cupy()
    if missing:
        raise RuntimeError(f"device {device} needs {missing}")
    count = cupy.cuda.runtime.getDeviceCount()
    if device.index is not None and device.index >= count:
        raise RuntimeError(f"device {device} needs more GPUs than the {count} that there are: use 'cuda:{count - 1}'")
    return cupy


def _cupy() -> tuple[Any, str]:
    """CuPy, which is installed, and what it lacks to use a GPU, with the remedy: "" where nothing is missing."""
    try:
        cupy = importlib.import_module("cupy")
        count = cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        return None, f"CuPy, which cannot be imported ({_first_line(error)}): pip install 'minires[cuda]'"
    except Exception as error:  # CUDARuntimeError, which exists only in CuPy
        return None, f"an NVIDIA GPU with its driver, and CuPy finds none ({_first_line(error)}); use 'cpu'"
    if not count:
        return None, "an NVIDIA GPU with its driver, and CuPy finds none; use 'cpu'"
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # DynamicLibNotFoundError, or what the loader raises
        return None, f"NVRTC to compile its kernels ({type(error).__name__}): pip install 'minires[cuda]'"
    return cupy, ""


def cuda_is_available() -> bool:
    """Whether CuPy is installed, finds a GPU, and can compile for it: `minires.cuda.is_available()`."""
    return importlib.util.find_spec("cupy") is not None and not _cupy()[1]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def namespace_of(*arrays: Any) -> ModuleType:
    """The array module of the arrays: `xp.exp(x)` in code that serves both devices."""
    return sys.modules["cupy"] if device_of(*arrays).type == "cuda" else np


def to_device(array: Any, target: Device) -> Any:
    """The array on `target`: itself if it is there already, else a copy."""
    if device_of(array) == target:
        return array
    if target.type == "cpu":
        return array.get()
    order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])  # CuPy keeps no other than C and F order
    with (xp := array_module(target)).cuda.Device(target.index):
        return xp.asarray(array.transpose(order)).transpose(sorted(range(array.ndim), key=order.__getitem__))


def synchronize(*arrays: Any) -> None:
    """Wait until the device of the arrays has done what it was given; nothing to wait for on the CPU."""
    if (where := device_of(*arrays)).type == "cuda":
        sys.modules["cupy"].cuda.Device(where.index).synchronize()
