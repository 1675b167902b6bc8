"""Runs launches on a GPU through CuPy. Nothing else in kernels/ imports it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import numpy as np

from ..registry import Kernel
from . import compile as compiler
from .launch import SHARED_STATIC, Function, Launch, by_value, is_array
from .tensor_map import TensorMap, made_by_driver


def run(launch: Launch) -> None:
    """Put `launch` on the current stream of the device where its arrays lie; returns before it has run."""
    with next((a.device for a in launch.args if is_array(a)), _cupy().cuda.Device()) as device:
        kernel = _kernel(launch.function, device.id, launch.shared)
        args = tuple(a if is_array(a) else _scalar(by_value(a)) for a in launch.args)
        kernel(launch.grid, launch.block, args, shared_mem=launch.shared)


def choose_arch(function: Function, number: int) -> str:
    """The best of the function's archs for a device of compute capability `number` (86 for 8.6).

    Machine code runs on its own major version, of this or a later minor one; code of "sm_90a" on 9.0 alone.
    """
    exact = [arch for arch in function.archs if arch == f"sm_{number}a"]
    plain = [int(arch[3:]) for arch in function.archs if arch[3:].isdigit()]
    fitting = [n for n in plain if n // 10 == number // 10 and n <= number]
    if exact or fitting:
        return exact[0] if exact else f"sm_{max(fitting)}"
    if any(n <= number for n in plain) and f"sm_{number}" in compiler.supported_archs():
        return f"sm_{number}"  # a device newer than our list: compile for it
    raise RuntimeError(
        f"{function.entry} is made for {', '.join(function.archs)}; this GPU is sm_{number}: choose another kernel"
    )


@functools.cache
def _kernel(function: Function, device: int, shared: int) -> Any:
    """The function loaded on a device, and allowed as much dynamic shared memory as it is launched with.

    RawModule takes the path for the content; in ours is the content's hash.
    """
    arch = choose_arch(function, int(_cupy().cuda.Device(device).compute_capability))
    cubin = function.cubin(arch)
    if cubin.path is None:
        raise RuntimeError("compiled CUDA kernels are loaded from the cache: set MINIRES_CACHE to a folder to write in")
    kernel = _cupy().RawModule(path=str(cubin.path)).get_function(function.entry)
    if shared + cubin.usage[function.entry].shared > SHARED_STATIC:
        kernel.max_dynamic_shared_size_bytes = shared
    return kernel


def from_host(kernel: Kernel) -> Kernel:
    """The kernel for NumPy arrays: it moves them to the GPU, in the layout that they have, and its outputs back."""

    @functools.wraps(kernel.fn)
    def moved(*arrays: Any, **params: Any) -> Any:
        roots = {id(root): (root, _cupy().asarray(root)) for a in arrays if a is not None for root in [_root(a)]}
        there = [None if a is None else _view(a, *roots[id(_root(a))]) for a in arrays]
        result = kernel.fn(*there, **params)
        for root, memory in roots.values() if kernel.problem.writes else ():
            root[...] = memory.get()
        back = tuple(None if y is None else y.get() for y in (result if isinstance(result, tuple) else (result,)))
        return back if isinstance(result, tuple) else back[0]

    return dataclasses.replace(kernel, fn=moved)


def _root(a: np.ndarray) -> np.ndarray:
    """The array that owns the memory."""
    while isinstance(a.base, np.ndarray):
        a = a.base
    return a


def _view(a: np.ndarray, root: np.ndarray, memory: Any) -> Any:
    """What `a` is to its root, in the root's copy on the GPU."""
    offset = a.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    return _cupy().ndarray(a.shape, a.dtype, memory.data + offset, a.strides)


def _scalar(value: Any) -> Any:
    """A NumPy scalar, or a 0-d structured array or tensor map as the 1-element array that CuPy passes by value."""
    if isinstance(value, TensorMap):
        return made_by_driver(value)
    return np.asarray(value).reshape(1) if np.asarray(value).dtype.kind == "V" else value


def _cupy() -> Any:
    return importlib.import_module("cupy")
