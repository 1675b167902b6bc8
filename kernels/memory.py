"""Where kernels get their outputs from, and how they read channels-last memory.

Every kernel allocates its outputs with `empty`, so that tests can poison them first (`poisoned`): an element that a
kernel forgets to write is then seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from collections.abc import Iterator

import numpy as np

_poison = False
_LINE = 64  # bytes; a vector that lies across two lines is loaded at half the speed
_PATTERNS = {4: 0x7FC0DEAD, 8: 0x7FF8DEAD0000DEAD}  # NaNs with a payload that no computation makes by itself
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
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


def empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An uninitialised C-order array, from the start of a cache line on; inside `poisoned()` full of a marked NaN, or the least integer."""
    memory = np.empty(math.prod(shape) * np.dtype(dtype).itemsize + _LINE, np.uint8)
    array = np.ndarray(shape, dtype, memory, -memory.__array_interface__["data"][0] % _LINE)
    if _poison:
        fill_poison(array)
    return array


def fill_poison(array: np.ndarray) -> None:
    """Overwrite every element with the mark of what was never written; arrays other than float and signed stay."""
    if array.dtype.kind == "f" and array.itemsize in _PATTERNS:
        array.view(f"u{array.itemsize}").fill(_PATTERNS[array.itemsize])
    elif array.dtype.kind == "i":
        array.fill(np.iinfo(array.dtype).min)


def is_poison(array: np.ndarray) -> np.ndarray:
    """Which elements still carry the mark, or were computed from one that did (a NaN hands its payload on)."""
    if array.dtype.kind == "f" and array.itemsize in _PATTERNS:
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


def to_nhwc(x: np.ndarray) -> np.ndarray:
    """A logical NCHW array as a C-contiguous (N, H, W, C) array: a view if it lies channels-last, else one copy."""
    global copies
    view = x.transpose(0, 2, 3, 1)
    if view.flags.c_contiguous:
        return view
    copies += 1
    return np.ascontiguousarray(view)


def empty_nhwc(n: int, c: int, h: int, w: int, dtype) -> tuple[np.ndarray, np.ndarray]:
    """A new activation: (its logical NCHW view, the (N, H, W, C) memory to write into)."""
    memory = empty((n, h, w, c), dtype)
    return memory.transpose(0, 3, 1, 2), memory
