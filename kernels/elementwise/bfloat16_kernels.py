"""Elementwise kernels on the CPU for bfloat16: widened in registers, computed in float32, rounded as they go back."""

from __future__ import annotations

import numpy as np

from ..cpu.bfloat16 import bits
from ..cpu.casts import cast
from ..cpu.jit import helper
from ..cpu.parallel import parallel
from ..cpu.vectors import PANEL, load, splat, store_as, where
from ..memory import contiguous, dense_order, empty
from ..registry import kernel
from .problem import ACCUMULATE, ADD_FPROP, CAST, RELU_BWD, RELU_FPROP

_BLOCK = 1 << 15  # numbers of a task, whole panels
_RELU, _RELU_BWD, _ADD = range(3)
_NOTE, _DTYPES = "panels widened in registers, all threads", ("bfloat16",)


@kernel(RELU_FPROP, device="cpu", step=3, note=_NOTE, dtypes=_DTYPES)
def relu_fprop_bfloat16(x):
    return _apply(_RELU, x, x)


@kernel(RELU_BWD, device="cpu", step=3, note=_NOTE, dtypes=_DTYPES)
def relu_bwd_bfloat16(dy, y):
    return _apply(_RELU_BWD, dy, y)


@kernel(ADD_FPROP, device="cpu", step=3, note=_NOTE, dtypes=_DTYPES)
def add_fprop_bfloat16(a, b):
    return _apply(_ADD, a, b)


@kernel(ACCUMULATE, device="cpu", step=3, note=_NOTE, dtypes=_DTYPES)
def accumulate_bfloat16(a, b):
    order = dense_order(a)
    if order is None:
        a[...] = _apply(_ADD, a, b)
    else:
        flat = bits(a.transpose(order).reshape(-1))
        _elementwise(-(-flat.size // _BLOCK), flat, bits(contiguous(b.transpose(order)).reshape(-1)), flat, _ADD)


@kernel(CAST, device="cpu", step=1, note="panels in registers, all threads", dtypes=("float32", "bfloat16"))
def cast_numba(x, *, dtype):
    return cast(x, dtype)


def _apply(op, a, b):
    """op(a, b), laid out in memory as a or b is, where one of them is dense."""
    order = next((order for order in map(dense_order, (a, b)) if order is not None), tuple(range(a.ndim)))
    flat_a, flat_b = (bits(contiguous(v.transpose(order)).reshape(-1)) for v in (a, b))
    memory = empty(tuple(a.shape[axis] for axis in order), a.dtype)
    _elementwise(-(-memory.size // _BLOCK), flat_a, flat_b, bits(memory.reshape(-1)), op)
    return memory.transpose(np.argsort(order))


@parallel()
def _elementwise(i, a, b, y, op):
    first = i * _BLOCK
    last = min(first + _BLOCK, y.size)
    _block(a[first:last], b[first:last], y[first:last], op)


@helper()
def _block(a, b, y, op):
    whole = y.size - y.size % PANEL
    _panels(a, b, y, op, whole)
    if whole < y.size:  # the rest in panels of its own
        rest = np.zeros((2, PANEL), y.dtype)
        rest[0, : y.size - whole], rest[1, : y.size - whole] = a[whole:], b[whole:]
        _panels(rest[0], rest[1], rest[0], op, PANEL)
        y[whole:] = rest[0, : y.size - whole]


@helper(inline=True)
def _panels(a, b, y, op, n):
    zero = splat(np.float32(0), PANEL, np.float32)
    for i in range(0, n, PANEL):
        v, w = load(a[i:].ctypes.data, PANEL, a.dtype), load(b[i:].ctypes.data, PANEL, b.dtype)
        if op == _RELU:
            v = where(v <= zero, zero, v)  # a NaN stays
        elif op == _RELU_BWD:
            v = where(w > zero, v, zero)
        else:
            v = v + w
        store_as(y[i:].ctypes.data, v, y.dtype)
