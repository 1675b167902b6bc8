"""Batch normalisation of 16-bit activations on the CPU: in float32 by the best kernel there is, rounded once."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..registry import HALVES, Problem, kernel, kernels
from .problem import BATCHNORM2D_BWD, BATCHNORM2D_FPROP_INFER, BATCHNORM2D_FPROP_TRAIN

_NOTE = "float32's, rounded"


def _dtypes_fit(*arrays, **_):
    """Activations of 16 bits, all else float32."""
    return all(a is None or (a.dtype.itemsize == (2 if a.ndim == 4 else 4)) for a in arrays)


@kernel(BATCHNORM2D_FPROP_TRAIN, device="cpu", step=1, note=_NOTE, supports=_dtypes_fit, dtypes=HALVES)
def fprop_train_half(x, gamma, beta, z, *, eps, relu):
    y, mean, var = _in_float32(BATCHNORM2D_FPROP_TRAIN, x, gamma, beta, z, eps=eps, relu=relu)
    return y.astype(x.dtype), mean, var


@kernel(BATCHNORM2D_FPROP_INFER, device="cpu", step=1, note=_NOTE, supports=_dtypes_fit, dtypes=HALVES)
def fprop_infer_half(x, gamma, beta, mean, inv_std, z, *, relu):
    return _in_float32(BATCHNORM2D_FPROP_INFER, x, gamma, beta, mean, inv_std, z, relu=relu).astype(x.dtype)


@kernel(BATCHNORM2D_BWD, device="cpu", step=1, note=_NOTE, supports=_dtypes_fit, dtypes=HALVES)
def bwd_half(dy, x, y, gamma, beta, mean, inv_std, *, training, relu, residual):
    params = dict(training=training, relu=relu, residual=residual)
    dx, dgamma, dbeta, dz = _in_float32(BATCHNORM2D_BWD, dy, x, y, gamma, beta, mean, inv_std, **params)
    return dx.astype(x.dtype), dgamma, dbeta, None if dz is None else dz.astype(x.dtype)


def _in_float32(problem: Problem, *arrays: Any, **params: Any) -> Any:
    wide = [None if a is None else a.astype(np.float32, copy=False) for a in arrays]
    rivals = [k for k in kernels(problem.name, "cpu") if k.takes(*wide, **params)]
    return max(rivals, key=lambda k: k.rank_for(*wide, **params))(*wide, **params)
