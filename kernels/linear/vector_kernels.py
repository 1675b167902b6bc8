"""The fully connected layer on the CPU: products of rows that are read where they lie.

The layer is small work on large weights (1000 x 2048 numbers for a batch of 8), so what counts is that w is read, or dw
written, once and in order; register tiles, which first pack both operands, take ten times as long.

    fprop   y[n, o] is the product of two rows, x[n] and w[o]
    dgrad   dx[n] is a sum of rows of w, times dy[n]
    wgrad   dw[o] is a sum of rows of x, times dy[:, o]

Four rows are computed together, so that what is read serves four times. Work is cut by shape alone, and every number is
summed by one thread in one order.
"""

from __future__ import annotations

import numpy as np

from ..cpu.bfloat16 import bits
from ..cpu.casts import cast
from ..cpu.jit import helper
from ..cpu.parallel import parallel
from ..cpu.vectors import PANEL, load, splat, store, total
from ..memory import contiguous, empty, write
from ..registry import kernel
from .problem import LINEAR_DGRAD, LINEAR_FPROP, LINEAR_WGRAD

_DTYPES = ("float32", "bfloat16")  # widened as it is loaded
_COLUMNS = 4 * PANEL  # of a task: of each row that it reads, a run of memory
_ROWS = 64  # of a task


def _fprop_supports(x, w, b):
    return x.size > 0 and w.size > 0 and x.shape[1] % PANEL == 0


def _dgrad_supports(dy, w):
    return dy.size > 0 and w.size > 0 and w.shape[1] % PANEL == 0


def _wgrad_supports(x, dy):
    return x.size > 0 and dy.size > 0 and x.shape[1] % PANEL == 0


@kernel(
    LINEAR_FPROP,
    device="cpu",
    step=3,
    note="products of rows where they lie",
    supports=_fprop_supports,
    dtypes=_DTYPES,
)
def linear_fprop_rows(x, w, b):
    y = empty((x.shape[0], w.shape[0]), np.float32)
    b = np.zeros(w.shape[0], np.float32) if b is None else _wide(b)
    _products(-(-len(w) // 4), _in(np.float32, contiguous(x)), bits(contiguous(w)), b, y)
    return _in(x.dtype, y)


@kernel(LINEAR_DGRAD, device="cpu", step=3, note="sums of rows of w", supports=_dgrad_supports, dtypes=_DTYPES)
def linear_dgrad_rows(dy, w):
    return _summed_rows(dy, w)


@kernel(LINEAR_WGRAD, device="cpu", step=3, note="sums of rows of x", supports=_wgrad_supports, dtypes=_DTYPES)
def linear_wgrad_rows(x, dy):
    return _summed_rows(dy.T, x)


def _summed_rows(factors, rows):
    """factors (A, B) @ rows (B, I)."""
    y = empty((factors.shape[0], rows.shape[1]), np.float32)
    tasks = -(-len(y) // _ROWS) * -(-y.shape[1] // _COLUMNS)
    _sums(tasks, _wide(factors), bits(contiguous(rows)), y)
    return _in(rows.dtype, y)


def _wide(a):
    """In float32 and C order."""
    if a.dtype == np.float32:
        return contiguous(a)
    wide = empty(a.shape, np.float32)
    write(wide, a)
    return wide


def _in(dtype, y):
    """Numbers in this dtype: inputs in float32, sums in that of the inputs."""
    return y if dtype == y.dtype else cast(y, dtype)


@parallel()
def _products(task, x, w, b, y):
    first = 4 * task
    for n in range(len(x)):
        if first + 4 <= len(w):
            _four_products(x[n], w[first : first + 4], b[first : first + 4], y[n, first : first + 4])
        else:
            for o in range(first, len(w)):
                _one_product(x[n], w[o], b[o : o + 1], y[n, o : o + 1])


@helper(inline=True)
def _four_products(x, w, b, y):
    step, row = PANEL * w.itemsize, x.size * w.itemsize
    zero = splat(x.dtype.type(0), PANEL, x.dtype)
    s0, s1, s2, s3 = zero, zero, zero, zero
    p, q = x.ctypes.data, w.ctypes.data
    for j in range(x.size // PANEL):
        v, at = load(p + j * PANEL * x.itemsize, PANEL, x.dtype), q + j * step
        s0 = s0 + v * load(at, PANEL, w.dtype)
        s1 = s1 + v * load(at + row, PANEL, w.dtype)
        s2 = s2 + v * load(at + 2 * row, PANEL, w.dtype)
        s3 = s3 + v * load(at + 3 * row, PANEL, w.dtype)
    y[0], y[1], y[2], y[3] = b[0] + total(s0), b[1] + total(s1), b[2] + total(s2), b[3] + total(s3)


@helper(inline=True)
def _one_product(x, w, b, y):
    s = splat(x.dtype.type(0), PANEL, x.dtype)
    for j in range(0, x.size, PANEL):
        s = s + load(x[j:].ctypes.data, PANEL, x.dtype) * load(w[j:].ctypes.data, PANEL, w.dtype)
    y[0] = b[0] + total(s)


@parallel()
def _sums(task, factors, rows, y):
    columns = (y.shape[1] + _COLUMNS - 1) // _COLUMNS
    high, column = divmod(task, columns)
    _task_sums(factors, rows, y, high * _ROWS, column * _COLUMNS)


@helper()
def _task_sums(factors, rows, y, top, left):
    right, below = min(left + _COLUMNS, y.shape[1]), min(top + _ROWS, len(y))
    y[top:below, left:right] = 0
    for first in range(0, len(rows), 16):  # a few rows at a time: few pages of memory
        last = min(first + 16, len(rows))
        for j in range(left, right, PANEL):
            for a in range(top, below - 3, 4):
                _four_sums(factors[a : a + 4], rows, y[a : a + 4], first, last, j)
            for a in range(below - (below - top) % 4, below):
                _one_sum(factors[a], rows, y[a], first, last, j)


@helper(inline=True)
def _four_sums(factors, rows, y, first, last, j):
    step, row, dtype = rows.shape[1] * rows.itemsize, y.shape[1] * y.itemsize, y.dtype
    p, out = rows.ctypes.data + j * rows.itemsize, y.ctypes.data + j * y.itemsize
    s0, s1 = load(out, PANEL, dtype), load(out + row, PANEL, dtype)
    s2, s3 = load(out + 2 * row, PANEL, dtype), load(out + 3 * row, PANEL, dtype)
    for b in range(first, last):
        v = load(p + b * step, PANEL, rows.dtype)
        s0 = s0 + v * splat(factors[0, b], PANEL, dtype)
        s1 = s1 + v * splat(factors[1, b], PANEL, dtype)
        s2 = s2 + v * splat(factors[2, b], PANEL, dtype)
        s3 = s3 + v * splat(factors[3, b], PANEL, dtype)
    store(out, s0)
    store(out + row, s1)
    store(out + 2 * row, s2)
    store(out + 3 * row, s3)


@helper(inline=True)
def _one_sum(factors, rows, y, first, last, j):
    step, dtype = rows.shape[1] * rows.itemsize, y.dtype
    p, out = rows.ctypes.data + j * rows.itemsize, y.ctypes.data + j * y.itemsize
    s = load(out, PANEL, dtype)
    for b in range(first, last):
        s = s + load(p + b * step, PANEL, rows.dtype) * splat(factors[b], PANEL, dtype)
    store(out, s)
