"""Elementwise kernels on a GPU: one pass over flat memory, whatever order the axes lie in."""

from __future__ import annotations

from pathlib import Path

from ..cuda.launch import ALL, Launch, blocks, launch, variants
from ..memory import dense_order, empty, namespace
from ..registry import kernel
from .problem import ACCUMULATE, ADD_FPROP, RELU_BWD, RELU_FPROP

_SOURCE = Path(__file__).with_name("elementwise.cu")
_RELU, _RELU_BWD, _ADD = (variants(_SOURCE, entry, ALL) for entry in ("relu_fprop", "relu_bwd", "add_fprop"))
_MOST_BLOCKS = 4096  # more only wait; each goes on with what is left


def _same_dtype(a, *more):
    return all(b.dtype == a.dtype for b in more)


@kernel(RELU_FPROP, device="cuda", step=1, note="16 bytes per access", supports=_same_dtype, dtypes=ALL)
def relu_fprop_cuda(x):
    return _apply(_RELU, x)


@kernel(RELU_BWD, device="cuda", step=1, note="16 bytes per access", supports=_same_dtype, dtypes=ALL)
def relu_bwd_cuda(dy, y):
    return _apply(_RELU_BWD, dy, y)


@kernel(ADD_FPROP, device="cuda", step=1, note="16 bytes per access", supports=_same_dtype, dtypes=ALL)
def add_fprop_cuda(a, b):
    return _apply(_ADD, a, b)


@kernel(ACCUMULATE, device="cuda", step=1, note="16 bytes per access, in place", supports=_same_dtype)
def accumulate_cuda(a, b):
    if dense_order(a) is None:
        a[...] = _apply(_ADD, a, b)
    else:
        _apply(_ADD, a, b, into_first=True)


def _apply(functions, *arrays, into_first=False):
    """The function of the arrays, laid out in memory as the first of them that is dense.

    into_first: written over the first array, which must be dense.
    """
    a, xp = arrays[0], namespace(arrays[0])
    order = next((order for order in map(dense_order, arrays) if order is not None), tuple(range(a.ndim)))
    flat = [xp.ascontiguousarray(v.transpose(order)).reshape(-1) for v in arrays]
    memory = a.transpose(order) if into_first else empty(tuple(a.shape[axis] for axis in order), a.dtype, a)
    grid = min(blocks(a.size, 256 * 16 // a.dtype.itemsize), _MOST_BLOCKS)
    launch(Launch(functions[a.dtype.name], (grid,), (256,), (*flat, memory.reshape(-1), a.size)))
    return memory.transpose(sorted(range(a.ndim), key=order.__getitem__))
