"""Convolution, batch normalisation, products and pooling against plain-NumPy definitions, forward and backward."""

import numpy as np
from agreement import DATA, SIZE, agree, broadcastable
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minires import Tensor, ops

few = settings(max_examples=40)
more = settings(max_examples=100)


def _conv2d(x, w, b, stride, padding, dilation, groups):
    """Tap by tap. padding: ((above, below), (left, right))."""
    xp = np.pad(x, ((0, 0), (0, 0), *padding))
    (n, c, h, v), (k, _, r, s) = xp.shape, w.shape
    p = (h - dilation[0] * (r - 1) - 1) // stride[0] + 1
    q = (v - dilation[1] * (s - 1) - 1) // stride[1] + 1
    y = np.zeros((n, k, p, q), np.result_type(x, w, b))
    for i in range(r):
        rows = slice(i * dilation[0], i * dilation[0] + (p - 1) * stride[0] + 1, stride[0])
        for j in range(s):
            cols = slice(j * dilation[1], j * dilation[1] + (q - 1) * stride[1] + 1, stride[1])
            seen = xp[:, :, rows, cols].reshape(n, groups, c // groups, p, q)
            tap = w[:, :, i, j].reshape(groups, k // groups, c // groups)
            y += np.einsum("ngcpq,gkc->ngkpq", seen, tap).reshape(y.shape)
    return y + b[:, None, None]


@more
@given(DATA)
def test_conv2d(data):
    draw = data.draw
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    rs, stride, dilation = draw(pairs, "filter"), draw(pairs, "stride"), draw(pairs, "dilation")
    groups, c, k, n = (draw(st.integers(1, 3), name) for name in ("groups", "C/groups", "K/groups", "N"))
    span = [d * (taps - 1) for d, taps in zip(dilation, rs, strict=True)]
    kind = draw(st.sampled_from(["numbers", "numbers", "same", "valid"]), "padding")
    if kind == "same":
        stride, padding, sides = (1, 1), "same", [(t // 2, t - t // 2) for t in span]
    elif kind == "valid":
        padding, sides = "valid", [(0, 0)] * 2
    else:
        padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
        sides = [(a, a) for a in padding]
    least = [max(1, t + 1 - sum(side)) for t, side in zip(span, sides, strict=True)]
    hw = [draw(st.integers(m, m + 6), "H, W") for m in least]
    batched, biased = draw(st.booleans(), "batched"), draw(st.booleans(), "bias")
    short = draw(st.booleans(), "an int for equal pairs")

    def brief(pair):
        return pair[0] if short and isinstance(pair, tuple) and pair[0] == pair[1] else pair

    def op(x, w, b=None):
        return ops.conv2d(x, w, b, brief(stride), brief(padding), brief(dilation), groups)

    def definition(x, w, b=None):
        y = _conv2d(x if batched else x[None], w, np.zeros(len(w)) if b is None else b, stride, sides, dilation, groups)
        return y if batched else y[0]

    x = (n, groups * c, *hw) if batched else (groups * c, *hw)
    agree(data, op, definition, x, (groups * k, c, *rs), *[(groups * k,)] * biased)


@more
@given(DATA, st.booleans(), st.sampled_from([2, 3, 4, 4]), st.booleans(), st.booleans(), st.booleans())
def test_batch_norm(data, training, ndim, affine, relu, residual):
    shape = (data.draw(st.integers(4, 6)), *(data.draw(SIZE) for _ in range(ndim - 1)))
    c, axes = shape[1], (0, *range(2, ndim))
    rng = np.random.default_rng(len(shape))
    old_mean, old_var = rng.standard_normal(c), rng.random(c) + 0.5
    momentum, eps = data.draw(st.sampled_from([0.1, 0.5, 1.0])), data.draw(st.sampled_from([1e-5, 1e-2]))
    column = (c, *(1,) * (ndim - 2))
    fused = relu and affine

    def op(x, *rest):
        rest, z = (rest[:-1], rest[-1]) if residual else (rest, None)
        running = [Tensor(a.astype(x.dtype)) for a in (old_mean, old_var)]
        weight, bias = rest if affine else (None, None)
        arguments = (*running, weight, bias, training, momentum, eps)
        if fused and residual:
            y = ops.bn_add_relu(x, z, *arguments)
        elif fused:
            y = ops.bn_relu(x, *arguments)
        else:
            y = ops.batch_norm(x, *arguments)
            y = y + z if residual else y
            y = y.relu() if relu else y
        m = x.array.size // c
        mean, var = x.array.mean(axes, dtype=float), x.array.var(axes, dtype=float) * m / (m - 1)
        for old, new, now in zip((old_mean, old_var), (mean, var), running, strict=True):
            expected = (1 - momentum) * old + momentum * new if training else old
            np.testing.assert_allclose(now.array, expected, rtol=1e-5, atol=1e-5)
        return y

    def definition(x, *rest):
        rest, z = (rest[:-1], rest[-1]) if residual else (rest, 0)
        mean, var = old_mean.reshape(column), old_var.reshape(column)
        if training:
            mean = x.mean(axes).reshape(column)
            var = ((x - mean) ** 2).mean(axes).reshape(column)
        weight, bias = (a.reshape(column) for a in rest) if affine else (1, 0)
        y = (x - mean) / np.sqrt(var + eps) * weight + bias + z
        return np.where(y.real > 0, y, 0) if relu else y

    def spread(rng, shape):  # no channel of almost equal values, whose 1 / std would magnify roundings
        x = rng.standard_normal(shape)
        return x + 2 * np.arange(shape[0]).reshape(-1, *(1,) * (len(shape) - 1)) if len(shape) > 1 else x

    agree(data, op, definition, shape, *[(c,)] * 2 * affine, *[shape] * residual, make=spread, units=1024)


@few
@given(DATA, SIZE, SIZE, SIZE, broadcastable(2), st.sampled_from(["mm", "mm", "mv", "vm", "vv"]))
def test_matmul(data, m, k, n, batches, kind):
    a = (k,) if kind[0] == "v" else (*batches[0], m, k)
    b = (k,) if kind[1] == "v" else (*batches[1], k, n)
    agree(data, ops.matmul, np.matmul, a, b)


@few
@given(DATA, st.lists(SIZE, max_size=3), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_linear(data, lead, i, o, biased):
    def definition(x, w, b=0):
        return np.matmul(x, w.T) + b

    agree(data, ops.linear, definition, (*lead, i), (o, i), *[(o,)] * biased)


@st.composite
def windows(draw, dilated):
    """Parameters of a pooling and a size that they fit."""
    both = st.tuples(st.integers(1, 4), st.integers(1, 4))
    kernel = draw(both, "kernel")
    padding = tuple(draw(st.integers(0, taps // 2)) for taps in kernel)
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2))) if dilated else (1, 1)
    least = [max(1, d * (t - 1) + 1 - 2 * a) for d, t, a in zip(dilation, kernel, padding, strict=True)]
    hw = tuple(draw(st.integers(m, m + 5)) for m in least)
    return hw, kernel, draw(st.none() | both, "stride"), padding, dilation, draw(st.booleans(), "ceil_mode")


def _seen(hw, kernel, stride, padding, dilation, ceil_mode):
    """For each axis: per output, the pixels that its window sees, and how many taps lie in the padded image."""
    axes = []
    for n, taps, u, a, d in zip(hw, kernel, stride or kernel, padding, dilation, strict=True):
        span, starts = d * (taps - 1) + 1, range(-a, n + a, u)
        fits = [s for s in starts if s + span <= n + a]
        if ceil_mode and fits[-1] + span < n + a and fits[-1] + u < n:  # one more, if it starts in the image
            fits.append(fits[-1] + u)
        every = [[s + d * t for t in range(taps)] for s in fits]
        axes.append([([i for i in w if 0 <= i < n], sum(i < n + a for i in w)) for w in every])
    return axes


@more
@given(DATA, windows(dilated=True), SIZE, st.integers(0, 3))
def test_max_pool2d(data, window, c, n):
    hw, kernel, stride, padding, dilation, ceil_mode = window
    rows, cols = _seen(*window)
    assume(all(r for r, _ in rows) and all(s for s, _ in cols))

    def definition(x):
        def best(r, s):
            part = x[..., r, :][..., s].reshape(*x.shape[:-2], -1)
            return np.take_along_axis(part, part.real.argmax(-1)[..., None], -1)[..., 0]

        return np.stack([np.stack([best(r, s) for s, _ in cols], -1) for r, _ in rows], -2)

    def op(x):
        return ops.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)

    agree(data, op, definition, (n, c, *hw) if n else (c, *hw), units=16)


@more
@given(DATA, windows(dilated=False), SIZE, st.integers(0, 3), st.booleans(), st.none() | st.integers(1, 7))
def test_avg_pool2d(data, window, c, n, include, divisor):
    hw, kernel, stride, padding, _, ceil_mode = window
    rows, cols = _seen(*window)
    assume(all(r for r, _ in rows) and all(s for s, _ in cols))

    def definition(x):
        def average(r, row_taps, s, column_taps):
            count = divisor or (row_taps * column_taps if include else len(r) * len(s))
            return x[..., r, :][..., s].sum((-2, -1)) / count

        return np.stack([np.stack([average(*row, *col) for col in cols], -1) for row in rows], -2)

    def op(x):
        return ops.avg_pool2d(x, kernel, stride, padding, ceil_mode, include, divisor)

    agree(data, op, definition, (n, c, *hw) if n else (c, *hw))


@few
@given(DATA, st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 6), st.integers(1, 6)), SIZE)
def test_adaptive_avg_pool2d(data, hw, size, c):
    def shares(n, m):
        return [range(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]

    def definition(x):
        rows, cols = (shares(n, m) for n, m in zip(hw, size, strict=True))
        return np.stack([np.stack([x[..., r, :][..., s].mean((-2, -1)) for s in cols], -1) for r in rows], -2)

    wanted = data.draw(st.sampled_from([size, (size[0], None)])) if size[1] == hw[1] else size
    agree(data, lambda x: ops.adaptive_avg_pool2d(x, wanted), definition, (2, c, *hw))
