"""Elementwise kernels on a GPU: one pass over flat memory, whatever order the axes lie in."""

from __future__ import annotations

from pathlib import Path

from ..cuda.launch import ALL, Launch, blocks, launch, variants
from ..memory import dense_order, empty, from_order, namespace
from ..registry import HALVES, kernel
from .problem import ACCUMULATE, ADD_FPROP, CAST, RELU_BWD, RELU_FPROP, cast_reference

_SOURCE = Path(__file__).with_name("elementwise.cu")
_RELU, _RELU_BWD, _ADD = (variants(_SOURCE, entry, ALL) for entry in ("relu_fprop", "relu_bwd", "add_fprop"))
_NARROWED, _WIDENED = (variants(_SOURCE, entry, HALVES) for entry in ("narrowed", "widened"))
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


@kernel(ACCUMULATE, device="cuda", step=1, note="16 bytes per access, in place", supports=_same_dtype, dtypes=ALL)
def accumulate_cuda(a, b):
    if dense_order(a) is None:
        a[...] = _apply(_ADD, a, b)
    else:
        _apply(_ADD, a, b, into_first=True)


kernel(CAST, device="cuda", step=0, note="CuPy's astype", dtypes=("any",), name="cast_cupy")(cast_reference)


def _between_halves_and_float(x, *, dtype):
    return {x.dtype.name, dtype} in ({"float32", half} for half in HALVES)


@kernel(
    CAST,
    device="cuda",
    step=1,
    note="eight numbers per thread",
    supports=_between_halves_and_float,
    dtypes=("float32", *HALVES),
)
def cast_cuda(x, *, dtype):
    order = dense_order(x) or tuple(range(x.ndim))
    flat = namespace(x).ascontiguousarray(x.transpose(order)).reshape(-1)
    memory = empty(tuple(x.shape[axis] for axis in order), dtype, x)
    function = _NARROWED[dtype] if dtype in HALVES else _WIDENED[x.dtype.name]
    launch(Launch(function, (min(blocks(x.size, 256 * 8), _MOST_BLOCKS),), (256,), (flat, memory.reshape(-1), x.size)))
    return from_order(memory, order)


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
    return from_order(memory, order)
