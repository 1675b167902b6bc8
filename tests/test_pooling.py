"""Max and average pooling: values against plain loops, gradients, ties, NaN, sizes, errors, memory order, PyTorch."""

import itertools
import math

import numpy as np
import pytest
from differences import check_gradients
from minires.kernels import memory

from minires import Tensor
from minires.gradcheck import gradcheck
from minires.ops import adaptive_avg_pool2d, avg_pool2d, max_pool2d

SHARED = [  # shape, kernel, stride, padding, ceil_mode
    ((2, 3, 6, 5), 2, None, 0, False),
    ((1, 2, 7, 8), (3, 3), 2, 1, False),
    ((1, 2, 5, 7), 2, 2, 0, True),
    ((1, 1, 4, 4), 2, 3, 1, True),  # the last window would start beyond the image and is dropped
    ((2, 1, 9, 8), (2, 3), (3, 4), (1, 0), False),
    ((3, 5, 6), 3, 1, 1, False),
]


def distinct(shape, seed=0):
    """Numbers no two of which are closer than the steps of a difference: no ties."""
    return np.random.default_rng(seed).permutation(np.linspace(-2, 2, math.prod(shape))).reshape(shape)


def both(value):
    return value if isinstance(value, tuple) else (value, value)


def windows(hw, kernel, stride, padding, dilation, ceil_mode):
    """Per output pixel: the pixels seen, and how many taps lie within the padded image. By search, not by formula."""
    kernel, stride, padding, dilation = (
        both(kernel),
        both(kernel if stride is None else stride),
        both(padding),
        dilation,
    )
    axes = []
    for n, k, u, a, d in zip(hw, kernel, stride, padding, both(dilation), strict=True):
        axis = []
        for start in itertools.count(-a, u):
            taps = [start + d * t for t in range(k)]
            fits = taps[-1] < n + a
            if not (fits or (ceil_mode and start < n and (not axis or axis[-1][2] < n + a - 1))):
                break
            axis.append(([t for t in taps if 0 <= t < n], sum(t < n + a for t in taps), taps[-1]))
        axes.append(axis)
    return axes


def pooled(x, kernel, stride, padding, dilation, ceil_mode, make):
    rows, cols = windows(x.shape[-2:], kernel, stride, padding, dilation, ceil_mode)
    y = np.empty((*x.shape[:-2], len(rows), len(cols)))
    for (i, (h, counted_h, _)), (j, (w, counted_w, _)) in itertools.product(enumerate(rows), enumerate(cols)):
        y[..., i, j] = make(x[..., h, :][..., w], counted_h * counted_w)
    return y


@pytest.mark.parametrize("shape, kernel, stride, padding, ceil_mode", SHARED)
def test_max(shape, kernel, stride, padding, ceil_mode):
    x = distinct(shape)
    y = check_gradients(lambda t: max_pool2d(t, kernel, stride, padding, 1, ceil_mode), x)
    want = pooled(x, kernel, stride, padding, 1, ceil_mode, lambda window, _: window.max((-2, -1)))
    np.testing.assert_array_equal(y.array, want)


@pytest.mark.parametrize("dilation", [2, (1, 3)])
def test_max_dilated(dilation):
    x = distinct((2, 2, 9, 8))
    y = check_gradients(lambda t: max_pool2d(t, (3, 2), 2, 1, dilation), x)
    want = pooled(x, (3, 2), 2, 1, dilation, False, lambda window, _: window.max((-2, -1)))
    np.testing.assert_array_equal(y.array, want)


@pytest.mark.parametrize("mode", ["include", "exclude", 3, -2])
@pytest.mark.parametrize("shape, kernel, stride, padding, ceil_mode", SHARED)
def test_average(shape, kernel, stride, padding, ceil_mode, mode):
    x, divisor = distinct(shape), mode if isinstance(mode, int) else None

    def mean(window, counted):
        seen = window.shape[-2] * window.shape[-1]
        return window.sum((-2, -1)) / (divisor or (counted if mode == "include" else seen))

    y = check_gradients(lambda t: avg_pool2d(t, kernel, stride, padding, ceil_mode, mode != "exclude", divisor), x)
    np.testing.assert_allclose(y.array, pooled(x, kernel, stride, padding, 1, ceil_mode, mean), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("size", [1, (1, 1), (3, 2), (5, 7), (None, 4), 9])
@pytest.mark.parametrize("shape", [(2, 3, 6, 4), (3, 5, 7)])
def test_adaptive_average(shape, size):
    x = distinct(shape)
    y = check_gradients(lambda t: adaptive_avg_pool2d(t, size), x)
    p, q = (n if m is None else m for n, m in zip(shape[-2:], both(size), strict=True))
    assert y.shape == (*shape[:-2], p, q)
    for i, j in np.ndindex(p, q):
        h = slice(math.floor(i * shape[-2] / p), math.ceil((i + 1) * shape[-2] / p))
        w = slice(math.floor(j * shape[-1] / q), math.ceil((j + 1) * shape[-1] / q))
        np.testing.assert_allclose(y.array[..., i, j], x[..., h, w].mean((-2, -1)), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("op", [lambda t: avg_pool2d(t, 3, 2, 1), lambda t: adaptive_avg_pool2d(t, (4, 3))])
def test_averages_pass_complex_numbers(op):
    gradcheck(op, Tensor(distinct((2, 2, 7, 6)), True), method="complex")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_first_of_equal_maxima_gets_the_gradient(dtype):
    x = Tensor(np.ones((1, 1, 3, 3), dtype), True)
    max_pool2d(x, 2, 1).backward(Tensor(np.array([[[[1.0, 2.0], [4.0, 8.0]]]], dtype)))
    np.testing.assert_array_equal(x.grad.array[0, 0], [[1, 2, 0], [4, 8, 0], [0, 0, 0]])
    assert x.grad.dtype == dtype


def test_a_nan_wins():
    x = np.zeros((1, 1, 2, 4), np.float32)
    x[0, 0, 1, 2] = np.nan
    leaf = Tensor(x, True)
    y = max_pool2d(leaf, 2)
    np.testing.assert_array_equal(y.array[0, 0], [[0, np.nan]])
    y.backward(Tensor(np.array([[[[3.0, 5.0]]]], np.float32)))
    np.testing.assert_array_equal(leaf.grad.array[0, 0], [[3, 0, 0, 0], [0, 0, 5, 0]])


def test_a_window_without_pixels_is_minus_infinity_and_gets_no_gradient():
    x = Tensor(np.ones((1, 1, 1, 1), np.float32), True)
    y = max_pool2d(x, 2, padding=1, dilation=2)  # looks at -1 and 1
    assert y.array.item() == -np.inf
    y.backward(Tensor(np.ones_like(y.array)))
    assert x.grad.array.item() == 0


def test_an_empty_batch():
    for op in (lambda t: max_pool2d(t, 2), lambda t: avg_pool2d(t, 2), lambda t: adaptive_avg_pool2d(t, 3)):
        x = Tensor(np.empty((0, 2, 5, 5), np.float32), True)
        y = op(x)
        y.backward(Tensor(np.empty(y.shape, np.float32)))
        assert y.shape[:2] == x.grad.shape[:2] == (0, 2)


def test_activations_stay_channels_last():
    x = Tensor(distinct((2, 6, 5, 8)).transpose(0, 3, 1, 2), True)
    memory.copies = 0
    for op in (max_pool2d, avg_pool2d, lambda t, _: adaptive_avg_pool2d(t, 1), lambda t, _: adaptive_avg_pool2d(t, 4)):
        y = op(x, 2)
        assert y.array.transpose(0, 2, 3, 1).flags.c_contiguous
        y.backward(Tensor(y.array))
    assert memory.copies == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: max_pool2d(x, 3, padding=2), "padding 2 is more than half of kernel_size 3"),
        (lambda x: avg_pool2d(x, 7), "7 taps with dilation 1 do not fit into 5 pixels padded by 0"),
        (lambda x: max_pool2d(x, 2, dilation=5), "2 taps with dilation 5"),
        (lambda x: max_pool2d(x, 0), "kernel_size=0 must be"),
        (lambda x: avg_pool2d(x, 2, divisor_override=0), "divisor_override must not be 0"),
        (lambda x: adaptive_avg_pool2d(x, 0), "output_size"),
        (lambda x: adaptive_avg_pool2d(x, (2, 2, 2)), "output_size"),
        (lambda x: max_pool2d(x[0, 0], 2), r"not \(5, 5\)"),
        (lambda x: avg_pool2d(Tensor(np.empty((1, 0, 5, 5))), 2), r"not \(1, 0, 5, 5\)"),
    ],
)
def test_sizes_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(Tensor(distinct((1, 2, 5, 5))))


def test_dtypes_that_do_not_fit():
    whole = Tensor(np.ones((1, 1, 4, 4), np.int64))
    for op in (max_pool2d, avg_pool2d, adaptive_avg_pool2d):
        with pytest.raises(TypeError, match="not int64"):
            op(whole, 2)
    with pytest.raises(TypeError, match="not complex128"):
        max_pool2d(Tensor(np.ones((1, 1, 4, 4), np.complex128)), 2)


@pytest.mark.peers
def test_like_pytorch():
    torch = pytest.importorskip("torch")
    F, rng = torch.nn.functional, np.random.default_rng(0)
    compared = 0
    for shape in [(2, 3, 9, 8), (3, 7, 10)]:
        for kernel, stride, padding, ceil in itertools.product(
            [2, (3, 4)], [None, 1, (2, 3), 5], [0, 1], [False, True]
        ):
            cases = [(max_pool2d, F.max_pool2d, (kernel, stride, padding, d, ceil)) for d in (1, (2, 1))]
            cases += [
                (avg_pool2d, F.avg_pool2d, (kernel, stride, padding, ceil, include, divisor))
                for include, divisor in itertools.product([True, False], [None, 3])
            ]
            for ours, theirs, args in cases:
                _compare(torch, rng, shape, lambda t, f=ours, a=args: f(t, *a), lambda t, f=theirs, a=args: f(t, *a))
                compared += 1
        for size in [1, (1, 1), (4, 2), (None, 5), (11, 13)]:
            _compare(
                torch,
                rng,
                shape,
                lambda t, s=size: adaptive_avg_pool2d(t, s),
                lambda t, s=size: F.adaptive_avg_pool2d(t, s),
            )
    assert compared == 2 * 32 * 6


def _compare(torch, rng, shape, ours, theirs):
    x = np.round(2 * rng.standard_normal(shape))  # whole numbers: ties are common
    mine, other = Tensor(x, True), torch.tensor(x, requires_grad=True)
    y, want = ours(mine), theirs(other)
    np.testing.assert_allclose(y.array, want.detach().numpy(), rtol=1e-13, atol=1e-14)
    dy = rng.standard_normal(y.shape)
    y.backward(Tensor(dy))
    want.backward(torch.tensor(dy))
    np.testing.assert_allclose(mine.grad.array, other.grad.numpy(), rtol=1e-13, atol=1e-14)
