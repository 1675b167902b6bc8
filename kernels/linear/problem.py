"""The fully connected layer as three problems: x (N, I), w (O, I), b (O,) or None, y and dy (N, O).

    fprop   y[n, o] = b[o] + sum over i of x[n, i] * w[o, i]
    dgrad   dx[n, i] = sum over o of dy[n, o] * w[o, i]
    wgrad   dw[o, i] = sum over n of dy[n, o] * x[n, i]

(Each the same as a 1x1 convolution of images of one pixel.)
"""

from __future__ import annotations

import numpy as np

from ..registry import BENCH, TEST, Case, Problem, of_magnitudes


def fprop_reference(x, w, b):
    """y, as the formula says."""
    y = np.einsum("ni,oi->no", x, w)
    return y if b is None else y + b


def dgrad_reference(dy, w):
    """dx, as the formula says."""
    return np.einsum("no,oi->ni", dy, w)


def wgrad_reference(x, dy):
    """dw, as the formula says."""
    return np.einsum("ni,no->oi", x, dy)


def _case(name, n, i, o, bias=True, tags=TEST):
    return Case(name, dict(n=n, i=i, o=o, bias=bias), tags)


CASES = (
    _case("one", 1, 1, 1),
    _case("row", 1, 7, 5),
    _case("odd", 5, 3, 7),
    _case("no_bias", 4, 6, 3, bias=False),
    _case("tile", 12, 16, 32),
    _case("wide", 37, 70, 33),  # full vectors and tails on every side
    _case("long_sum", 3, 515, 2),
    _case("panels", 6, 128, 11),
    _case("panels_wide", 70, 320, 66),  # more than one task each way
    _case("imagenet_fc_8", 8, 512, 1000, tags=BENCH),
    _case("imagenet_fc_64", 64, 512, 1000, tags=BENCH),
    _case("cifar_fc", 128, 64, 10, tags=BENCH),
)


def _draw(case, rng, *axes):
    return rng.standard_normal([case.params[axis] for axis in axes])


def _fprop_inputs(case, rng):
    b = _draw(case, rng, "o") if case.params["bias"] else None
    return dict(x=_draw(case, rng, "n", "i"), w=_draw(case, rng, "o", "i"), b=b), {}


def _dgrad_inputs(case, rng):
    return dict(dy=_draw(case, rng, "n", "o"), w=_draw(case, rng, "o", "i")), {}


def _wgrad_inputs(case, rng):
    return dict(x=_draw(case, rng, "n", "i"), dy=_draw(case, rng, "n", "o")), {}


def _bytes(n, i, o, dtype):
    """Each of the three matrices once; a bias is nothing beside them."""
    return dtype.itemsize * (n * i + o * i + n * o)


LINEAR_FPROP = Problem(
    "linear_fprop",
    fprop_reference,
    _fprop_inputs,
    CASES,
    flops=lambda x, w, b: 2 * x.shape[0] * x.shape[1] * w.shape[0],
    bytes_moved=lambda x, w, b: _bytes(*x.shape, w.shape[0], x.dtype),
    error_scale=of_magnitudes(fprop_reference),
)
LINEAR_DGRAD = Problem(
    "linear_dgrad",
    dgrad_reference,
    _dgrad_inputs,
    CASES,
    flops=lambda dy, w: 2 * dy.shape[0] * w.shape[0] * w.shape[1],
    bytes_moved=lambda dy, w: _bytes(dy.shape[0], w.shape[1], w.shape[0], dy.dtype),
    error_scale=of_magnitudes(dgrad_reference),
)
LINEAR_WGRAD = Problem(
    "linear_wgrad",
    wgrad_reference,
    _wgrad_inputs,
    CASES,
    flops=lambda x, dy: 2 * x.shape[0] * x.shape[1] * dy.shape[1],
    bytes_moved=lambda x, dy: _bytes(*x.shape, dy.shape[1], x.dtype),
    error_scale=of_magnitudes(wgrad_reference),
)
