"""Batch normalisation as three problems. Logical shapes: x, y, z, dy, dx (N, C, H, W); all else (C,). m = N H W.

    y = act(gamma * (x - mean) * inv_std + beta + z)        inv_std = 1 / sqrt(var + eps)

act is ReLU or nothing, z a residual of x's shape or None. In training mean and (biased) var are those of x over
N, H, W; in evaluation mean and inv_std are given. With g = dy where y > 0 (all of dy without ReLU), and
x_hat = (x - mean) * inv_std:

    dbeta = sum g      dgamma = sum g * x_hat      dz = g
    dx = gamma * inv_std * (g - dbeta/m - x_hat * dgamma/m)    in training
    dx = gamma * inv_std * g                                   in evaluation

Where x, y, z, dy, dx have 16 bits all else is float32, and everything is computed in float32.

Source: Ioffe & Szegedy 2015 (arXiv:1502.03167), algorithm 1 and section 3. The definitions take complex numbers as
the analytic functions that they are (no conjugate, no absolute value), so that a complex step passes through.
"""

from __future__ import annotations

import numpy as np

from ..registry import BENCH, TEST, Case, Problem, computed_in

_AXES = (0, 2, 3)


def per_channel(v):
    """(C,) as (C, 1, 1), to broadcast over (N, C, H, W)."""
    return v[:, None, None]


def _sum(v):
    """Over N, H, W, axis by axis: the shorter the chains of additions, the smaller their rounding error."""
    return v.sum(3).sum(2).sum(0)


def count(x) -> int:
    """How many numbers of x (N, C, H, W) a channel has; 1 where x is empty, so that its statistics are 0."""
    return max(1, x.shape[0] * x.shape[2] * x.shape[3])


def _activated(v, z, relu):
    v = v if z is None else v + z
    return np.where(v.real <= 0, v.dtype.type(0), v) if relu else v  # a NaN stays


def fprop_train_reference(x, gamma, beta, z, *, eps, relu):
    """y, mean and the biased variance, in two passes."""
    m = count(x)
    mean = _sum(x) / m
    var = _sum((x - per_channel(mean)) ** 2) / m
    return fprop_infer_reference(x, gamma, beta, mean, 1 / np.sqrt(var + eps), z, relu=relu), mean, var


def fprop_infer_reference(x, gamma, beta, mean, inv_std, z, *, relu):
    """y, for a given mean and inv_std."""
    return _activated((x - per_channel(mean)) * per_channel(gamma * inv_std) + per_channel(beta), z, relu)


def bwd_reference(dy, x, y, gamma, beta, mean, inv_std, *, training, relu, residual):
    """dx, dgamma, dbeta, and dz where a residual was added before a ReLU (without ReLU dz is dy itself: None).

    y is None where its sign is known without it: there is no ReLU, or no residual, so that x tells.
    """
    if relu and y is None:
        y = fprop_infer_reference(x, gamma, beta, mean, inv_std, None, relu=True)
    g = np.where(y.real > 0, dy, dy.dtype.type(0)) if relu else dy
    x_hat = (x - per_channel(mean)) * per_channel(inv_std)
    dbeta, dgamma = _sum(g), _sum(g * x_hat)
    inner = g
    if training:
        m = count(x)
        inner = g - per_channel(dbeta / m) - x_hat * per_channel(dgamma / m)
    return per_channel(gamma * inv_std) * inner, dgamma, dbeta, g if residual and relu else None


def _case(name, n, c, hw, relu=False, z=False, offset=0.0, scale=1.0, training=True, tags=TEST):
    params = dict(n=n, c=c, hw=hw, relu=relu, z=z, offset=offset, scale=scale, training=training)
    return Case(name, params, tags)


def _layer(name, n, c, size, z=False):
    """A layer of a ResNet in training; the last of a block also adds the skip."""
    return _case(name, n, c, (size, size), relu=True, z=z, tags=BENCH)


CASES = (
    _case("plain", 3, 5, (5, 7)),
    _case("relu", 3, 3, (4, 7), relu=True),
    _case("add", 2, 7, (5, 3), z=True),
    _case("add_relu", 3, 6, (7, 5), relu=True, z=True),
    _case("one_channel", 2, 1, (5, 9), relu=True, z=True),
    _case("one_pixel_images", 9, 11, (1, 1)),
    _case("large_mean", 5, 3, (9, 7), offset=1000.0),  # E[x²] - E[x]² cancels here
    _case("small_variance", 4, 3, (5, 5), scale=2e-3),  # where eps matters
    _case("several_blocks", 3, 20, (31, 37), relu=True, z=True),  # more than a cache block, and a tail
    _case("several_blocks_large_mean", 3, 20, (31, 37), offset=1000.0),
    _case("wide", 2, 300, (5, 13), relu=True),
    _case("panels", 4, 16, (5, 8)),  # whole rows of vectors
    _case("panels_relu", 8, 24, (4, 6), relu=True),
    _case("panels_add", 4, 16, (6, 6), z=True),
    _case("panels_several_blocks", 9, 64, (5, 5), relu=True, z=True, offset=1000.0),
    _case("panels_wide", 5, 320, (7, 6), relu=True, offset=-3.0),
    _layer("cifar_stage1", 128, 16, 32),
    _layer("cifar_stage1_add", 128, 16, 32, z=True),
    _layer("cifar_stage2_add", 128, 32, 16, z=True),
    _layer("cifar_stage3_add", 128, 64, 8, z=True),
    _layer("imagenet_layer1", 8, 64, 56),
    _layer("imagenet_layer1_expand_add", 8, 256, 56, z=True),
)
BWD_CASES = (
    *CASES,
    _case("evaluation", 3, 5, (5, 7), training=False),
    _case("evaluation_add_relu", 2, 3, (6, 5), relu=True, z=True, training=False),
)


def _forward_inputs(case, rng):
    p = case.params
    c, shape = p["c"], (p["n"], p["c"], *p["hw"])
    std = p["scale"] * np.exp(0.3 * rng.standard_normal(c))
    mean = std * rng.standard_normal(c) + p["offset"]
    x = per_channel(mean) + per_channel(std) * rng.standard_normal(shape)
    arrays = dict(x=x, gamma=rng.standard_normal(c), beta=rng.standard_normal(c))
    return arrays, rng.standard_normal(shape) if p["z"] else None, dict(relu=p["relu"])


def _train_inputs(case, rng):
    arrays, z, params = _forward_inputs(case, rng)
    return arrays | dict(z=z), dict(eps=1e-5) | params


def _statistics(x):
    mean = x.mean(_AXES)
    return dict(mean=mean, inv_std=1 / np.sqrt(((x - per_channel(mean)) ** 2).mean(_AXES) + 1e-5))


def _infer_inputs(case, rng):
    arrays, z, params = _forward_inputs(case, rng)
    return arrays | _statistics(arrays["x"]) | dict(z=z), params


def _bwd_inputs(case, rng):
    arrays, z, params = _forward_inputs(case, rng)
    x, gamma, stats = arrays["x"], arrays["gamma"], _statistics(arrays["x"])
    y = None
    if params["relu"] and z is not None:
        y = fprop_infer_reference(x, gamma, arrays["beta"], **stats, z=z, relu=True)
    dy = 0.5 + rng.standard_normal(x.shape)
    arrays = dict(dy=dy, x=x, y=y, gamma=gamma, beta=arrays["beta"], **stats)
    return arrays, dict(training=case.params["training"], residual=z is not None) | params


def _train_error(x, gamma, beta, z, *, eps, relu):
    """The mean is off by its sum's rounding. Stable algorithms for the variance (two passes, Welford, merged parts)
    lose up to kappa = sqrt(1 + mean²/var); E[x²] - E[x]² loses kappa² (Chan, Golub & LeVeque 1983, table 1)."""
    _, mean, var = fprop_train_reference(x, gamma, beta, z, eps=eps, relu=relu)
    magnitude = np.abs(x).mean(_AXES)
    return (
        _infer_error(x, gamma, beta, magnitude, 1 / np.sqrt(var + eps), z, relu=relu),
        magnitude,
        np.sqrt(var * (var + mean**2)),
    )


def _infer_error(x, gamma, beta, mean, inv_std, z, *, relu):
    """The definition, all terms taken by magnitude."""
    y = per_channel(np.abs(gamma) * inv_std) * (np.abs(x) + per_channel(np.abs(mean))) + per_channel(np.abs(beta))
    return y if z is None else y + np.abs(z)


def _bwd_error(dy, x, y, gamma, beta, mean, inv_std, *, training, relu, residual):
    """The definition, all terms taken by magnitude (x - mean as one: it is a single rounding). dz is exact."""
    if relu and y is None:
        y = fprop_infer_reference(x, gamma, beta, mean, inv_std, None, relu=True)
    g = np.abs(dy) * (y > 0) if relu else np.abs(dy)
    x_hat = np.abs(x - per_channel(mean)) * per_channel(inv_std)
    dbeta, dgamma = _sum(g), _sum(g * x_hat)
    inner = g
    if training:
        m = count(x)
        inner = g + per_channel(dbeta / m) + x_hat * per_channel(dgamma / m)
    return per_channel(np.abs(gamma) * inv_std) * inner, dgamma, dbeta, 0 * g if residual and relu else None


def _size(x) -> int:
    return int(np.prod(x.shape))


def _train_flops(x, gamma, beta, z, *, eps, relu):
    return 4 * _size(x) + _infer_flops(x, gamma, beta, None, None, z, relu=relu)


def _infer_flops(x, gamma, beta, mean, inv_std, z, *, relu):
    return (3 + (z is not None) + relu) * _size(x)


def _bwd_flops(dy, x, y, gamma, beta, mean, inv_std, *, training, relu, residual):
    return (4 + (5 if training else 1) + relu) * _size(x)


def _train_bytes(x, gamma, beta, z, *, eps, relu):
    """x is read twice: no y is known before the last x was seen."""
    return x.dtype.itemsize * (3 + (z is not None)) * _size(x)


def _infer_bytes(x, gamma, beta, mean, inv_std, z, *, relu):
    return x.dtype.itemsize * (2 + (z is not None)) * _size(x)


def _bwd_bytes(dy, x, y, gamma, beta, mean, inv_std, *, training, relu, residual):
    """The sums read dy, x (and y, and write dz); dx needs dy or dz once more, and x."""
    passes = 2 + (y is not None) + (residual and relu) + 1 + (training or (relu and not residual)) + 1
    return x.dtype.itemsize * passes * _size(x)


_PARAMETERS = ("gamma", "beta", "mean", "inv_std")  # as are the running statistics: 16 bits would lose their steps

BATCHNORM2D_FPROP_TRAIN = Problem(
    "batchnorm2d_fprop_train",
    fprop_train_reference,
    _train_inputs,
    CASES,
    _train_flops,
    _train_bytes,
    _train_error,
    wide=_PARAMETERS,
    output_dtypes=lambda dtype, **_: (dtype, computed_in(dtype), computed_in(dtype)),
)
BATCHNORM2D_FPROP_INFER = Problem(
    "batchnorm2d_fprop_infer",
    fprop_infer_reference,
    _infer_inputs,
    CASES,
    _infer_flops,
    _infer_bytes,
    _infer_error,
    wide=_PARAMETERS,
)
BATCHNORM2D_BWD = Problem(
    "batchnorm2d_bwd",
    bwd_reference,
    _bwd_inputs,
    BWD_CASES,
    _bwd_flops,
    _bwd_bytes,
    _bwd_error,
    wide=_PARAMETERS,
    output_dtypes=lambda dtype, **_: (dtype, computed_in(dtype), computed_in(dtype), dtype),
)
