"""Pooling as four problems. Logical shapes: x and dx (N, C, H, W), y, dy and indices (N, C, P, Q).

The window of output (p, q) holds the pixels (p*u + r*l - a, q*v + s*m - b) for taps 0 <= r < R, 0 <= s < S, where
kernel (R, S), stride (u, v), padding (a, b), dilation (l, m; 1 for averages). Only pixels inside x count.

    max      y = the greatest, indices = h*W + w of the first one that is so great; a NaN beats every number (the last
             NaN of a window is the one reported). A window that sees no pixel gives -inf and index -1.
    average  y = sum / number of taps, where the taps counted are those inside the padded image
             (`count_include_pad`) or inside the image itself.

P = floor((H + 2a - l(R - 1) - 1) / u) + 1. With `ceil_mode` the division rounds up, but a window that would start
beyond the image and its left padding is dropped. (All of this is PyTorch's: aten/src/ATen/native/Pool.h.)
"""

from __future__ import annotations

import numpy as np

from ..registry import BENCH, TEST, Case, Problem

Pair = tuple[int, int]


def pooled_size(n: int, taps: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """How many windows there are along an axis of n pixels."""
    room = n + 2 * padding - dilation * (taps - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    size = -(-room // stride) + 1
    return size - 1 if (size - 1) * stride >= n + padding else size


def pooled_hw(hw: tuple[int, ...], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool) -> Pair:
    """(P, Q) for an input of (H, W)."""
    axes = zip(hw, kernel, stride, padding, dilation, strict=True)
    p, q = (pooled_size(*axis, ceil_mode) for axis in axes)
    return p, q


def _pixels(position: int, n: int, taps: int, stride: int, padding: int, dilation: int) -> np.ndarray:
    """The pixels of one axis that a window sees, in order."""
    seen = position * stride - padding + dilation * np.arange(taps)
    return seen[(seen >= 0) & (seen < n)]


def maxpool_fprop_reference(x, *, kernel, stride, padding, dilation, ceil_mode):
    """(y, indices), window by window."""
    (n, c, h, w), (p, q) = x.shape, pooled_hw(x.shape[2:], kernel, stride, padding, dilation, ceil_mode)
    y, indices = np.full((n, c, p, q), -np.inf, x.dtype), np.full((n, c, p, q), -1, np.int32)
    for i in range(p):
        rows = _pixels(i, h, kernel[0], stride[0], padding[0], dilation[0])
        for j in range(q):
            cols = _pixels(j, w, kernel[1], stride[1], padding[1], dilation[1])
            if not rows.size or not cols.size:
                continue
            window = x[:, :, rows][..., cols].reshape(n, c, -1)
            nan = np.isnan(window)
            last_nan = window.shape[-1] - 1 - nan[..., ::-1].argmax(-1)
            best = np.where(nan.any(-1), last_nan, window.argmax(-1))[..., None]
            y[..., i, j] = np.take_along_axis(window, best, -1)[..., 0]
            indices[..., i, j] = (rows[:, None] * w + cols).ravel()[best[..., 0]]
    return y, indices


def maxpool_bwd_reference(dy, indices, *, kernel, stride, padding, dilation, ceil_mode, input_hw):
    """dx: each dy goes to the pixel that was the maximum. (The indices alone tell; the window tells where to look.)"""
    n, c, p, q = dy.shape
    dx = np.zeros((n, c, input_hw[0] * input_hw[1]), dy.dtype)
    image, channel = np.arange(n)[:, None], np.arange(c)
    for i in range(p):
        for j in range(q):
            to = indices[..., i, j]
            dx[image, channel, np.maximum(to, 0)] += np.where(to >= 0, dy[..., i, j], 0)
    return dx.reshape(n, c, *input_hw)


def _taps(position: int, n: int, taps: int, stride: int, padding: int) -> int:
    """How many taps of a window lie inside the padded axis."""
    start = position * stride - padding
    return min(start + taps, n + padding) - start


def _averages(hw, kernel, stride, padding, ceil_mode, count_include_pad):
    """Each output position with the rows and columns of its window, and the number to divide by."""
    p, q = pooled_hw(hw, kernel, stride, padding, (1, 1), ceil_mode)
    for i in range(p):
        rows = _pixels(i, hw[0], kernel[0], stride[0], padding[0], 1)
        for j in range(q):
            cols = _pixels(j, hw[1], kernel[1], stride[1], padding[1], 1)
            count = rows.size * cols.size
            if count_include_pad:
                count = _taps(i, hw[0], kernel[0], stride[0], padding[0]) * _taps(
                    j, hw[1], kernel[1], stride[1], padding[1]
                )
            yield (i, j), np.ix_(rows, cols), count


def avgpool_fprop_reference(x, *, kernel, stride, padding, ceil_mode, count_include_pad):
    """y, window by window."""
    y = np.zeros((*x.shape[:2], *pooled_hw(x.shape[2:], kernel, stride, padding, (1, 1), ceil_mode)), x.dtype)
    for (i, j), window, count in _averages(x.shape[2:], kernel, stride, padding, ceil_mode, count_include_pad):
        y[..., i, j] = x[(..., *window)].sum((-2, -1)) / max(count, 1)
    return y


def avgpool_bwd_reference(dy, *, kernel, stride, padding, ceil_mode, count_include_pad, input_hw):
    """dx: every window spreads its dy evenly."""
    dx = np.zeros((*dy.shape[:2], *input_hw), dy.dtype)
    for (i, j), window, count in _averages(input_hw, kernel, stride, padding, ceil_mode, count_include_pad):
        dx[(..., *window)] += dy[..., i, j][..., None, None] / max(count, 1)
    return dx


def _case(name, n, c, hw, kernel, stride, padding=(0, 0), dilation=(1, 1), ceil_mode=False, include=True, tags=TEST):
    window = dict(kernel=kernel, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode)
    return Case(name, dict(n=n, c=c, hw=hw, window=window, include=include), tags)


_SHARED = (
    _case("panels", 2, 64, (7, 6), (3, 3), (2, 2), (1, 1)),
    _case("2x2", 2, 3, (6, 4), (2, 2), (2, 2)),
    _case("2x2_unread_border", 1, 2, (5, 7), (2, 2), (2, 2)),
    _case("2x2_ceil", 2, 3, (5, 7), (2, 2), (2, 2), ceil_mode=True),
    _case("3x3_stem", 2, 5, (7, 8), (3, 3), (2, 2), (1, 1)),
    _case("3x3_overlapping", 2, 3, (6, 5), (3, 3), (1, 1), (1, 1)),
    _case("3x3_ceil_padded", 1, 4, (6, 8), (3, 3), (2, 2), (1, 1), ceil_mode=True),
    _case("ceil_drops_a_window", 1, 2, (4, 4), (2, 2), (3, 3), (1, 1), ceil_mode=True),
    _case("stride_beyond_kernel", 1, 3, (9, 8), (2, 2), (3, 4)),
    _case("rectangular", 3, 2, (5, 9), (2, 4), (1, 3), (1, 2)),
    _case("whole_image", 2, 33, (4, 3), (4, 3), (1, 1)),
    _case("one_pixel", 1, 1, (1, 1), (1, 1), (1, 1)),
    _case("wide", 2, 70, (5, 6), (3, 3), (2, 2), (1, 1)),  # more channels than a vector, and a tail
)
_STEM = _case("imagenet_stem", 8, 64, (112, 112), (3, 3), (2, 2), (1, 1), tags=BENCH)
MAX_CASES = (
    *_SHARED,
    _case("dilated", 2, 3, (8, 9), (3, 2), (2, 1), (1, 1), (2, 3)),
    _case("dilated_ceil", 1, 2, (9, 7), (2, 3), (3, 2), (1, 1), (3, 2), ceil_mode=True),
    _STEM,
)
AVERAGE_CASES = (
    *_SHARED,
    _case("3x3_image_only", 2, 5, (7, 8), (3, 3), (2, 2), (1, 1), include=False),
    _case("ceil_image_only", 1, 3, (6, 7), (3, 2), (2, 3), (1, 1), ceil_mode=True, include=False),
    _STEM,
    _case("imagenet_head", 8, 512, (7, 7), (7, 7), (1, 1), tags=BENCH),
    _case("cifar_head", 128, 64, (8, 8), (8, 8), (1, 1), tags=BENCH),
)


def _x(case, rng):
    return rng.standard_normal((case.params["n"], case.params["c"], *case.params["hw"]))


def _dy(case, rng):
    p = case.params
    return rng.standard_normal((p["n"], p["c"], *pooled_hw(p["hw"], **p["window"])))


def _max_fprop_inputs(case, rng):
    return dict(x=np.round(2 * _x(case, rng))), dict(case.params["window"])  # whole numbers: ties are common


def _max_bwd_inputs(case, rng):
    x, window = _x(case, rng), case.params["window"]
    indices = maxpool_fprop_reference(x, **window)[1]
    return dict(dy=_dy(case, rng), indices=indices), dict(window) | dict(input_hw=case.params["hw"])


def _average_window(case):
    window = {name: value for name, value in case.params["window"].items() if name != "dilation"}
    return window | dict(count_include_pad=case.params["include"])


def _avg_fprop_inputs(case, rng):
    return dict(x=_x(case, rng)), _average_window(case)


def _avg_bwd_inputs(case, rng):
    return dict(dy=_dy(case, rng)), _average_window(case) | dict(input_hw=case.params["hw"])


def _size(*shape: int) -> int:
    return int(np.prod(shape))


def _outputs(x, kernel, stride, padding, ceil_mode, dilation=(1, 1), **_):
    return _size(*x.shape[:2], *pooled_hw(x.shape[2:], kernel, stride, padding, dilation, ceil_mode))


def _max_fprop_bytes(x, **window):
    return x.dtype.itemsize * _size(*x.shape) + (x.dtype.itemsize + 4) * _outputs(x, **window)


def _max_bwd_bytes(dy, indices, *, input_hw, **_):
    return (dy.dtype.itemsize + 4) * _size(*dy.shape) + dy.dtype.itemsize * _size(*dy.shape[:2], *input_hw)


def _avg_bwd_bytes(dy, *, input_hw, **_):
    return dy.dtype.itemsize * (_size(*dy.shape) + _size(*dy.shape[:2], *input_hw))


MAXPOOL2D_FPROP = Problem(
    "maxpool2d_fprop",
    maxpool_fprop_reference,
    _max_fprop_inputs,
    MAX_CASES,
    flops=lambda x, **window: _outputs(x, **window) * _size(*window["kernel"]),  # comparisons
    bytes_moved=_max_fprop_bytes,
    error_scale=lambda x, **window: tuple(np.zeros(a.shape) for a in maxpool_fprop_reference(x, **window)),  # exact
    exact_dtype=False,
)
MAXPOOL2D_BWD = Problem(
    "maxpool2d_bwd",
    maxpool_bwd_reference,
    _max_bwd_inputs,
    MAX_CASES,
    flops=lambda dy, indices, **_: _size(*dy.shape),
    bytes_moved=_max_bwd_bytes,
    error_scale=lambda dy, indices, **params: maxpool_bwd_reference(np.abs(dy), indices, **params),
)
AVGPOOL2D_FPROP = Problem(
    "avgpool2d_fprop",
    avgpool_fprop_reference,
    _avg_fprop_inputs,
    AVERAGE_CASES,
    flops=lambda x, **window: _outputs(x, **window) * _size(*window["kernel"]),
    bytes_moved=lambda x, **window: x.dtype.itemsize * (_size(*x.shape) + _outputs(x, **window)),
    error_scale=lambda x, **window: avgpool_fprop_reference(np.abs(x), **window),
)
AVGPOOL2D_BWD = Problem(
    "avgpool2d_bwd",
    avgpool_bwd_reference,
    _avg_bwd_inputs,
    AVERAGE_CASES,
    flops=lambda dy, *, kernel, **_: _size(*dy.shape, *kernel),
    bytes_moved=_avg_bwd_bytes,
    error_scale=lambda dy, **params: avgpool_bwd_reference(np.abs(dy), **params),
)
