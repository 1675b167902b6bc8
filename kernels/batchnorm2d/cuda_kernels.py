"""Batch normalisation on a GPU: two passes over memory forward (statistics, result) and two backward (sums, dx).

Rows of channels-last memory are dealt out to blocks by shape alone, never by what the GPU has, so that every GPU adds
in the same order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..cuda.launch import ALL, Launch, blocks, launch, variants
from ..memory import empty, empty_nhwc, to_nhwc
from ..registry import computed_in, kernel
from .problem import BATCHNORM2D_BWD, BATCHNORM2D_FPROP_INFER, BATCHNORM2D_FPROP_TRAIN

_SOURCE = Path(__file__).with_name("batchnorm2d.cu")
_STATISTICS, _FINISH, _NORMALISE, _SUMS, _FINISH_BWD, _DX = (
    variants(_SOURCE, entry, ALL)
    for entry in ("bn_statistics", "bn_finish", "bn_normalise", "bn_sums", "bn_finish_bwd", "bn_dx")
)
_ROWS = np.dtype([("rows", np.int32), ("channels", np.int32), ("stretch", np.int32)])  # struct Rows
_THREADS, _MOST_CHANNELS = 256, 32
_MOST_BLOCKS = 2048  # enough for the largest GPU
_ALL, _BY_Y, _BY_X = range(3)  # enum Mask
_LEAST_STRETCH = 128  # rows of a block, as long as that leaves few blocks


def _dtypes_fit(*arrays, **_):
    """Activations in one dtype; what there is one of per channel in the dtype that this one is computed in."""
    activations, channels = ({a.dtype.name for a in arrays if a is not None and a.ndim == n} for n in (4, 1))
    return len(activations) == 1 and channels == {computed_in(*activations)}


@kernel(
    BATCHNORM2D_FPROP_TRAIN,
    device="cuda",
    step=1,
    note="moments of row stretches, merged; then one fused pass",
    supports=_dtypes_fit,
    dtypes=ALL,
)
def fprop_train_cuda(x, gamma, beta, z, *, eps, relu):
    rows = to_nhwc(x)
    about, grid, block = _dealt(rows)
    mean, var, inv_std = (empty(gamma.shape, gamma.dtype, x) for _ in range(3))
    partial = empty((grid[0], 2, x.shape[1]), gamma.dtype, x)
    launch(Launch(_STATISTICS[x.dtype.name], grid, block, (rows, partial, about)))
    args = (partial, mean, var, inv_std, grid[0], gamma.dtype.type(eps), about)
    launch(Launch(_FINISH[x.dtype.name], (blocks(x.shape[1], _THREADS),), (_THREADS,), args))
    return _normalised(x, rows, gamma, beta, mean, inv_std, z, relu), mean, var


@kernel(BATCHNORM2D_FPROP_INFER, device="cuda", step=1, note="one fused pass", supports=_dtypes_fit, dtypes=ALL)
def fprop_infer_cuda(x, gamma, beta, mean, inv_std, z, *, relu):
    return _normalised(x, to_nhwc(x), gamma, beta, _dense(mean), _dense(inv_std), z, relu)


@kernel(
    BATCHNORM2D_BWD,
    device="cuda",
    step=1,
    note="one pass for both sums (it writes dz), one for dx",
    supports=_dtypes_fit,
    dtypes=ALL,
)
def bwd_cuda(dy, x, y, gamma, beta, mean, inv_std, *, training, relu, residual):
    n, c, h, w = x.shape
    mask = (_BY_X if y is None else _BY_Y) if relu else _ALL
    g, rows = to_nhwc(dy), to_nhwc(x)
    active = to_nhwc(y) if mask == _BY_Y else g  # an address for the kernels; not read otherwise
    about, grid, block = _dealt(rows)
    dz, skip = empty_nhwc(n, c, h, w, x.dtype, x) if residual and relu else (None, g)
    partial, factors = empty((grid[0], 2, c), gamma.dtype, x), empty((3, c), gamma.dtype, x)
    dgamma, dbeta = empty((c,), gamma.dtype, x), empty((c,), gamma.dtype, x)
    gamma, beta, mean, inv_std = map(_dense, (gamma, beta, mean, inv_std))
    channels = (gamma, beta, mean, inv_std)
    args = (g, rows, active, *channels, skip, partial, mask, dz is not None, about)
    launch(Launch(_SUMS[x.dtype.name], grid, block, args))
    args = (partial, gamma, inv_std, dgamma, dbeta, factors, grid[0], training, about)
    launch(Launch(_FINISH_BWD[x.dtype.name], (blocks(c, _THREADS),), (_THREADS,), args))
    if dz is not None:  # masked already
        g, mask = skip, _ALL
    dx, memory = empty_nhwc(n, c, h, w, x.dtype, x)
    args = (g, rows, active, *channels, factors, memory, mask, training, about)
    launch(Launch(_DX[x.dtype.name], grid, block, args))
    return dx, dgamma, dbeta, dz


def _normalised(x, rows, gamma, beta, mean, inv_std, z, relu):
    y, memory = empty_nhwc(*x.shape, x.dtype, x)
    about, grid, block = _dealt(rows)
    skip = rows if z is None else to_nhwc(z)
    args = (rows, _dense(gamma), _dense(beta), mean, inv_std, skip, memory, z is not None, relu, about)
    launch(Launch(_NORMALISE[x.dtype.name], grid, block, args))
    return y


def _dealt(rows):
    """(struct Rows, grid, block) for (N, H, W, C) memory: which rows and channels a block takes."""
    n, h, w, c = rows.shape
    m = n * h * w
    wide = min(_MOST_CHANNELS, 1 << (c - 1).bit_length())
    columns = blocks(c, wide)
    stretch = max(_LEAST_STRETCH, blocks(m * columns, _MOST_BLOCKS))
    return np.array((m, c, stretch), _ROWS), (blocks(m, stretch), columns), (wide, _THREADS // wide)


def _dense(a):
    return a if a.flags.c_contiguous else a.copy()
