"""Padding on the CPU: one pass over y on all threads, run by run of what lies side by side in x and in y."""

from __future__ import annotations

import numpy as np

from ..cpu.jit import helper
from ..cpu.parallel import parallel
from ..cpu.transforms import move
from ..memory import empty, from_order, order_of
from ..registry import kernel
from .numpy_kernels import pad_slices
from .problem import PAD, padded_shape

_AXES = 4


def _supports(x, *, before, after, interior, value):
    return 0 < x.ndim <= _AXES and x.size > 0


def _has_runs(x, last, interior):
    return min(x.strides) > 0 and x.strides[last] == x.itemsize and interior[last] == 0


@kernel(
    PAD,
    device="cpu",
    step=2,
    supports=_supports,
    dtypes=("float32", "float64", "float16", "bfloat16"),
    note="one pass, all threads",
)
def pad_runs(x, *, before, after, interior, value):
    order, shape, kind = order_of(x), padded_shape(x.shape, before, after, interior), f"u{x.itemsize}"
    if not _has_runs(x, order[-1], interior):
        return pad_slices(x, before=before, after=after, interior=interior, value=value)
    memory = empty(tuple(shape[axis] for axis in order), x.dtype)
    ahead = (1,) * (_AXES - x.ndim)
    starts = np.array((0,) * len(ahead) + tuple(before[axis] for axis in order))
    steps = np.array(ahead + tuple(1 + interior[axis] for axis in order))
    source = x.transpose(order).view(kind)[(None,) * len(ahead)]
    target = memory.reshape(ahead + memory.shape).view(kind)
    number = np.array(value, x.dtype).view(kind)[()]
    _pad(target.shape[0] * target.shape[1], source, target, starts, steps, number)
    return from_order(memory, order)


@parallel()
def _pad(row, x, y, starts, steps, value):
    i, j = divmod(row, y.shape[1])
    _pad_block(x, y[i, j], _place(i, 0, x, starts, steps), _place(j, 1, x, starts, steps), starts, steps, value)


@helper()
def _place(i, axis, x, starts, steps):
    """Which index of x this one of y is; -1 outside and between."""
    at, rest = divmod(i - starts[axis], steps[axis])
    return at if rest == 0 and 0 <= at < x.shape[axis] else -1


@helper()
def _pad_block(x, y, i, j, starts, steps, value):
    n, first = x.shape[3], starts[3]
    for row in range(y.shape[0]):
        k = _place(row, 2, x, starts, steps)
        if i < 0 or j < 0 or k < 0:
            _fill(y[row], 0, y.shape[1], value)
        else:
            _fill(y[row], 0, first, value)
            source = x.ctypes.data + i * x.strides[0] + j * x.strides[1] + k * x.strides[2]
            move(source, y.ctypes.data + (row * y.shape[1] + first) * x.itemsize, n * x.itemsize)
            _fill(y[row], first + n, y.shape[1], value)


@helper(inline=True)
def _fill(row, start, stop, value):
    for i in range(start, stop):
        row[i] = value
