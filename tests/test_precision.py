"""Long sums in narrow dtypes, and the dtype of every result."""

import numpy as np
import pytest

import minires
from minires import Tensor
from minires.nn import functional as F
from minires.ops.layout import sum_axes

BFLOAT16 = np.dtype(minires.bfloat16)
HALVES = [np.dtype(np.float16), BFLOAT16]


def uniform(*shape, dtype=np.float32, low=0.0):
    return np.random.default_rng(0).uniform(low, 1, shape).astype(dtype)


def close(got, want, dtype=np.float32):
    """To three roundings of the result."""
    assert got.dtype == dtype
    np.testing.assert_allclose(got, want, rtol=3 * np.finfo(dtype).eps)


LONG = uniform(1 << 19, 4)
IMAGES = uniform(64, 64, 64, 3).transpose(0, 3, 1, 2)  # channels-last


@pytest.mark.parametrize("x, dim", [(LONG, 0), (LONG, None), (IMAGES, (0, 2, 3))], ids=["rows", "all", "channels"])
@pytest.mark.parametrize("name", ["sum", "mean"])
def test_sums_over_leading_axes(name, x, dim):
    y = getattr(Tensor(x), name)(dim)
    close(y.array, getattr(x, name)(dim, dtype=np.float64))


def test_norm_over_leading_axes():
    close(Tensor(LONG).norm(2, 0).array, np.sqrt((LONG.astype(float) ** 2).sum(0)))


def test_gradients_of_what_was_broadcast():
    want = LONG.sum(0, dtype=np.float64)
    row, bias = minires.zeros(4, requires_grad=True), minires.zeros(4, requires_grad=True)
    (minires.zeros(*LONG.shape) + row).backward(LONG)
    close(row.grad.array, want)
    x, weight = minires.zeros(len(LONG), 1), minires.zeros(4, 1)
    F.linear(x, weight, bias).backward(LONG)
    close(bias.grad.array, want)


def test_gradient_of_the_bias_of_a_convolution():
    bias = minires.zeros(3, requires_grad=True)
    F.conv2d(minires.zeros(64, 1, 64, 64), minires.zeros(3, 1, 1, 1), bias).backward(IMAGES)
    close(bias.grad.array, IMAGES.sum((0, 2, 3), dtype=np.float64))


def test_a_mean_of_halves_does_not_overflow():
    x = np.full((100_000, 2), 100, np.float16)
    assert Tensor(x).mean(0).tolist() == [100, 100] and Tensor(x).mean().dtype == np.float16


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.complex64, np.complex128, np.float64, np.float32, *HALVES])
def test_sum_axes_keeps_the_dtype(dtype):
    a = np.arange(6).reshape(2, 3).astype(dtype)
    for keepdims in (False, True):
        y = sum_axes(a, (0,), keepdims)
        assert y.dtype == dtype and y.shape == ((1, 3) if keepdims else (3,))
        assert y.astype(complex).ravel().tolist() == [3, 5, 7]


# dtypes


def numbers(*shape, dtype):
    return Tensor(uniform(*shape, low=-1).astype(dtype), requires_grad=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("of_parameters", ["same", "float32"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_batch_norm_in_half_precision(dtype, of_parameters, training):
    """Statistics in float32: the result is the float32 one, rounded."""
    kept = dtype if of_parameters == "same" else np.dtype(np.float32)
    x, dy = numbers(8, 3, 5, 5, dtype=dtype), uniform(8, 3, 5, 5, low=-1).astype(dtype)
    weight, bias = numbers(3, dtype=kept), numbers(3, dtype=kept)
    wide = [Tensor(t.array.astype(np.float32), True) for t in (x, weight, bias)]

    def statistics(of):
        return Tensor(np.full(3, 0.25, of)), Tensor(np.full(3, 0.5, of))

    y = F.batch_norm(x, *statistics(kept), weight, bias, training)
    want = F.batch_norm(wide[0], *statistics(np.float32), *wide[1:], training)
    y.backward(dy)
    want.backward(dy.astype(np.float32))
    assert y.dtype == dtype and (y.array == want.array.astype(dtype)).all()
    for ours, theirs in zip((x, weight, bias), wide, strict=True):
        assert ours.grad.dtype == ours.dtype
        assert (ours.grad.array == theirs.grad.array.astype(ours.dtype)).all()


@pytest.mark.parametrize(
    "op",
    [
        lambda x: F.dropout(x, 0.3),
        lambda x: F.dropout(x, 1.0),
        lambda x: F.adaptive_avg_pool2d(x, 3),
        lambda x: F.adaptive_avg_pool2d(x, 2),
        lambda x: x.clamp(-0.5, 0.5),
        lambda x: x.mean((0, 2)),
        lambda x: x @ x,
        lambda x: x.abs() ** 1.5,
        lambda x: x.maximum(0),
        lambda x: minires.where(x.detach() > 0, x, 0.0),
    ],
)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_ops_in_half_precision(op, dtype):
    x = numbers(2, 3, 4, 4, dtype=dtype)
    y = op(x)
    y.backward(Tensor(uniform(*y.shape).astype(dtype)))
    assert y.dtype == x.grad.dtype == dtype


def test_a_resnet_in_bfloat16():
    model = minires.models.resnet20().to(dtype=BFLOAT16)
    y = model(Tensor(uniform(2, 3, 32, 32).astype(BFLOAT16)))
    assert y.dtype == BFLOAT16 and np.isfinite(y.array.astype(np.float32)).all()


def test_clamp_of_integers_by_a_float():
    x = minires.tensor([1, 2, 3])
    assert x.clamp(1.5).dtype == np.float32 and x.clamp(1.5).tolist() == [1.5, 2, 3]
    assert x.clamp(2).dtype == np.int64
    assert x.clamp(max=minires.tensor(2.5)).dtype == np.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_keeps_the_dtype_of_the_input(smoothing):
    x, weight = numbers(4, 3, dtype=np.float32), Tensor(np.array([0.5, 1.0, 2.0]))
    y = F.cross_entropy(x, minires.tensor([0, 1, 2, 0]), weight, label_smoothing=smoothing)
    y.backward()
    assert y.dtype == x.grad.dtype == np.float32
