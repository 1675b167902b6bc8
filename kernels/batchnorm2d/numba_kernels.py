"""Batch normalisation on the CPU: as few passes over memory as its sums allow, two forward and two backward.

Channels-last memory is M = N H W rows of C numbers. A loop over 16 channels is too short to vectorise, so whole rows
are taken together as super rows of `length` numbers, a multiple of C, with the vectors over channels repeated to that
length. Super rows are dealt out in blocks that depend on the shape alone: the same bits on any number of threads.
The statistics are summed in float64, the sums of backward in x's own precision within a block; blocks are merged in
float64.
"""

from __future__ import annotations

import numpy as np

from ..cpu.jit import helper
from ..cpu.parallel import parallel
from ..memory import empty, empty_nhwc, to_nhwc
from ..registry import kernel
from .problem import BATCHNORM2D_BWD, BATCHNORM2D_FPROP_INFER, BATCHNORM2D_FPROP_TRAIN

_LENGTH = 256  # least length of a super row: many vectors, and the sums stay in the first-level cache
_BLOCK = 1 << 15  # numbers in a block: read twice by the statistics, the second time from the second-level cache


def _not_empty(x, *_, **__):
    return x.size > 0


@kernel(
    BATCHNORM2D_FPROP_TRAIN,
    device="cpu",
    step=1,
    note="two-pass statistics per cache block, merged; one fused pass",
    supports=_not_empty,
)
def fprop_train_numba(x, gamma, beta, z, *, eps, relu):
    memory = to_nhwc(x)
    mean, var = _batch_statistics(memory)
    y = _normalised(memory, gamma, beta, mean, 1 / np.sqrt(var + eps), z, relu)
    return y, mean.astype(x.dtype), var.astype(x.dtype)


@kernel(BATCHNORM2D_FPROP_INFER, device="cpu", step=1, note="one fused pass", supports=_not_empty)
def fprop_infer_numba(x, gamma, beta, mean, inv_std, z, *, relu):
    return _normalised(to_nhwc(x), gamma, beta, mean, inv_std, z, relu)


@kernel(
    BATCHNORM2D_BWD,
    device="cpu",
    step=1,
    note="one pass for both sums (it writes dz), one for dx",
    supports=_not_empty,
)
def bwd_numba(dy, x, y, gamma, beta, mean, inv_std, *, training, relu, residual):
    n, c, h, w = x.shape
    if relu and y is None:
        y = fprop_infer_numba(x, gamma, beta, mean, inv_std, None, relu=True)
    x, g = to_nhwc(x).ravel(), to_nhwc(dy).ravel()
    y = to_nhwc(y).ravel() if relu else g  # never read without relu
    dz, dz_memory = empty_nhwc(n, c, h, w, x.dtype) if residual and relu else (None, x)
    length, block, count = _blocks(x, c)
    partial = empty((count, 2, c), np.float64)
    means = _repeated(length, x.dtype, mean)[0]
    _sums(count, g, x, y, dz_memory.reshape(-1), means, relu, dz is not None, block, partial)
    dbeta, dgamma = partial.sum(0)
    dgamma *= inv_std
    if dz is not None:  # masked already
        g, relu = dz_memory.reshape(-1), False
    scale, m = np.multiply(gamma, inv_std, dtype=np.float64), len(x) // c
    vectors = _repeated(length, x.dtype, mean, scale, scale * dbeta / m, scale * inv_std * dgamma / m)
    dx, memory = empty_nhwc(n, c, h, w, x.dtype)
    _dx(-(-x.size // block), g, x, y, memory.reshape(-1), *vectors, relu, training, block)
    return dx, dgamma.astype(x.dtype), dbeta.astype(x.dtype), dz


def _blocks(x, c):
    """(length of a super row, numbers in a block, number of blocks) for a flat x of c channels."""
    length = c * -(-_LENGTH // c)
    block = length * max(1, _BLOCK // length)
    return length, block, -(-x.size // block)


def _repeated(length, dtype, *vectors):
    """Vectors over channels, as the rows of an array of `length` columns."""
    return np.tile(np.stack(vectors), length // vectors[0].size).astype(dtype)


def _batch_statistics(x):
    """Mean and biased variance of x (N, H, W, C) over N, H, W in float64."""
    c = x.shape[3]
    x = x.ravel()
    length, block, count = _blocks(x, c)
    partial = empty((count, 2, c), np.float64)
    _statistics(count, x, length, block, partial)
    # Parts of unequal size, merged (Chan, Golub & LeVeque 1983, equation 1.5, for all parts at once)
    sizes = np.full((count, 1), block // c)
    sizes[-1] = (x.size - (count - 1) * block) // c
    with np.errstate(invalid="ignore"):  # an Inf in x makes mean and variance NaN, not a warning
        mean = (sizes * partial[:, 0]).sum(0) / sizes.sum()
        squares = partial[:, 1].sum(0) + (sizes * (partial[:, 0] - mean) ** 2).sum(0)
    return mean, squares / sizes.sum()


def _normalised(x, gamma, beta, mean, inv_std, z, relu):
    """act(gamma * (x - mean) * inv_std + beta + z) for x (N, H, W, C), logically NCHW."""
    n, h, w, c = x.shape
    y, memory = empty_nhwc(n, c, h, w, x.dtype)
    x = x.ravel()
    length, block, _ = _blocks(x, c)
    vectors = _repeated(length, x.dtype, mean, gamma * inv_std, beta)
    z_row = x if z is None else to_nhwc(z).ravel()
    _normalise(-(-x.size // block), x, z_row, memory.reshape(-1), *vectors, z is not None, relu, block)
    return y


@parallel()
def _statistics(b, x, length, block, partial):
    first = b * block
    _block_statistics(x[first : first + block], length, partial[b])


@helper()
def _block_statistics(x, length, out):
    """The mean, and the sum of squared distances from it, of every channel: out (2, C)."""
    c = out.shape[1]
    n = x.size // c
    total = np.zeros(length)
    for first in range(0, x.size, length):
        row = x[first : first + length]
        for l in range(row.size):
            total[l] += row[l]
    _fold(total, out[0])
    shift = np.empty(length, x.dtype)
    for l in range(length):
        shift[l] = out[0, l % c] / n
    total[:] = 0
    for first in range(0, x.size, length):
        row = x[first : first + length]
        for l in range(row.size):
            d = row[l] - shift[l]
            total[l] += d * d
    _fold(total, out[1])
    for k in range(c):
        out[0, k] /= n
        rounding = out[0, k] - shift[k]  # distances were taken from the mean as x's precision holds it
        out[1, k] = max(out[1, k] - n * rounding * rounding, 0.0)


@helper()
def _fold(total, out):
    """Sum the positions of a super row into their channels."""
    out[:] = 0
    for first in range(0, total.size, out.size):
        for k in range(out.size):
            out[k] += total[first + k]


@parallel()
def _normalise(b, x, z, y, mean, scale, beta, add, relu, block):
    first = b * block
    last = first + block
    _normalise_block(x[first:last], z[first:last], y[first:last], mean, scale, beta, add, relu)


@helper()
def _normalise_block(x, z, y, mean, scale, beta, add, relu):
    zero = x.dtype.type(0)
    for first in range(0, x.size, mean.size):
        last = first + mean.size
        row, skip, out = x[first:last], z[first:last], y[first:last]
        for l in range(row.size):
            v = (row[l] - mean[l]) * scale[l] + beta[l]
            if add:
                v += skip[l]
            if relu:
                v = zero if v <= zero else v  # a NaN stays
            out[l] = v


@parallel()
def _sums(b, dy, x, y, dz, mean, relu, residual, block, partial):
    first = b * block
    last = first + block
    _block_sums(dy[first:last], x[first:last], y[first:last], dz[first:last], mean, relu, residual, partial[b])


@helper()
def _block_sums(dy, x, y, dz, mean, relu, residual, out):
    """Sums of g and of g * (x - mean) of every channel: out (2, C). Writes g into dz if there is a residual."""
    zero = x.dtype.type(0)
    plain, weighted = np.zeros(mean.size, x.dtype), np.zeros(mean.size, x.dtype)
    for first in range(0, x.size, mean.size):
        last = first + mean.size
        g, row, active, skip = dy[first:last], x[first:last], y[first:last], dz[first:last]
        for l in range(row.size):
            v = g[l]
            if relu:
                v = v if active[l] > zero else zero
            if residual:
                skip[l] = v
            plain[l] += v
            weighted[l] += v * (row[l] - mean[l])
    _fold(plain, out[0])
    _fold(weighted, out[1])


@parallel()
def _dx(b, g, x, y, dx, mean, scale, constant, slope, relu, training, block):
    first = b * block
    last = first + block
    _dx_block(g[first:last], x[first:last], y[first:last], dx[first:last], mean, scale, constant, slope, relu, training)


@helper()
def _dx_block(g, x, y, dx, mean, scale, constant, slope, relu, training):
    """dx = scale * g - constant - slope * (x - mean), and scale * g in evaluation."""
    zero = x.dtype.type(0)
    for first in range(0, x.size, mean.size):
        last = first + mean.size
        upstream, row, active, out = g[first:last], x[first:last], y[first:last], dx[first:last]
        for l in range(row.size):
            v = upstream[l]
            if relu:
                v = v if active[l] > zero else zero
            v *= scale[l]
            if training:
                v -= constant[l] + slope[l] * (row[l] - mean[l])
            out[l] = v
