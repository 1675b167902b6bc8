"""Convolution as problems: three directions, and inference.

Logical shapes: x (N, C, H, W), w (K, C/groups, R, S), y and dy (N, K, P, Q).

    y[n, k, p, q] = sum over c, r, s of x[n, c, p*u + r*l - a, q*v + s*m - b] * w[k, c, r, s]

with stride (u, v), dilation (l, m), padding (a, b), and zeros outside x; with groups, the c of k's own group.
conv2d_bias_act is what inference needs, with BatchNorm folded into w and b: act(y + b (+ z)), z the skip connection.
(Cross-correlation, as in every framework. Source: cuDNN API reference, cudnnConvolutionForward.)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..registry import BENCH, TEST, Case, Problem, of_magnitudes

Pair = tuple[int, int]


def out_size(n: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    """How many positions a filter of `taps` taps has along an axis of n."""
    return (n + 2 * padding - dilation * (taps - 1) - 1) // stride + 1


def out_hw(hw: tuple[int, ...], rs: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """(P, Q) for an input of (H, W) and filters of (R, S)."""
    p, q = (out_size(*axis) for axis in zip(hw, rs, stride, padding, dilation, strict=True))
    return p, q


def _windows(
    p: int, q: int, rs: tuple[int, ...], stride: Pair, dilation: Pair
) -> Iterator[tuple[int, int, slice, slice]]:
    """Each output position (i, j) with the rows and columns of the padded input that it sees."""
    for i in range(p):
        rows = slice(i * stride[0], i * stride[0] + dilation[0] * (rs[0] - 1) + 1, dilation[0])
        for j in range(q):
            yield i, j, rows, slice(j * stride[1], j * stride[1] + dilation[1] * (rs[1] - 1) + 1, dilation[1])


def _padded(x: np.ndarray, padding: Pair) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))


def _grouped(a: np.ndarray, groups: int, axis: int) -> np.ndarray:
    """Split an axis of channels into (groups, channels of a group)."""
    return a.reshape(*a.shape[:axis], groups, a.shape[axis] // groups, *a.shape[axis + 1 :])


def fprop_reference(x, w, *, stride, padding, dilation, groups):
    """y, window by window."""
    xp, wg = _grouped(_padded(x, padding), groups, 1), _grouped(w, groups, 0)
    p, q = out_hw(x.shape[2:], w.shape[2:], stride, padding, dilation)
    y = np.zeros((x.shape[0], w.shape[0], p, q), np.result_type(x, w))
    for i, j, rows, cols in _windows(p, q, w.shape[2:], stride, dilation):
        # (N g c R S), (g k c R S) -> (N g k)
        y[:, :, i, j] = np.einsum("ngcrs,gkcrs->ngk", xp[..., rows, cols], wg).reshape(y.shape[:2])
    return y


def dgrad_reference(dy, w, *, stride, padding, dilation, groups, input_hw):
    """dx: every window gets back its share of dy."""
    (n, _, p, q), c = dy.shape, w.shape[1] * groups
    (h, v), (a, b) = input_hw, padding
    dyg, wg = _grouped(dy, groups, 1), _grouped(w, groups, 0)
    dx = np.zeros((n, groups, w.shape[1], h + 2 * a, v + 2 * b), np.result_type(dy, w))
    for i, j, rows, cols in _windows(p, q, w.shape[2:], stride, dilation):
        dx[..., rows, cols] += np.einsum("ngk,gkcrs->ngcrs", dyg[..., i, j], wg)
    return dx.reshape(n, c, h + 2 * a, v + 2 * b)[:, :, a : a + h, b : b + v]


def wgrad_reference(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    """dw: every window of x times the dy that it made."""
    (p, q), (k, c) = dy.shape[2:], (dy.shape[1], x.shape[1] // groups)
    xp, dyg = _grouped(_padded(x, padding), groups, 1), _grouped(dy, groups, 1)
    dw = np.zeros((groups, k // groups, c, *kernel_hw), np.result_type(x, dy))
    for i, j, rows, cols in _windows(p, q, kernel_hw, stride, dilation):
        dw += np.einsum("ngcrs,ngk->gkcrs", xp[..., rows, cols], dyg[..., i, j])
    return dw.reshape(k, c, *kernel_hw)


def bias_act_reference(x, w, b, z, *, stride, padding, dilation, groups, relu):
    """act(y + b (+ z)): w, b (K,), z None or of y's shape; act is ReLU or nothing. A NaN stays one."""
    y = fprop_reference(x, w, stride=stride, padding=padding, dilation=dilation, groups=groups) + b[:, None, None]
    if z is not None:
        y = y + z
    return np.where(y <= 0, y.dtype.type(0), y) if relu else y


def _case(name, n, c, hw, k, rs, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, tags=TEST):
    return Case(
        name, dict(n=n, c=c, hw=hw, k=k, rs=rs, stride=stride, padding=padding, dilation=dilation, groups=groups), tags
    )


def _layer(name, n, c, size, k, taps, stride=1):
    """A layer of a ResNet: square, padded by half the filter."""
    return _case(name, n, c, (size, size), k, (taps, taps), (stride,) * 2, (taps // 2,) * 2, tags=BENCH)


CASES = (
    _case("1x1", 2, 3, (5, 4), 4, (1, 1)),
    _case("1x1_stride2", 2, 5, (7, 6), 3, (1, 1), (2, 2)),
    _case("3x3_same", 2, 3, (6, 5), 4, (3, 3), padding=(1, 1)),
    _case("3x3_valid", 1, 2, (5, 7), 3, (3, 3)),
    _case("3x3_stride2_unread_border", 2, 3, (8, 6), 4, (3, 3), (2, 2), (1, 1)),
    _case("3x3_stride3_gaps", 1, 2, (8, 9), 3, (2, 2), (3, 3)),  # some inputs are never read
    _case("3x3_dilated", 2, 3, (9, 8), 4, (3, 3), padding=(2, 1), dilation=(2, 2)),
    _case("3x3_dilated_stride2", 1, 2, (9, 11), 3, (3, 3), (2, 1), (2, 3), (2, 3)),
    _case("padding_beyond_filter", 1, 2, (4, 5), 3, (3, 3), padding=(3, 4)),
    _case("7x7_stem", 1, 3, (11, 12), 5, (7, 7), (2, 2), (3, 3)),
    _case("1x3_rectangular", 2, 2, (4, 6), 3, (1, 3), (1, 2), (0, 1)),
    _case("one_pixel_out", 3, 2, (3, 3), 2, (3, 3)),
    _case("groups", 2, 6, (5, 5), 4, (3, 3), padding=(1, 1), groups=2),
    _case("depthwise", 2, 4, (5, 6), 8, (3, 3), (2, 2), (1, 1), groups=4),
    _case("wide", 2, 16, (7, 9), 40, (3, 3), padding=(1, 1)),  # full vectors and a tail of channels
    _case("wide_stride2", 1, 32, (9, 8), 33, (3, 3), (2, 2), (1, 1)),
    _case("vectors", 2, 16, (7, 9), 48, (3, 3), padding=(1, 1)),  # whole vectors of channels, tiles that hang over
    _case("vectors_8_filters", 2, 16, (7, 9), 8, (3, 3), padding=(1, 1)),  # whole vectors one way only
    _case("vectors_stride2", 2, 3, (9, 20), 32, (5, 3), (2, 2), (2, 1), (2, 1)),
    _case("vectors_long_rows", 1, 16, (3, 35), 16, (3, 4), padding=(1, 0)),
    _case("vectors_1x1", 2, 32, (5, 4), 16, (1, 1)),
    _case("vectors_1x1_panels", 1, 96, (9, 8), 64, (1, 1)),  # of filters, and a rest of pixels
    _case("vectors_1x1_stride2", 2, 16, (6, 5), 32, (1, 1), (2, 2)),
    _case("vectors_64_stride2", 1, 64, (7, 6), 48, (3, 3), (2, 2), (1, 1)),  # more than one panel of channels
    _case("3x3_partial_tiles", 3, 17, (9, 11), 33, (3, 3), padding=(1, 1)),  # tails of channels, tiles that hang over
    _case("3x3_many_tiles", 2, 16, (33, 30), 16, (3, 3), padding=(1, 0)),  # more than one cache block of tiles
    _case("3x3_many_channels", 1, 208, (5, 6), 256, (3, 3), padding=(1, 1)),
    _case("3x3_100_channels", 1, 100, (6, 7), 20, (3, 3), padding=(0, 2)),
    _case("several_tiles", 2, 72, (9, 16), 136, (1, 1)),  # of 128 pixels and 128 channels, and tails
    _case("1x1_many_pixels", 1, 144, (23, 46), 16, (1, 1)),  # shares of more pixels than a block, tails of channels
    _layer("cifar_stage1", 128, 16, 32, 16, 3),
    _layer("cifar_stage2_down", 128, 16, 32, 32, 3, 2),
    _layer("cifar_stage2", 128, 32, 16, 32, 3),
    _layer("cifar_stage3", 128, 64, 8, 64, 3),
    _layer("imagenet_stem", 8, 3, 224, 64, 7, 2),
    _layer("imagenet_layer1", 8, 64, 56, 64, 3),
    _layer("imagenet_layer2_down", 8, 64, 56, 128, 3, 2),
    _layer("imagenet_layer2", 8, 128, 28, 128, 3),
    _layer("imagenet_layer3", 8, 256, 14, 256, 3),
    _layer("imagenet_layer4", 8, 512, 7, 512, 3),
    _layer("bottleneck_expand", 8, 64, 56, 256, 1),
    _layer("bottleneck_reduce", 8, 256, 56, 64, 1),
)


def _common(case: Case) -> dict:
    return {name: case.params[name] for name in ("stride", "padding", "dilation", "groups")}


def _x(case, rng):
    return rng.standard_normal((case.params["n"], case.params["c"], *case.params["hw"]))


def _w(case, rng):
    p = case.params
    return rng.standard_normal((p["k"], p["c"] // p["groups"], *p["rs"]))


def _dy(case, rng):
    p = case.params
    return rng.standard_normal((p["n"], p["k"], *out_hw(p["hw"], p["rs"], p["stride"], p["padding"], p["dilation"])))


def _fprop_inputs(case, rng):
    return dict(x=_x(case, rng), w=_w(case, rng)), _common(case)


def _dgrad_inputs(case, rng):
    return dict(dy=_dy(case, rng), w=_w(case, rng)), _common(case) | dict(input_hw=case.params["hw"])


def _wgrad_inputs(case, rng):
    return dict(x=_x(case, rng), dy=_dy(case, rng)), _common(case) | dict(kernel_hw=case.params["rs"])


def _bias_act_inputs(case, rng):
    """Every case with or without z and ReLU, in turn."""
    i = [c.name for c in CASES].index(case.name)
    z = _dy(case, rng) if i % 2 else None
    b = rng.standard_normal(case.params["k"])
    return dict(x=_x(case, rng), w=_w(case, rng), b=b, z=z), _common(case) | dict(relu=i % 4 < 2)


def _size(*shape: int) -> int:
    return int(np.prod(shape))


def _fprop_flops(x, w, *, stride, padding, dilation, groups):
    return 2 * x.shape[0] * _size(*out_hw(x.shape[2:], w.shape[2:], stride, padding, dilation)) * _size(*w.shape)


def _dgrad_flops(dy, w, **_):
    return 2 * dy.shape[0] * _size(*dy.shape[2:]) * _size(*w.shape)


def _wgrad_flops(x, dy, *, groups, kernel_hw, **_):
    return 2 * _size(*dy.shape) * x.shape[1] // groups * _size(*kernel_hw)


def _fprop_bytes(x, w, *, stride, padding, dilation, groups):
    y = x.shape[0] * w.shape[0] * _size(*out_hw(x.shape[2:], w.shape[2:], stride, padding, dilation))
    return x.dtype.itemsize * (_size(*x.shape) + _size(*w.shape) + y)


def _dgrad_bytes(dy, w, *, groups, input_hw, **_):
    return dy.dtype.itemsize * (_size(*dy.shape) + _size(*w.shape) + _size(dy.shape[0], w.shape[1] * groups, *input_hw))


def _wgrad_bytes(x, dy, *, groups, kernel_hw, **_):
    return x.dtype.itemsize * (
        _size(*x.shape) + _size(*dy.shape) + _size(dy.shape[1], x.shape[1] // groups, *kernel_hw)
    )


def _bias_act_flops(x, w, b, z, *, relu, **params):
    return _fprop_flops(x, w, **params)


def _bias_act_bytes(x, w, b, z, *, relu, **params):
    return _fprop_bytes(x, w, **params) + (0 if z is None else z.dtype.itemsize * _size(*z.shape))


def _bias_act_scale(x, w, b, z, *, relu, **params):
    magnitudes = (None if a is None else np.abs(a) for a in (x, w, b, z))
    return bias_act_reference(*magnitudes, relu=False, **params)


CONV2D_FPROP = Problem(
    "conv2d_fprop", fprop_reference, _fprop_inputs, CASES, _fprop_flops, _fprop_bytes, of_magnitudes(fprop_reference)
)
CONV2D_DGRAD = Problem(
    "conv2d_dgrad", dgrad_reference, _dgrad_inputs, CASES, _dgrad_flops, _dgrad_bytes, of_magnitudes(dgrad_reference)
)
CONV2D_WGRAD = Problem(
    "conv2d_wgrad", wgrad_reference, _wgrad_inputs, CASES, _wgrad_flops, _wgrad_bytes, of_magnitudes(wgrad_reference)
)
CONV2D_BIAS_ACT = Problem(
    "conv2d_bias_act", bias_act_reference, _bias_act_inputs, CASES, _bias_act_flops, _bias_act_bytes, _bias_act_scale
)
