"""Elementwise kernels on the CPU: one pass over flat memory on all threads, whatever order the axes lie in."""

from __future__ import annotations

import numpy as np

from ..cpu.jit import helper
from ..cpu.parallel import parallel
from ..memory import contiguous, dense_order, empty
from ..registry import kernel
from .problem import ACCUMULATE, ADD_FPROP, RELU_BWD, RELU_FPROP

_BLOCK = 1 << 15
_RELU, _RELU_BWD, _ADD = range(3)  # one compiled function serves all three


def _same_float(a, *more):
    return a.dtype.kind == "f" and all(b.dtype == a.dtype for b in more)


@kernel(RELU_FPROP, device="cpu", step=1, note="one pass, all threads", supports=_same_float)
def relu_fprop_numba(x):
    return _apply(_RELU, x, x)


@kernel(RELU_BWD, device="cpu", step=1, note="one pass, all threads", supports=_same_float)
def relu_bwd_numba(dy, y):
    return _apply(_RELU_BWD, dy, y)


@kernel(ADD_FPROP, device="cpu", step=1, note="one pass, all threads", supports=_same_float)
def add_fprop_numba(a, b):
    return _apply(_ADD, a, b)


@kernel(ACCUMULATE, device="cpu", step=1, note="one pass, all threads", supports=_same_float)
def accumulate_numba(a, b):
    order = dense_order(a)
    if order is None:
        a += b
    else:
        flat_a, flat_b = a.transpose(order).reshape(-1), contiguous(b.transpose(order)).reshape(-1)
        _accumulate(-(-a.size // _BLOCK), flat_a, flat_b, _BLOCK)


def _apply(op, a, b):
    """op(a, b), laid out in memory as a or b is, where one of them is dense."""
    order = next((order for order in map(dense_order, (a, b)) if order is not None), tuple(range(a.ndim)))
    flat_a, flat_b = (contiguous(v.transpose(order)).reshape(-1) for v in (a, b))
    memory = empty(tuple(a.shape[axis] for axis in order), a.dtype)
    _elementwise(-(-memory.size // _BLOCK), flat_a, flat_b, memory.reshape(-1), op, _BLOCK)
    return memory.transpose(np.argsort(order))


@parallel()
def _elementwise(i, a, b, y, op, block):
    first = i * block
    last = first + block
    _elementwise_block(a[first:last], b[first:last], y[first:last], op)


@helper()
def _elementwise_block(a, b, y, op):
    zero = a.dtype.type(0)
    if op == _RELU:
        for i in range(y.size):
            y[i] = zero if a[i] <= zero else a[i]  # a NaN stays
    elif op == _RELU_BWD:
        for i in range(y.size):
            y[i] = a[i] if b[i] > zero else zero
    else:
        for i in range(y.size):
            y[i] = a[i] + b[i]


@parallel()
def _accumulate(i, a, b, block):
    first = i * block
    last = first + block
    _accumulate_block(a[first:last], b[first:last])


@helper()
def _accumulate_block(a, b):
    for i in range(a.size):
        a[i] += b[i]
