"""Fused ops are their readable lines: the same values, gradients and running statistics."""

import numpy as np
import pytest

from minires.dispatch import observe
from minires.engine import Tensor
from minires.ops.activation import relu
from minires.ops.arithmetic import add
from minires.ops.batch_norm import batch_norm
from minires.ops.fused import bn_add_relu, bn_relu

SHAPES = [(3, 5, 6, 4), (2, 20, 31, 37), (6, 3), (4, 3, 5), (3, 1, 4, 4)]


def line(input, residual, *statistics, **options):
    """The readable line of both."""
    y = batch_norm(input, *statistics, **options)
    return relu(y if residual is None else add(y, residual))


def fused(input, residual, *statistics, **options):
    if residual is None:
        return bn_relu(input, *statistics, **options)
    return bn_add_relu(input, residual, *statistics, **options)


def draw(shape, dtype, residual_shape, seed=0):
    """x, residual, running mean and variance, gamma, beta, dy."""
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, *shape)) + 0.5
    residual = None if residual_shape is None else rng.standard_normal(residual_shape)
    mean, gamma, beta = rng.standard_normal((3, shape[1])) * [[0.5], [1], [0.1]]
    values = x, residual, mean, rng.uniform(0.5, 2, shape[1]), gamma, beta, dy
    return [a if a is None else a.astype(dtype) for a in values]


def outcome(op, values, **options):
    """y, the running statistics after it, and the gradients of x, residual, gamma and beta."""
    *values, dy = [a if a is None else a.copy() for a in values]
    x, residual, mean, var, gamma, beta = (
        a if a is None else Tensor(a, requires_grad=i not in (2, 3)) for i, a in enumerate(values)
    )
    y = op(x, residual, mean, var, gamma, beta, **options)
    y.backward(dy)
    results = dict(y=y, mean=mean, var=var, dx=x.grad, dgamma=gamma.grad, dbeta=beta.grad)
    if residual is not None:
        results["dresidual"] = residual.grad
    return {name: t.array for name, t in results.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_fused_is_the_readable_line(shape, dtype, with_residual, training):
    values = draw(shape, dtype, shape if with_residual else None)
    got, expected = (outcome(op, values, training=training, momentum=0.3, eps=1e-3) for op in (fused, line))
    assert 0.2 < (expected["y"] > 0).mean() < 0.9  # both sides of the kink
    eps = np.finfo(dtype).eps
    for name, want in expected.items():
        size = max(1, np.abs(want).max())
        np.testing.assert_allclose(got[name], want, rtol=0, atol=32 * eps * size, err_msg=name)


@pytest.mark.parametrize("residual_shape", [(3, 1, 6, 4), (5, 1, 1), ()])
def test_a_broadcast_residual_takes_the_readable_line(residual_shape):
    values = draw((3, 5, 6, 4), np.float64, residual_shape)
    got, expected = (outcome(op, values, training=True) for op in (fused, line))
    assert got["dresidual"].shape == residual_shape
    assert all(np.array_equal(got[name], want) for name, want in expected.items())


def test_a_residual_of_another_dtype_takes_the_readable_line():
    values = draw((3, 5, 6, 4), np.float32, (3, 5, 6, 4))
    values[1] = values[1].astype(np.float64)
    values[-1] = values[-1].astype(np.float64)
    got, expected = (outcome(op, values, training=True) for op in (fused, line))
    assert got["y"].dtype == np.float64
    assert all(np.array_equal(got[name], want) for name, want in expected.items())


@pytest.mark.parametrize("with_residual", [False, True])
def test_fused_is_one_kernel(with_residual):
    values = draw((3, 5, 6, 4), np.float32, (3, 5, 6, 4) if with_residual else None)
    used = []
    with observe(lambda kernel: used.append(kernel.problem.name)):
        outcome(fused, values, training=True)
    assert used == ["batchnorm2d_fprop_train", "batchnorm2d_bwd"]


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_the_complex_step(training):
    """The readable line on complex numbers (ReLU looks at the real part): an oracle without our backward."""
    values = draw((3, 4, 5, 2), np.float64, (3, 4, 5, 2))
    grads = outcome(fused, values, training=training)
    *values, dy = values
    rng = np.random.default_rng(1)
    for i, name in {0: "dx", 1: "dresidual", 4: "dgamma", 5: "dbeta"}.items():
        v, stepped = rng.standard_normal(values[i].shape), [a.copy() for a in values]
        stepped[i] = stepped[i] + 1e-30j * v
        y = line(*map(Tensor, stepped), training=training).array
        slope, share = (y * dy).imag.sum() / 1e-30, grads[name] * v
        assert abs(share.sum() - slope) < 1e-13 * np.abs(share).sum() + 1e-13


def test_only_the_residual_needs_a_gradient():
    values = draw((3, 4, 5, 2), np.float64, (3, 4, 5, 2))
    x, residual, mean, var, gamma, beta, dy = map(Tensor, values)
    residual.requires_grad_()
    y = bn_add_relu(x, residual, mean, var, gamma, beta, True)
    y.backward(dy)
    np.testing.assert_array_equal(residual.grad.array, dy.array * (y.array > 0))


def test_identity_shortcut_from_the_input_itself():
    """relu(bn(x) + x): x gets the sum of both paths."""
    values = draw((3, 4, 5, 2), np.float64, None)
    got, expected = (
        outcome(lambda x, _, *rest, op=op, **options: op(x, x, *rest, **options), values, training=True)
        for op in (fused, line)
    )
    np.testing.assert_allclose(got["dx"], expected["dx"], rtol=0, atol=1e-13)
