"""The fully connected layer in plain NumPy: the definitions, then one matrix product (BLAS)."""

import numpy as np

from ..memory import empty
from ..registry import kernel
from ..widened import widened
from .problem import LINEAR_DGRAD, LINEAR_FPROP, LINEAR_WGRAD, dgrad_reference, fprop_reference, wgrad_reference

kernel(LINEAR_FPROP, device="cpu", step=0, note="the definition, as an einsum", dtypes=("any",))(fprop_reference)
kernel(LINEAR_DGRAD, device="cpu", step=0, note="the definition, as an einsum", dtypes=("any",))(dgrad_reference)
kernel(LINEAR_WGRAD, device="cpu", step=0, note="the definition, as an einsum", dtypes=("any",))(wgrad_reference)


def _product(a, b):
    return np.matmul(a, b, out=empty((a.shape[0], b.shape[1]), np.result_type(a, b)))


@kernel(LINEAR_FPROP, device="cpu", step=1, note="one BLAS product", dtypes=("any",))
def linear_fprop_blas(x, w, b):
    y = _product(x, w.T)
    if b is not None:
        y += b
    return y


@kernel(LINEAR_DGRAD, device="cpu", step=1, note="one BLAS product", dtypes=("any",))
def linear_dgrad_blas(dy, w):
    return _product(dy, w)


@kernel(LINEAR_WGRAD, device="cpu", step=1, note="one BLAS product", dtypes=("any",))
def linear_wgrad_blas(x, dy):
    return _product(dy.T, x)


widened(LINEAR_FPROP)
widened(LINEAR_DGRAD)
widened(LINEAR_WGRAD)
