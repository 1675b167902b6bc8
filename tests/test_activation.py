"""ReLU, sigmoid and tanh: values, gradients, NaN, memory layouts, and PyTorch."""

import numpy as np
import pytest

from minires.dispatch import run, use_kernels
from minires.engine import Tensor
from minires.ops.activation import relu, sigmoid, tanh
from minires.ops.arithmetic import add

EPS = np.finfo(np.float64).eps
READABLE = {
    relu: lambda x: np.maximum(x, 0),
    sigmoid: lambda x: 1 / (1 + np.exp(-x)),
    tanh: lambda x: (np.exp(x) - np.exp(-x)) / (np.exp(x) + np.exp(-x)),
}
ops = pytest.mark.parametrize("op", READABLE, ids=lambda op: op.__name__)


def draw(shape=(3, 4, 5), seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def gradient(op, x, dy):
    leaf = Tensor(x, requires_grad=True)
    op(leaf).backward(dy)
    return leaf.grad.array


@ops
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5), (0, 2)])
def test_forward_is_the_readable_line(op, shape):
    x = np.asarray(draw(shape))
    np.testing.assert_allclose(op(Tensor(x)).array, READABLE[op](x), rtol=16 * EPS, atol=16 * EPS)


@ops
def test_gradient_is_that_of_the_complex_step(op):
    x, dy = draw(seed=0), draw(seed=1)
    slopes = op(Tensor(x + 1e-30j)).array.imag / 1e-30  # elementwise: every derivative in one step
    np.testing.assert_allclose(gradient(op, x, dy), dy * slopes, rtol=0, atol=16 * EPS)


@ops
def test_gradient_is_that_of_differences(op):
    x, dy, h = draw(seed=0), draw(seed=1), 1e-5
    assert np.abs(x).min() > h  # no step across ReLU's kink
    slopes = (READABLE[op](x + h) - READABLE[op](x - h)) / (2 * h)
    np.testing.assert_allclose(gradient(op, x, dy), dy * slopes, rtol=0, atol=1e-9)  # h² and eps/h


@ops
def test_float32_stays_float32(op):
    assert op(Tensor(draw().astype(np.float32))).dtype == np.float32


@ops
def test_nan_stays(op):
    x = draw((3, 40))
    x[1, 7] = np.nan
    assert np.array_equal(np.isnan(op(Tensor(x)).array), np.isnan(x))


def test_relu_at_zero():
    x = np.array([-1.0, -0.0, 0.0, 1.0])
    np.testing.assert_array_equal(gradient(relu, x, np.full(4, 3.0)), [0, 0, 0, 3])


def test_relu_drops_a_gradient_that_is_not_finite():
    """Where y is 0 nothing passes: not even 0 * NaN."""
    np.testing.assert_array_equal(gradient(relu, np.array([-1.0, 2.0]), np.array([np.nan, 5.0])), [0, 5])


def test_relu_inplace_is_accepted_and_leaves_its_input():
    x = Tensor(np.array([-1.0, 2.0]))
    np.testing.assert_array_equal(relu(x, inplace=True).array, [0, 2])
    np.testing.assert_array_equal(x.array, [-1, 2])


def test_relu_of_integers():
    np.testing.assert_array_equal(relu(Tensor(np.array([-2, 0, 3]))).array, [0, 0, 3])


def test_sigmoid_is_stable_on_both_sides():
    x = np.array([-1000.0, -40.0, 40.0, 1000.0])
    y = sigmoid(Tensor(x)).array
    np.testing.assert_allclose(y, [0, np.exp(-40), 1, 1], rtol=4 * EPS)
    assert np.isfinite(gradient(sigmoid, x, np.ones(4))).all()


LAYOUTS = {
    "contiguous": lambda a: a,
    "channels_last": lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "reversed axes": lambda a: np.asfortranarray(a),
    "gaps": lambda a: np.repeat(a, 2, 3)[..., ::2],
    "backwards": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "one image": lambda a: a[1:2],
    "broadcast": lambda a: np.broadcast_to(a[:, :1], a.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", ["same", "contiguous"])
def test_kernels_keep_the_memory_layout(layout, other):
    """The Numba kernels give what the definitions give, in the layout of their dense input."""
    a, b = LAYOUTS[layout](draw((2, 3, 4, 5))), LAYOUTS[layout](draw((2, 3, 4, 5), 1))
    b = np.ascontiguousarray(b) if other == "contiguous" else b
    for problem, arrays in {"relu_fprop": (a,), "relu_bwd": (a, b), "add_fprop": (a, b)}.items():
        got = run(problem, *arrays)
        with use_kernels(**{problem: f"{problem}_reference"}):
            np.testing.assert_array_equal(got, run(problem, *arrays))
        if layout in ("contiguous", "channels_last", "reversed axes"):
            assert got.strides == a.strides
        elif problem != "relu_fprop" and other == "contiguous":  # b is the dense one
            assert got.strides == b.strides


def test_add_of_equal_shapes_adds():
    a, b, dy = draw(seed=0), draw(seed=1), draw(seed=2)
    x, y = Tensor(a, requires_grad=True), Tensor(b, requires_grad=True)
    z = add(x, y)
    z.backward(dy)
    np.testing.assert_array_equal(z.array, a + b)
    np.testing.assert_array_equal(x.grad.array, dy)
    np.testing.assert_array_equal(y.grad.array, dy)


@pytest.mark.peers
@ops
def test_as_pytorch(op):
    torch = pytest.importorskip("torch")
    x = np.concatenate([draw((50,)) * 10, [0.0, -0.0, np.inf, -np.inf, 1e-300, -800.0, 800.0]])
    dy = draw(x.shape, 1)
    their = torch.tensor(x, requires_grad=True)
    y = getattr(torch, op.__name__)(their)
    y.backward(torch.tensor(dy))
    np.testing.assert_allclose(op(Tensor(x)).array, y.detach().numpy(), rtol=8 * EPS, atol=0)
    np.testing.assert_allclose(gradient(op, x, dy), their.grad.numpy(), rtol=8 * EPS, atol=8 * EPS)
