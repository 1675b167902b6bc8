"""Between bfloat16 and float32, on all threads; other dtypes by NumPy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from ..kept import kept
from ..memory import dense_order, empty
from .bfloat16 import bits
from .jit import helper
from .parallel import parallel
from .vectors import PANEL, load, store_as

_BLOCK = 1 << 15  # numbers of a task, whole panels
_PAIR = {np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)}


@kept
def cast(a: Any, dtype: Any) -> Any:
    """The array in another dtype, in the memory order of `a`, rounded to the nearest, ties to even; a copy (of a
    `constant` the one that is kept)."""
    dtype = np.dtype(dtype)
    order = dense_order(a)
    if {a.dtype, dtype} != _PAIR or order is None:
        return a.astype(dtype)
    memory = empty(tuple(a.shape[axis] for axis in order), dtype)
    _cast(-(-memory.size // _BLOCK), bits(a.transpose(order).reshape(-1)), bits(memory.reshape(-1)))
    return memory.transpose(np.argsort(order))


@parallel()
def _cast(i, a, y):
    first = i * _BLOCK
    last = min(first + _BLOCK, y.size)
    _cast_block(a[first:last], y[first:last])


@helper()
def _cast_block(a, y):
    whole = y.size - y.size % PANEL
    _panels(a, y, whole)
    if whole < y.size:  # the rest in a panel of its own
        source, target = np.zeros(PANEL, a.dtype), np.empty(PANEL, y.dtype)
        source[: y.size - whole] = a[whole:]
        _panels(source, target, PANEL)
        y[whole:] = target[: y.size - whole]


@helper(inline=True)
def _panels(a, y, n):
    for i in range(0, n, PANEL):
        store_as(y[i:].ctypes.data, load(a[i:].ctypes.data, PANEL, a.dtype), y.dtype)
