"""Elementwise problems of a residual block, for arrays of any (equal) shapes.

    relu_fprop    y = max(x, 0), and NaN where x is NaN
    relu_bwd      dx = dy where y > 0, else 0: at 0 the subgradient is 0 (as cuDNN and PyTorch choose)
    add_fprop     y = a + b
    accumulate    a = a + b, written into a
    cast          y = x rounded to another dtype, to the nearest, ties to even; what is too large becomes infinite

Complex numbers are rectified by their real part, which is analytic on either side of the kink.
"""

from __future__ import annotations

import numpy as np

from ..registry import BENCH, HALVES, TEST, Case, Problem


def relu_fprop_reference(x):
    """y"""
    return np.where(x.real <= 0, x.dtype.type(0), x)


def relu_bwd_reference(dy, y):
    """dx, from the output of the forward pass."""
    return np.where(y.real > 0, dy, dy.dtype.type(0))


def add_fprop_reference(a, b):
    """y"""
    return np.asarray(a + b)


def accumulate_reference(a, b):
    """Overwrite a by a + b."""
    a[...] = a + b


def cast_reference(x, *, dtype):
    """y, of the dtype of that name, in the layout of x."""
    return x.astype(dtype)


def _case(name, *shape, tags=TEST):
    return Case(name, dict(shape=shape), tags)


CASES = (
    _case("one_number"),
    _case("vector", 17),
    _case("matrix", 5, 7),
    _case("activation", 2, 3, 5, 4),
    _case("five_axes", 2, 3, 1, 4, 3),
    _case("empty", 0, 3),
    _case("several_blocks", 3, 7, 41, 43),
    _case("cifar_stage1", 128, 16, 32, 32, tags=BENCH),
    _case("cifar_stage3", 128, 64, 8, 8, tags=BENCH),
    _case("imagenet_stem", 8, 64, 112, 112, tags=BENCH),
    _case("imagenet_layer1", 8, 256, 56, 56, tags=BENCH),
)


def _draw(case, rng):
    x = np.asarray(rng.standard_normal(case.params["shape"]))
    return np.where(rng.random(x.shape) < 0.1, 0.0, x)  # exact zeros: the kink


def _relu_inputs(case, rng):
    return dict(x=_draw(case, rng)), {}


def _relu_bwd_inputs(case, rng):
    return dict(dy=_draw(case, rng), y=relu_fprop_reference(_draw(case, rng))), {}


def _add_inputs(case, rng):
    return dict(a=_draw(case, rng), b=_draw(case, rng)), {}


CAST_CASES = tuple(
    Case(f"{case.name}_to_{dtype}", dict(shape=case.params["shape"], dtype=dtype), case.tags)
    for case in CASES
    for dtype in (*HALVES, "float32")
)


def _cast_inputs(case, rng):
    x = _draw(case, rng) * 10.0 ** rng.integers(-9, 5, case.params["shape"])  # also subnormal ones
    return dict(x=x), dict(dtype=case.params["dtype"])


def _size(x, *_) -> int:
    return int(np.prod(x.shape))


def _relu_bytes(x):
    return 2 * _size(x) * x.dtype.itemsize


def _binary_bytes(a, b):
    return 3 * _size(a) * a.dtype.itemsize


def _exact(x, *_):
    """ReLU only chooses: no rounding at all."""
    return np.zeros(x.shape)


def _one_rounding(a, b):
    return np.abs(a + b)


RELU_FPROP = Problem("relu_fprop", relu_fprop_reference, _relu_inputs, CASES, _size, _relu_bytes, _exact)
RELU_BWD = Problem("relu_bwd", relu_bwd_reference, _relu_bwd_inputs, CASES, _size, _binary_bytes, _exact)
ADD_FPROP = Problem("add_fprop", add_fprop_reference, _add_inputs, CASES, _size, _binary_bytes, _one_rounding)
ACCUMULATE = Problem(
    "accumulate",
    accumulate_reference,
    _add_inputs,
    CASES,
    _size,
    _binary_bytes,
    lambda a, b: (_one_rounding(a, b),),
    writes=("a",),
)
CAST = Problem(
    "cast",
    cast_reference,
    _cast_inputs,
    CAST_CASES,
    flops=lambda x, *, dtype: _size(x),
    bytes_moved=lambda x, *, dtype: _size(x) * (x.dtype.itemsize + np.dtype(dtype).itemsize),
    error_scale=lambda x, *, dtype: np.abs(x) / 2,
    output_dtypes=lambda _, *, dtype: (dtype,),
)
