"""The fully connected layer on a GPU: three matrix products by tiles in shared memory."""

from __future__ import annotations

from pathlib import Path

from ..cuda.launch import ALL, Launch, blocks, launch, variants
from ..memory import empty, namespace
from ..registry import kernel
from .problem import LINEAR_DGRAD, LINEAR_FPROP, LINEAR_WGRAD

_LINEAR = variants(Path(__file__).with_name("linear.cu"), "linear", ALL)
_TILE = 64  # rows and columns of a block


@kernel(LINEAR_FPROP, device="cuda", step=1, note="64 x 64 tiles in shared memory, 4 x 4 sums per thread", dtypes=ALL)
def linear_fprop_cuda(x, w, b):
    (n, i), o = x.shape, w.shape[0]
    return product(x, w, n, o, i, (i, 1, i, 1), b)


@kernel(LINEAR_DGRAD, device="cuda", step=1, note="64 x 64 tiles in shared memory, 4 x 4 sums per thread", dtypes=ALL)
def linear_dgrad_cuda(dy, w):
    (n, o), i = dy.shape, w.shape[1]
    return product(dy, w, n, i, o, (o, 1, 1, i))


@kernel(LINEAR_WGRAD, device="cuda", step=1, note="64 x 64 tiles in shared memory, 4 x 4 sums per thread", dtypes=ALL)
def linear_wgrad_cuda(x, dy):
    (n, i), o = x.shape, dy.shape[1]
    return product(dy, x, o, i, n, (1, o, 1, i))


def product(a, b, rows, columns, depth, strides, bias=None, out=None):
    """(rows, columns): y[m, n] = sum over k < depth of a(m, k) * b(n, k). strides: in numbers, from a row of a to the
    next and from one k to the next, likewise for b.
    out: the memory to write into, if there is some."""
    a, b = (namespace(v).ascontiguousarray(v) for v in (a, b))
    y = empty((rows, columns), a.dtype, a) if out is None else out
    added = y if bias is None else namespace(bias).ascontiguousarray(bias)  # an address for the kernel; not read
    args = (a, b, added, y, rows, columns, depth, *strides, bias is not None)
    launch(Launch(_LINEAR[a.dtype.name], (blocks(rows, _TILE), blocks(columns, _TILE)), (256,), args))
    return y
