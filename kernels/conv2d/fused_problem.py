"""Normalise, activate, convolve, as one problem in three directions: what training fuses around a convolution.

x (N, C, H, W) is what an earlier convolution left, not yet normalised; scale = gamma inv_std and shift = beta -
mean scale (C,) are its BatchNorm's, so that

    v = relu(scale x + shift)      y = conv2d(v, w)      mean, var: of y over N, P, Q (biased), for the next BatchNorm

v is padded with zeros, as a stored activation would be. Without scale and shift (None, as at a block's entry) v is x.

Backward, dy is the gradient of y. Where y itself went into a BatchNorm and ReLU, whose backward is per channel
dx = f0 g + f1 x + f2, it comes in parts: g in the place of dy, y, and f (3, K), and means d = f0 g + f1 y + f2. Without
f it is d.

    dgrad    g = dgrad(d, w) where scale x + shift > 0, else 0
             dbeta = sum g, dgamma = sum g (x - mean) inv_std, over N, H, W (m numbers), and the f of x (3, C):
             f0 = scale, f1 = -scale inv_std dgamma / m, f2 = -scale dbeta / m - f1 mean
             (without x: g = dgrad(d, w), and None three times)
    wgrad    dw = wgrad(v, d)

So neither v nor d is stored, nor read a second time for its sums. cuDNN's names: scale-bias-ReLU-conv-genstats,
dgrad-dReLU-dBN and BN-wgrad ("Graph API", pre-compiled and runtime fusions). f is derived in minires/ops/batch_norm.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..registry import BENCH, TEST, Case, Problem, computed_in
from .problem import dgrad_reference, fprop_reference, out_hw, wgrad_reference

_AXES = (0, 2, 3)


def per_channel(v):
    """(C,) as (C, 1, 1), to broadcast over (N, C, H, W)."""
    return v[:, None, None]


def activated(x, scale, shift):
    """relu(scale x + shift), a NaN staying one; x where scale is None."""
    if scale is None:
        return x
    u = per_channel(scale) * x + per_channel(shift)
    return np.where(u <= 0, u.dtype.type(0), u)


def whole_gradient(dy, y, f):
    """f0 dy + f1 y + f2; dy where f is None."""
    return dy if f is None else per_channel(f[0]) * dy + per_channel(f[1]) * y + per_channel(f[2])


def norm_act_fprop_reference(x, scale, shift, w, *, stride, padding, dilation, groups):
    """y, mean, var."""
    window = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    return with_statistics(fprop_reference(activated(x, scale, shift), w, **window))


def with_statistics(y):
    """y, and its mean and variance (biased) over N, P, Q."""
    mean = y.mean(_AXES)
    return y, mean, ((y - per_channel(mean)) ** 2).mean(_AXES)


def norm_act_dgrad_reference(
    dy, y, f, w, x, scale, shift, mean, inv_std, *, stride, padding, dilation, groups, input_hw
):
    """g, dgamma, dbeta, f of x."""
    window = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    return masked_sums(
        dgrad_reference(whole_gradient(dy, y, f), w, **window, input_hw=input_hw), x, scale, shift, mean, inv_std
    )


def masked_sums(dv, x, scale, shift, mean, inv_std):
    """What dgrad does with the gradient dv of relu(scale x + shift): g, dgamma, dbeta, f of x."""
    if x is None:
        return dv, None, None, None
    g = np.where(per_channel(scale) * x + per_channel(shift) > 0, dv, dv.dtype.type(0))
    dbeta, dgamma = g.sum(_AXES), (g * ((x - per_channel(mean)) * per_channel(inv_std))).sum(_AXES)
    m = x.size // x.shape[1]
    f1 = -scale * inv_std * dgamma / m
    return g, dgamma, dbeta, np.stack([scale, f1, -scale * dbeta / m - f1 * mean])


def norm_act_wgrad_reference(x, scale, shift, dy, y, f, *, stride, padding, dilation, groups, kernel_hw):
    """dw."""
    window = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    return wgrad_reference(activated(x, scale, shift), whole_gradient(dy, y, f), **window, kernel_hw=kernel_hw)


def _case(name, n, c, hw, k, rs, stride=1, padding=0, norm=True, parts=True, groups=1, tags=TEST):
    """norm: whether x is normalised on the way. parts: whether dy comes as g, y and f."""
    window = dict(stride=(stride,) * 2, padding=(padding,) * 2, dilation=(1, 1), groups=groups)
    return Case(name, dict(n=n, c=c, hw=hw, k=k, rs=rs, norm=norm, parts=parts, **window), tags)


def _layer(name, c, size, k, taps, stride=1, norm=True):
    """A layer of ResNet-50."""
    return _case(name, 8, c, (size, size), k, (taps, taps), stride, taps // 2, norm, tags=BENCH)


CASES = (
    _case("3x3_3_channels", 2, 3, (7, 5), 8, (3, 3), padding=1),
    _case("3x3_stride2", 2, 8, (9, 7), 16, (3, 3), 2, 1),
    _case("1x1", 2, 24, (5, 3), 40, (1, 1)),
    _case("1x1_stride2_plain", 2, 16, (7, 5), 8, (1, 1), 2, norm=False, parts=False),  # a projection: no norm before it
    _case("5x3_padded_by_2", 1, 8, (6, 9), 8, (5, 3), padding=2, parts=False),
    _case("entry", 2, 8, (8, 9), 16, (3, 3), padding=1, norm=False),
    _case("several_tiles", 1, 24, (11, 13), 136, (3, 3), 1, 1),  # of 128 pixels and 128 channels, tails, 7 tiles deep
    _case("groups", 2, 8, (5, 6), 8, (3, 3), 1, 1, groups=2),
    _layer("layer1_reduce", 256, 56, 64, 1, norm=False),
    _layer("layer1", 64, 56, 64, 3),
    _layer("layer1_expand", 64, 56, 256, 1),
    _layer("layer2_down", 128, 56, 128, 3, 2),
    _layer("layer3", 256, 14, 256, 3),
    _layer("layer4", 512, 7, 512, 3),
)


def _window(p) -> dict:
    return {name: p[name] for name in ("stride", "padding", "dilation", "groups")}


def _inputs(case, rng) -> dict[str, Any]:
    """All that the three directions take, in full."""
    p = case.params
    c, k, pq = p["c"], p["k"], out_hw(p["hw"], p["rs"], p["stride"], p["padding"], p["dilation"])
    x = rng.standard_normal((p["n"], c, *p["hw"])) + 0.5 * rng.standard_normal((c, 1, 1))
    inv_std, mean = 1 / np.sqrt(x.var(_AXES) + 1e-5), x.mean(_AXES)
    scale = rng.uniform(0.5, 1.5, c) * rng.choice([-1.0, 1.0], c) * inv_std
    arrays: dict[str, Any] = dict(
        x=x, scale=scale, shift=0.5 * rng.standard_normal(c) - mean * scale, mean=mean, inv_std=inv_std
    )
    arrays["w"] = rng.standard_normal((k, c // p["groups"], *p["rs"]))
    arrays["dy"], arrays["y"] = rng.standard_normal((2, p["n"], k, *pq))
    arrays["f"] = rng.standard_normal((3, k)) * [[1.0], [0.3], [0.3]]
    if not p["norm"]:
        arrays |= dict.fromkeys(("scale", "shift", "mean", "inv_std"))
    if not p["parts"]:
        arrays |= dict.fromkeys(("y", "f"))
    return arrays


def _fprop_inputs(case, rng):
    arrays = _inputs(case, rng)
    return {name: arrays[name] for name in ("x", "scale", "shift", "w")}, _window(case.params)


def _dgrad_inputs(case, rng):
    arrays = _inputs(case, rng)
    if not case.params["norm"]:
        arrays["x"] = None
    names = ("dy", "y", "f", "w", "x", "scale", "shift", "mean", "inv_std")
    return {name: arrays[name] for name in names}, _window(case.params) | dict(input_hw=case.params["hw"])


def _wgrad_inputs(case, rng):
    arrays = _inputs(case, rng)
    names = ("x", "scale", "shift", "dy", "y", "f")
    return {name: arrays[name] for name in names}, _window(case.params) | dict(kernel_hw=case.params["rs"])


# Error scales: the definition with all terms by magnitude.


def _activated_scale(x, scale, shift):
    if scale is None:
        return np.abs(x)
    magnitude = per_channel(np.abs(scale)) * np.abs(x) + per_channel(np.abs(shift))
    return np.where(activated(x, scale, shift) > 0, magnitude, 0)


def _gradient_scale(dy, y, f):
    return whole_gradient(np.abs(dy), None if y is None else np.abs(y), None if f is None else np.abs(f))


def _fprop_scale(x, scale, shift, w, **window):
    y, *_ = norm_act_fprop_reference(x, scale, shift, w, **window)
    return statistics_scale(y, fprop_reference(_activated_scale(x, scale, shift), np.abs(w), **window))


def statistics_scale(y, y_scale):
    """Error scales of y, mean and var: the mean is off by what y is on average; of the errors of y and mean the
    variance gets 2 |y - mean|, beside those of its own additions (as in batchnorm2d)."""
    _, mean, var = with_statistics(y)
    mean_scale = y_scale.mean(_AXES)
    off = 2 * np.abs(y - per_channel(mean)) * (y_scale + per_channel(mean_scale))
    return y_scale, mean_scale, off.mean(_AXES) + np.sqrt(var * (var + mean**2))


def _dgrad_scale(dy, y, f, w, x, scale, shift, mean, inv_std, *, input_hw, **window):
    dv = dgrad_reference(_gradient_scale(dy, y, f), np.abs(w), **window, input_hw=input_hw)
    if x is None:
        return dv, None, None, None
    g = np.where(per_channel(scale) * x + per_channel(shift) > 0, dv, 0)
    dbeta, dgamma = g.sum(_AXES), (g * np.abs(x - per_channel(mean)) * per_channel(inv_std)).sum(_AXES)
    m = x.size // x.shape[1]
    f1 = np.abs(scale) * inv_std * dgamma / m
    return g, dgamma, dbeta, np.stack([np.abs(scale), f1, np.abs(scale) * dbeta / m + f1 * np.abs(mean)])


def _wgrad_scale(x, scale, shift, dy, y, f, *, kernel_hw, **window):
    factors = _activated_scale(x, scale, shift), _gradient_scale(dy, y, f)
    return wgrad_reference(*factors, **window, kernel_hw=kernel_hw)


def _size(*shape: int) -> int:
    return int(np.prod(shape))


def _bytes(*arrays) -> int:
    return sum(a.dtype.itemsize * _size(*a.shape) for a in arrays if a is not None)


def _y_size(x, w, window) -> int:
    pq = out_hw(x.shape[2:], w.shape[2:], window["stride"], window["padding"], window["dilation"])
    return _size(x.shape[0], w.shape[0], *pq)


def _fprop_flops(x, scale, shift, w, **window):
    return 2 * _y_size(x, w, window) * _size(*w.shape[1:])


def _fprop_bytes(x, scale, shift, w, **window):
    return _bytes(x, scale, shift, w) + x.dtype.itemsize * _y_size(x, w, window)


def _dgrad_flops(dy, y, f, w, *_, **__):
    return 2 * dy.shape[0] * _size(*dy.shape[2:]) * _size(*w.shape)


def _dgrad_bytes(dy, y, f, w, x, scale, shift, mean, inv_std, *, groups, input_hw, **_):
    g = dy.dtype.itemsize * _size(dy.shape[0], w.shape[1] * groups, *input_hw)
    return _bytes(dy, y, f, w, x, scale, shift, mean, inv_std) + g


def _wgrad_flops(x, scale, shift, dy, y, f, *, groups, kernel_hw, **_):
    return 2 * _size(*dy.shape) * x.shape[1] // groups * _size(*kernel_hw)


def _wgrad_bytes(x, scale, shift, dy, y, f, *, groups, kernel_hw, **_):
    dw = x.dtype.itemsize * _size(dy.shape[1], x.shape[1] // groups, *kernel_hw)
    return _bytes(x, scale, shift, dy, y, f) + dw


def _wide_after_first(count: int):
    """Statistics and sums are float32 beside activations of 16 bits."""
    return lambda dtype, **_: (dtype, *[computed_in(dtype)] * count)


CONV2D_NORM_ACT_FPROP = Problem(
    "conv2d_norm_act_fprop",
    norm_act_fprop_reference,
    _fprop_inputs,
    CASES,
    _fprop_flops,
    _fprop_bytes,
    _fprop_scale,
    wide=("scale", "shift"),
    output_dtypes=_wide_after_first(2),
)
CONV2D_NORM_ACT_DGRAD = Problem(
    "conv2d_norm_act_dgrad",
    norm_act_dgrad_reference,
    _dgrad_inputs,
    CASES,
    _dgrad_flops,
    _dgrad_bytes,
    _dgrad_scale,
    wide=("f", "scale", "shift", "mean", "inv_std"),
    output_dtypes=_wide_after_first(3),
)
CONV2D_NORM_ACT_WGRAD = Problem(
    "conv2d_norm_act_wgrad",
    norm_act_wgrad_reference,
    _wgrad_inputs,
    CASES,
    _wgrad_flops,
    _wgrad_bytes,
    _wgrad_scale,
    wide=("scale", "shift", "f"),
)
