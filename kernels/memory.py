"""Where kernels get their outputs from, and how they read channels-last memory.

Every kernel allocates its outputs with `empty`, so that tests can poison them first (`poisoned`): an element that a
kernel forgets to write is then seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

_poison = False
_LINE = 64  # bytes; a vector that lies across two lines is loaded at half the speed
_LARGE = 1 << 10  # elements; for fewer, to find the line takes longer than it saves
_MANY = 1 << 17  # elements; fewer NumPy copies in less time than threads take to start
_BYTE = ctypes.c_char
_PATTERNS = {2: 0x7FE1, 4: 0x7FC0DEAD, 8: 0x7FF8DEAD0000DEAD}  # NaNs with a payload that no computation makes by itself
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class _Now(threading.local):
    """Where this thread's large arrays come from, if not from NumPy (cpu/pools.py)."""

    pool: Any = None


_now = _Now()
copies = 0  # how many activations had to be copied into channels-last order; 0 in a network that is all ours


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of handing it back to the system.

    A large array is otherwise new memory each time, and touching it costs a page fault every 4 KiB: a fifth of a
    training step (ResNet-20 at batch 128: 165 ms against 129, at the same peak). Other C libraries go as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


_keep_freed_memory()


def release_freed_memory() -> None:
    """Hand it back to the system, once: before a computation gets memory of its own."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def namespace(array: Any) -> Any:
    """numpy, or cupy for an array of its own; never imports CuPy to find out."""
    return sys.modules["cupy"] if type(array).__module__.partition(".")[0] == "cupy" else np


def address(array: np.ndarray) -> int:
    """Where its first number lies. (NumPy takes 3 microseconds to tell, and a training step asks for hundreds.)"""
    flags = array.flags
    if array.size and flags.c_contiguous and flags.writeable and array.dtype.kind in "fiu":
        return ctypes.addressof(_BYTE.from_buffer(array))
    return array.__array_interface__["data"][0]


def empty(shape: tuple[int, ...], dtype, like: Any = None) -> Any:
    """An uninitialised C-order array, on the device of `like`; on the CPU a large one begins at a cache line. Inside
    `poisoned()` it is full of a marked NaN, or of the least integer."""
    on_cpu = like is None or type(like) is np.ndarray or namespace(like) is np
    if on_cpu and (size := math.prod(shape)) >= _LARGE:
        nbytes = size * np.dtype(dtype).itemsize
        if _now.pool is not None:
            array = _now.pool.array(shape, dtype, nbytes)
        else:
            memory = np.empty(nbytes + _LINE, np.uint8)
            array = np.ndarray(shape, dtype, memory, -address(memory) % _LINE)
    else:
        array = (np if on_cpu else namespace(like)).empty(shape, dtype)
    if _poison:
        fill_poison(array)
    return array


@contextlib.contextmanager
def taken_from(pool: Any) -> Iterator[None]:
    """Within it, in this thread, `empty` gets large arrays from there: `pool.array(shape, dtype, nbytes)`."""
    saved, _now.pool = _now.pool, pool
    try:
        yield
    finally:
        _now.pool = saved


def is_float(dtype: np.dtype) -> bool:
    """Whether it is float16, bfloat16 (which NumPy takes for bytes), float32 or float64."""
    return (dtype.kind == "f" and dtype.itemsize in _PATTERNS) or dtype.name == "bfloat16"


def fill_poison(array: np.ndarray) -> None:
    """Overwrite every element with the mark of what was never written; arrays other than float and signed stay."""
    if is_float(array.dtype):
        array.view(f"u{array.itemsize}").fill(_PATTERNS[array.itemsize])
    elif array.dtype.kind == "i":
        array.fill(np.iinfo(array.dtype).min)


def is_poison(array: np.ndarray) -> np.ndarray:
    """Which elements still carry the mark, or were computed from one that did (a NaN hands its payload on)."""
    if is_float(array.dtype):
        bits = np.ascontiguousarray(array).view(f"u{array.itemsize}").reshape(array.shape)
        return bits & ((1 << 8 * array.itemsize - 1) - 1) == _PATTERNS[array.itemsize]
    if array.dtype.kind == "i":
        return array == np.iinfo(array.dtype).min
    return np.zeros(array.shape, bool)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within it, `empty` returns arrays full of poison."""
    global _poison
    saved, _poison = _poison, True
    try:
        yield
    finally:
        _poison = saved


def to_nhwc(x: Any) -> Any:
    """A logical NCHW array as a C-contiguous (N, H, W, C) array: a view if it lies channels-last, else one copy."""
    global copies
    view = x.transpose(0, 2, 3, 1)
    if view.flags.c_contiguous:
        return view
    copies += 1
    many = x.size >= _MANY or _now.pool is not None  # what NumPy copies cannot be run again (cpu/launches.py)
    if type(x) is np.ndarray and many and x.flags.c_contiguous and x.dtype.kind != "O":
        from .cpu.interleave import interleaved  # compiled at its first use

        return interleaved(x)
    return namespace(x).ascontiguousarray(view)


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array full of zeros, on the CPU; full of them again where compiled functions are (cpu/launches.py)."""
    array = empty(shape, dtype)
    write(array, 0)
    return array


def write(array: np.ndarray, value: Any) -> None:
    """array[...] = value, also where compiled functions are called again (cpu/launches.py)."""
    from .cpu.jit import call_noted  # which asks for memory

    call_noted(_write, array, value)


def contiguous(a: np.ndarray) -> np.ndarray:
    """The array in C order: itself, or a copy made by `write`."""
    if a.flags.c_contiguous:
        return a
    copied = empty(a.shape, a.dtype)
    write(copied, a)
    return copied


def _write(array: np.ndarray, value: Any) -> None:
    array[...] = value


def empty_nhwc(n: int, c: int, h: int, w: int, dtype, like: Any = None) -> tuple[Any, Any]:
    """A new activation, on the device of `like`: (its logical NCHW view, the (N, H, W, C) memory to write into)."""
    memory = empty((n, h, w, c), dtype, like)
    return memory.transpose(0, 3, 1, 2), memory


def order_of(a: Any) -> tuple[int, ...]:
    """The axes of `a`, from the largest stride to the least."""
    strides = a.strides
    return tuple(sorted(range(a.ndim), key=lambda axis: -abs(strides[axis])))


def from_order(memory: Any, order: tuple[int, ...]) -> Any:
    """An array whose axes are those of another, taken in that order: with its axes in their places."""
    return memory.transpose(sorted(range(len(order)), key=order.__getitem__))


def dense_order(a: Any) -> tuple[int, ...] | None:
    """The order of axes in which `a` is one run of memory; None where it has gaps or overlaps."""
    order = order_of(a)
    return order if a.transpose(order).flags.c_contiguous else None
