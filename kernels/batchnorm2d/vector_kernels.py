"""Batch normalisation on the CPU at the speed of memory: vectors that stay in registers over the rows of a panel.

Channels-last memory is taken as rows of `length` numbers, the least common multiple of C and a panel, and a panel of a
row as one vector (cpu/vectors.py). Sums and the vectors over channels then stay in registers while the rows of a group
go by; a group is small enough for the second-level cache, so that its panels may be taken one after the other.

Blocks are cut by shape alone: the same bits on any number of threads. The second pass walks the blocks backwards: what
the first pass read last is still in the cache. While a group is computed the lines of the next are asked for, one after
the other as memory likes it: its panels are wide steps apart (512 channels of bfloat16: 0.6 of the time).

Statistics are one pass of float64 sums of d = x - k and d², k being the channel's first number: the differences are
exact, and a float32 variance needs no more (rounding in float64 is 2^29 times finer, so a variance that is small
beside the mean loses nothing that float32 held). float64 input is left to the two passes of numba_kernels.py.

bfloat16 activations (`bits`) are widened as they are loaded and rounded as they are stored: half of the memory, the
same arithmetic. What there is one of per channel is float32 then.
"""

from __future__ import annotations

import math

import numpy as np

from ..cpu.bfloat16 import bits
from ..cpu.jit import call_noted, helper, njit
from ..cpu.parallel import parallel
from ..cpu.transforms import fetch
from ..cpu.vectors import PANEL, load, splat, store, store_as, where, widen
from ..memory import empty, empty_nhwc, to_nhwc, write
from ..registry import kernel
from .problem import BATCHNORM2D_BWD, BATCHNORM2D_FPROP_INFER, BATCHNORM2D_FPROP_TRAIN

_GROUP = 1 << 14  # numbers of a group of rows
_BLOCKS = 64  # at most: each has its own sums
_LEAST_ROWS = 64  # of a block: its sums must be small beside it


def _length(c):
    return math.lcm(c, PANEL)


def _whole_rows(x):
    return x.size > 0 and x.size % _length(x.shape[1]) == 0


def _fprop_supports(x, gamma, *_, **__):
    return _whole_rows(x) and gamma.dtype == np.float32


def _bwd_supports(dy, x, y, gamma, *_, **__):
    return _whole_rows(x) and gamma.dtype == np.float32


@kernel(
    BATCHNORM2D_FPROP_TRAIN,
    device="cpu",
    step=2,
    note="one pass of float64 sums, one fused pass; panels of rows in registers",
    supports=_fprop_supports,
    dtypes=("float32", "bfloat16"),
)
def fprop_train_vectors(x, gamma, beta, z, *, eps, relu):
    memory, c = to_nhwc(x), x.shape[1]
    rows = bits(memory).reshape(-1, _length(c))
    mean, var, inv_std = (empty((c,), np.float32) for _ in range(3))
    partial, shift = _partial(rows), empty((rows.shape[1] // c, c), np.float32)
    write(shift, memory[0, 0, 0])
    _statistics(len(partial), rows, shift.reshape(-1), _group(rows), partial)
    _moments(partial, shift[0], x.size // c, mean, var)
    call_noted(_inverse_std, var, eps, inv_std)
    return _normalised(memory, gamma, beta, mean, inv_std, z, relu), mean, var


def _inverse_std(var, eps, inv_std):
    inv_std[...] = 1 / np.sqrt(var + eps)  # in float32, as the op computes it: backward must find the same y > 0


@kernel(
    BATCHNORM2D_FPROP_INFER,
    device="cpu",
    step=2,
    note="panels of rows in registers",
    supports=_fprop_supports,
    dtypes=("float32", "bfloat16"),
)
def fprop_infer_vectors(x, gamma, beta, mean, inv_std, z, *, relu):
    return _normalised(to_nhwc(x), gamma, beta, mean, inv_std, z, relu)


@kernel(
    BATCHNORM2D_BWD,
    device="cpu",
    step=2,
    note="y made again from x where there is no residual; panels of rows in registers",
    supports=_bwd_supports,
    dtypes=("float32", "bfloat16"),
)
def bwd_vectors(dy, x, y, gamma, beta, mean, inv_std, *, training, relu, residual):
    n, c, h, w = x.shape
    dtype = x.dtype
    x, g = (bits(to_nhwc(a)).reshape(-1, _length(c)) for a in (x, dy))
    again = relu and y is None  # y > 0 is known from x
    y = bits(to_nhwc(y)).reshape(x.shape) if relu and not again else g  # else never read
    dz, dz_memory = empty_nhwc(n, c, h, w, dtype) if residual and relu else (None, x)
    dz_memory = bits(dz_memory).reshape(x.shape)
    partial, vectors = _partial(x), empty((5, x.shape[1]), np.float32)
    gamma, beta, mean, inv_std = map(np.ascontiguousarray, (gamma, beta, mean, inv_std))
    _affine(gamma, beta, mean, inv_std, vectors)
    _sums(len(partial), g, x, y, dz_memory, vectors, relu, again, dz is not None, _group(x), partial)
    dgamma, dbeta = empty((c,), np.float32), empty((c,), np.float32)
    _slopes(partial, gamma, inv_std, x.size // c, training, dgamma, dbeta, vectors)
    if dz is not None:  # masked already
        g, relu = dz_memory, False
    dx, memory = empty_nhwc(n, c, h, w, dtype)
    group = _group(x)
    _dx(-(-len(x) // group), g, x, y, bits(memory).reshape(x.shape), vectors, relu, again, group)
    return dx, dgamma, dbeta, dz


def _group(rows):
    """How many rows are taken together."""
    return max(1, _GROUP // rows.shape[1])


def _partial(rows):
    """Room for two sums of every column of every block."""
    blocks = max(1, min(_BLOCKS, len(rows) // max(_group(rows), _LEAST_ROWS)))
    return empty((blocks, 2, rows.shape[1]), np.float64)


def _normalised(x, gamma, beta, mean, inv_std, z, relu):
    """act(gamma * (x - mean) * inv_std + beta + z) for x (N, H, W, C), logically NCHW."""
    n, h, w, c = x.shape
    y, memory = empty_nhwc(n, c, h, w, x.dtype)
    x = bits(x).reshape(-1, _length(c))
    vectors = empty((3, x.shape[1]), np.float32)
    _affine(*map(np.ascontiguousarray, (gamma, beta, mean, inv_std)), vectors)
    z_rows = x if z is None else bits(to_nhwc(z)).reshape(x.shape)
    y_rows, group = bits(memory).reshape(x.shape), _group(x)
    _normalise(-(-len(x) // group), x, z_rows, y_rows, vectors, z is not None, relu, group)
    return y


@helper(inline=True)
def _vector(vectors, i, j):
    """Panel j of row i."""
    return load(vectors[i, j * PANEL :].ctypes.data, PANEL, vectors.dtype)


@helper(inline=True)
def _in_order(i, j, rows, step):
    """From panel j of a group's first row on, in bytes: what is asked for at row i, so that all panels together ask for
    a group from its first line to its last."""
    return (j * (rows - 1) + i) * step


@njit()
def _affine(gamma, beta, mean, inv_std, vectors):
    """Rows of vectors: mean, scale = gamma * inv_std and beta, repeated to their length."""
    for l in range(vectors.shape[1]):
        k = l % mean.size
        vectors[0, l], vectors[1, l], vectors[2, l] = mean[k], gamma[k] * inv_std[k], beta[k]


@helper()
def _total(partial, c):
    """Add up all blocks, and the columns of each channel, into partial[0, :, :c]."""
    total = partial[0]
    for b in range(1, len(partial)):
        for i in range(2):
            for l in range(total.shape[1]):
                total[i, l] += partial[b, i, l]
    for i in range(2):
        for l in range(c, total.shape[1]):
            total[i, l % c] += total[i, l]


@njit()
def _moments(partial, shift, m, mean, var):
    """Mean and biased variance from the sums of d and d², d being the distance from shift."""
    _total(partial, mean.size)
    for k in range(mean.size):
        first = partial[0, 0, k] / m
        second = partial[0, 1, k] / m - first * first
        mean[k], var[k] = shift[k] + first, 0.0 if second < 0 else second


@njit()
def _slopes(partial, gamma, inv_std, m, training, dgamma, dbeta, vectors):
    """dgamma and dbeta from the sums; rows 3 and 4 of vectors: dbeta and dgamma as they enter dx."""
    c = gamma.size
    _total(partial, c)
    for k in range(c):
        dbeta[k], dgamma[k] = partial[0, 0, k], partial[0, 1, k] * inv_std[k]
    for l in range(vectors.shape[1]):
        k = l % c
        scale = np.float64(gamma[k]) * inv_std[k] / m if training else 0.0
        vectors[3, l] = scale * partial[0, 0, k]
        vectors[4, l] = scale * partial[0, 1, k] * inv_std[k] * inv_std[k]


@parallel()
def _statistics(b, x, shift, group, partial):
    blocks = partial.shape[0]
    first, last = len(x) * b // blocks, len(x) * (b + 1) // blocks
    _block_statistics(x[first:last], shift, group, partial[b])


@helper()
def _block_statistics(x, shift, group, out):
    """Sums of d and d² of every column into out (2, length), d = x - shift."""
    out[:] = 0
    row, step = x.shape[1] * x.itemsize, PANEL * x.itemsize
    for first in range(0, len(x), group):
        rows = min(group, len(x) - first)
        for j in range(x.shape[1] // PANEL):
            p, total_at = x[first].ctypes.data + j * step, out[0, j * PANEL :].ctypes.data
            squares_at = out[1, j * PANEL :].ctypes.data
            k = widen(load(shift[j * PANEL :].ctypes.data, PANEL, shift.dtype))
            total, squares = load(total_at, PANEL, out.dtype), load(squares_at, PANEL, out.dtype)
            for i in range(rows):
                fetch(p + group * row + _in_order(i, j, rows, step), step)
                d = widen(load(p + i * row, PANEL, x.dtype)) - k
                total = total + d
                squares = squares + d * d
            store(total_at, total)
            store(squares_at, squares)


@parallel()
def _normalise(b, x, z, y, vectors, add, relu, group):
    groups = (len(x) + group - 1) // group
    first = (groups - 1 - b) * group
    last = first + group
    _normalise_group(x[first:last], z[first:last], y[first:last], vectors, add, relu)


@helper()
def _normalise_group(x, z, y, vectors, add, relu):
    row, step = x.shape[1] * x.itemsize, PANEL * x.itemsize
    zero = splat(vectors.dtype.type(0), PANEL, vectors.dtype)
    for j in range(x.shape[1] // PANEL):
        mean, scale, beta = _vector(vectors, 0, j), _vector(vectors, 1, j), _vector(vectors, 2, j)
        p, skip, out = x.ctypes.data + j * step, z.ctypes.data + j * step, y.ctypes.data + j * step
        for i in range(len(x)):
            ahead = _in_order(i, j, len(x), step) - len(x) * row  # tasks go backwards
            fetch(p + ahead, step)
            fetch(out + ahead, step)
            v = (load(p + i * row, PANEL, x.dtype) - mean) * scale + beta
            if add:
                fetch(skip + ahead, step)
                v = v + load(skip + i * row, PANEL, x.dtype)
            if relu:
                v = where(v <= zero, zero, v)  # a NaN stays
            store_as(out + i * row, v, y.dtype)


@parallel()
def _sums(b, dy, x, y, dz, vectors, relu, again, residual, group, partial):
    blocks = partial.shape[0]
    first, last = len(x) * b // blocks, len(x) * (b + 1) // blocks
    _block_sums(
        dy[first:last], x[first:last], y[first:last], dz[first:last],
        vectors, relu, again, residual, group, partial[b],
    )  # fmt: skip


@helper()
def _block_sums(dy, x, y, dz, vectors, relu, again, residual, group, out):
    """Sums of g and of g * (x - mean) of every column into out (2, length). Writes g into dz if there is a residual."""
    out[:] = 0
    row, step = x.shape[1] * x.itemsize, PANEL * x.itemsize
    zero = splat(vectors.dtype.type(0), PANEL, vectors.dtype)
    for first in range(0, len(x), group):
        rows = min(group, len(x) - first)
        for j in range(x.shape[1] // PANEL):
            mean, scale, beta = _vector(vectors, 0, j), _vector(vectors, 1, j), _vector(vectors, 2, j)
            sums, products = out[0, j * PANEL :].ctypes.data, out[1, j * PANEL :].ctypes.data
            offset = first * row + j * step
            upstream, p = dy.ctypes.data + offset, x.ctypes.data + offset
            active, skip = y.ctypes.data + offset, dz.ctypes.data + offset
            plain, weighted = zero, zero
            for i in range(rows):
                ahead = _in_order(i, j, rows, step) + group * row
                fetch(upstream + ahead, step)
                fetch(p + ahead, step)
                g, d = load(upstream + i * row, PANEL, x.dtype), load(p + i * row, PANEL, x.dtype) - mean
                if again:
                    g = where(d * scale + beta > zero, g, zero)
                elif relu:
                    fetch(active + ahead, step)
                    g = where(load(active + i * row, PANEL, x.dtype) > zero, g, zero)
                if residual:
                    fetch(skip + ahead, step)
                    store_as(skip + i * row, g, dz.dtype)
                plain = plain + g
                weighted = weighted + g * d
            store(sums, load(sums, PANEL, out.dtype) + widen(plain))
            store(products, load(products, PANEL, out.dtype) + widen(weighted))


@parallel()
def _dx(b, g, x, y, dx, vectors, relu, again, group):
    groups = (len(x) + group - 1) // group
    first = (groups - 1 - b) * group
    last = first + group
    _dx_group(g[first:last], x[first:last], y[first:last], dx[first:last], vectors, relu, again)


@helper()
def _dx_group(dy, x, y, dx, vectors, relu, again):
    """dx = scale * g - constant - slope * (x - mean)."""
    row, step = x.shape[1] * x.itemsize, PANEL * x.itemsize
    zero = splat(vectors.dtype.type(0), PANEL, vectors.dtype)
    for j in range(x.shape[1] // PANEL):
        mean, scale, beta = _vector(vectors, 0, j), _vector(vectors, 1, j), _vector(vectors, 2, j)
        constant, slope = _vector(vectors, 3, j), _vector(vectors, 4, j)
        upstream, p = dy.ctypes.data + j * step, x.ctypes.data + j * step
        active, out = y.ctypes.data + j * step, dx.ctypes.data + j * step
        for i in range(len(x)):
            ahead = _in_order(i, j, len(x), step) - len(x) * row
            fetch(upstream + ahead, step)
            fetch(p + ahead, step)
            fetch(out + ahead, step)
            g, d = load(upstream + i * row, PANEL, x.dtype), load(p + i * row, PANEL, x.dtype) - mean
            if again:
                g = where(d * scale + beta > zero, g, zero)
            elif relu:
                fetch(active + ahead, step)
                g = where(load(active + i * row, PANEL, x.dtype) > zero, g, zero)
            store_as(out + i * row, g * scale - (constant + slope * d), dx.dtype)
