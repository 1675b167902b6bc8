"""Batch normalisation against its readable line, the complex step, its running statistics, and PyTorch."""

import numpy as np
import pytest

from minires.engine import Tensor
from minires.ops.batch_norm import batch_norm

SHAPES = [(7, 3), (4, 3, 5), (3, 4, 5, 2), (2, 1, 3, 3)]
EPS = np.finfo(np.float64).eps


def readable(x, gamma, beta, mean=None, var=None, eps=1e-5):
    """gamma * (x - mean) / sqrt(var + eps) + beta over axis 1; mean and var of x itself where none are given."""
    axes, spread = (0, *range(2, x.ndim)), (-1,) + (1,) * (x.ndim - 2)
    mean = x.mean(axes) if mean is None else mean
    var = ((x - mean.reshape(spread)) ** 2).mean(axes) if var is None else var
    x_hat = (x - mean.reshape(spread)) / np.sqrt(var + eps).reshape(spread)
    return gamma.reshape(spread) * x_hat + beta.reshape(spread)


def draw(shape, seed=0):
    """x, gamma, beta, dy, running mean and running variance."""
    rng = np.random.default_rng(seed)
    x, c = rng.standard_normal(shape) * 2 + 1, shape[1]
    gamma, beta, mean = (rng.standard_normal(c) for _ in range(3))
    return x, gamma, beta, rng.standard_normal(shape), mean, rng.uniform(0.5, 2, c)


def run(x, gamma, beta, mean, var, training, dy=None, **options):
    """y, and after backward with `dy` the gradients of x, gamma and beta. Updates mean and var in place."""
    leaves = [Tensor(a, requires_grad=True) for a in (x, gamma, beta)]
    running = [a if a is None else Tensor(a) for a in (mean, var)]
    y = batch_norm(leaves[0], *running, leaves[1], leaves[2], training, **options)
    if dy is not None:
        y.backward(dy)
    return y.array, *(None if leaf.grad is None else leaf.grad.array for leaf in leaves)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_forward_is_the_readable_line(shape, training):
    x, gamma, beta, _, mean, var = draw(shape)
    expected = readable(x, gamma, beta, *((None, None) if training else (mean, var)), eps=1e-3)
    y = run(x, gamma, beta, mean, var, training, eps=1e-3)[0]
    np.testing.assert_allclose(y, expected, rtol=0, atol=32 * EPS * 10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_the_complex_step(shape, training):
    """d/dt of <y(x + t v), dy> is the imaginary part of <y(x + i t v), dy> / t, exact to rounding for tiny t."""
    x, gamma, beta, dy, mean, var = draw(shape)
    given = (None, None) if training else (mean, var)
    grads = run(x, gamma, beta, mean.copy(), var.copy(), training, dy)[1:]
    rng = np.random.default_rng(1)
    for i, grad in enumerate(grads):
        values = [x, gamma, beta]
        v = rng.standard_normal(values[i].shape)
        values[i] = values[i] + 1e-30j * v
        slope = (readable(*values, *given) * dy).imag.sum() / 1e-30
        assert abs((grad * v).sum() - slope) < 1e-13 * np.abs(grad * v).sum() + 1e-13


@pytest.mark.parametrize("training", [True, False])
def test_complex_step_through_the_op(training):
    """Complex numbers reach the definition and keep their derivative; real running statistics stay real."""
    x, gamma, beta, dy, mean, var = draw((3, 4, 5, 2))
    v = np.random.default_rng(1).standard_normal(x.shape)
    grad = run(x, gamma, beta, mean.copy(), var.copy(), training, dy)[1]
    y = run(x + 1e-30j * v, gamma, beta, mean, var, training)[0]
    assert y.dtype == np.complex128 and mean.dtype == np.float64
    assert abs((y * dy).imag.sum() / 1e-30 - (grad * v).sum()) < 1e-13 * np.abs(grad * v).sum()


def test_gradient_of_x_in_training_sees_no_shift_and_no_scale():
    """y does not change when a channel of x is shifted, nor (eps aside) when it is scaled: dx is orthogonal to both."""
    x, gamma, beta, dy, mean, var = draw((5, 3, 4, 4))
    dx = run(x, gamma, beta, mean, var, True, dy, eps=0.0)[1]
    centred = x - x.mean((0, 2, 3), keepdims=True)
    limit = 64 * EPS * np.abs(dx).sum()
    assert np.abs(dx).sum() > 1
    assert np.abs(dx.sum((0, 2, 3))).max() < limit
    assert np.abs((dx * centred).sum((0, 2, 3))).max() < limit * 4


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0])
def test_running_statistics_follow_the_unbiased_batch(momentum):
    mean, var = np.zeros(4), np.ones(4)
    expected_mean, expected_var = mean.copy(), var.copy()
    for seed in range(3):
        x, gamma, beta, *_ = draw((3, 4, 5, 2), seed)
        run(x, gamma, beta, mean, var, True, momentum=momentum)
        expected_mean = (1 - momentum) * expected_mean + momentum * x.mean((0, 2, 3))
        expected_var = (1 - momentum) * expected_var + momentum * x.var((0, 2, 3), ddof=1)
    np.testing.assert_allclose(mean, expected_mean, rtol=0, atol=32 * EPS * 3)
    np.testing.assert_allclose(var, expected_var, rtol=32 * EPS)


def test_evaluation_leaves_running_statistics_alone():
    x, gamma, beta, _, mean, var = draw((3, 4, 5, 2))
    before = mean.copy(), var.copy()
    run(x, gamma, beta, mean, var, False)
    assert np.array_equal(mean, before[0]) and np.array_equal(var, before[1])


def test_evaluation_gradient_does_not_read_x():
    """There y is affine in x: dx is gamma * inv_std * dy, even where x is infinite."""
    x, gamma, beta, dy, mean, var = draw((3, 4, 5, 2))
    x[0] = np.inf
    dx = run(x, gamma, beta, mean, var, False, dy)[1]
    np.testing.assert_allclose(dx, dy * (gamma / np.sqrt(var + 1e-5))[:, None, None], rtol=8 * EPS)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_memory_layouts_agree(dtype):
    """Contiguous, channels-last and with gaps: the same bits, forward and backward."""
    values = [a.astype(dtype) for a in draw((3, 20, 6, 5))]
    x, gamma, beta, dy, mean, var = values

    def channels_last(a):
        return np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)

    def gaps(a):
        return np.repeat(np.repeat(a, 2, 3), 3, 1)[:, ::3, :, ::2]

    expected = run(x, gamma, beta, mean.copy(), var.copy(), True, dy)
    for layout in (channels_last, gaps):
        got = run(layout(x), gamma, beta, mean.copy(), var.copy(), True, layout(dy))
        assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


def test_weight_bias_and_running_statistics_may_be_none():
    x, _, _, dy, *_ = draw((3, 4, 5, 2))
    leaf = Tensor(x, requires_grad=True)
    y = batch_norm(leaf, None, None, training=True)
    y.backward(dy)
    one, zero = np.ones(4), np.zeros(4)
    np.testing.assert_allclose(y.array, readable(x, one, zero), rtol=0, atol=32 * EPS * 5)
    np.testing.assert_array_equal(leaf.grad.array, run(x, one, zero, None, None, True, dy)[1])


def test_only_the_gradients_that_are_needed():
    x, gamma, beta, dy, mean, var = draw((3, 4, 5, 2))
    frozen, weight = Tensor(x), Tensor(gamma, requires_grad=True)
    batch_norm(frozen, Tensor(mean), Tensor(var), weight, Tensor(beta), True).backward(dy)
    assert frozen.grad is None
    np.testing.assert_array_equal(weight.grad.array, run(x, gamma, beta, None, None, True, dy)[2])


def test_a_constant_channel_gives_beta():
    x = np.full((4, 3, 5, 5), 0.1, np.float32)
    gamma, beta = np.ones(3, np.float32), np.arange(3, dtype=np.float32)
    y = run(x, gamma, beta, None, None, True)[0]
    # What is left of x - mean is at most the rounding of 0.1, and eps = 1e-5 holds inv_std below 317
    np.testing.assert_allclose(y, np.broadcast_to(beta[:, None, None], x.shape), rtol=0, atol=1e-8 * 317)


def test_float32_statistics_do_not_cancel():
    """A mean of 10000 deviations: E[x²] - E[x]² has no digit left in float32."""
    rng = np.random.default_rng(0)
    x = (1e4 + rng.standard_normal((8, 3, 16, 16))).astype(np.float32)
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    run(x, np.ones(3, np.float32), np.zeros(3, np.float32), mean, var, True, momentum=1.0)
    np.testing.assert_allclose(var, x.astype(np.float64).var((0, 2, 3), ddof=1), rtol=1e-6)


def test_non_finite_inputs_give_nan_without_a_warning():
    x, gamma, beta, dy, *_ = draw((3, 4, 5, 2))
    x[0, 1, 2, 1], x[1, 2, 0, 0] = np.inf, np.nan
    y = run(x, gamma, beta, None, None, True, dy)[0]
    assert np.isnan(y[:, 1:3]).all() and np.isfinite(y[:, [0, 3]]).all()


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (0, 3), (0,)])
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(shape, training):
    c = 3 if len(shape) > 1 else 0
    x, mean, var = np.zeros(shape), np.zeros(c), np.ones(c)
    y, dx, dgamma, dbeta = run(x, np.ones(c), np.zeros(c), mean, var, training, np.zeros(shape))
    assert y.shape == dx.shape == shape and not dgamma.any() and not dbeta.any()
    assert np.array_equal(var, np.ones(c))


def test_statistics_written_before_backward_are_noticed():
    """Evaluation saves the running mean; a training step in between would change the gradient in silence."""
    x, gamma, beta, dy, *running = draw((3, 4, 5, 2))
    leaf, (mean, var), params = Tensor(x, requires_grad=True), map(Tensor, running), (Tensor(gamma), Tensor(beta))
    y = batch_norm(leaf, mean, var, *params)
    batch_norm(leaf, mean, var, *params, training=True)
    with pytest.raises(RuntimeError, match="written into"):
        y.backward(dy)


@pytest.mark.parametrize(
    "shape, change, error, message",
    [
        ((1, 3, 1, 1), {}, ValueError, "more than 1 value per channel"),
        ((1, 3), {}, ValueError, "more than 1 value per channel"),
        ((3,), {}, ValueError, "must be"),
        ((2, 3, 1, 1, 1), {}, ValueError, "must be"),
        ((2, 3), dict(weight=Tensor(np.ones(4))), ValueError, r"weight has shape \(4,\).*needs \(3,\)"),
        ((2, 3), dict(bias=Tensor(np.ones(3, np.float32))), TypeError, "input is float64 and bias float32"),
        ((2, 3), dict(running_var=None), ValueError, "given together"),
        ((2, 3), dict(running_mean=None, running_var=None, training=False), ValueError, "must be given in evaluation"),
    ],
)
def test_bad_input_is_named(shape, change, error, message):
    arguments = dict(running_mean=Tensor(np.zeros(3)), running_var=Tensor(np.ones(3)), training=True) | change
    with pytest.raises(error, match=message):
        batch_norm(Tensor(np.zeros(shape)), **arguments)


@pytest.mark.peers
@pytest.mark.parametrize("shape", [*SHAPES, (4, 20, 9, 7)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_as_pytorch(shape, training, affine):
    torch = pytest.importorskip("torch")
    x, gamma, beta, dy, mean, var = draw(shape)
    theirs = [torch.tensor(a, requires_grad=True) for a in ((x, gamma, beta) if affine else (x,))]
    their_running = torch.tensor(mean), torch.tensor(var)
    expected = torch.nn.functional.batch_norm(
        theirs[0], *their_running, *theirs[1:], training=training, momentum=0.3, eps=1e-3
    )
    expected.backward(torch.tensor(dy))
    leaves = [Tensor(a, requires_grad=True) for a in ((x, gamma, beta) if affine else (x,))]
    running = Tensor(mean), Tensor(var)
    y = batch_norm(leaves[0], *running, *leaves[1:], training=training, momentum=0.3, eps=1e-3)
    y.backward(dy)
    np.testing.assert_allclose(y.array, expected.detach().numpy(), rtol=0, atol=1e-13)
    for leaf, their in zip(leaves, theirs, strict=True):
        np.testing.assert_allclose(leaf.grad.array, their.grad.numpy(), rtol=0, atol=1e-12)
    for ours, their in zip(running, their_running, strict=True):
        np.testing.assert_allclose(ours.array, their.numpy(), rtol=1e-13, atol=1e-15)
