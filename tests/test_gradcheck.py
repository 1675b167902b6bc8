"""gradcheck passes right gradients, names wrong ones, and does not call a kink a wrong gradient."""

import numpy as np
import pytest

import minires as mr
from minires import nn
from minires.engine import Function, Tensor
from minires.gradcheck import GradcheckError, KinkError, gradcheck

rng = np.random.default_rng(7)


def leaf(*shape):
    return Tensor(rng.standard_normal(shape), requires_grad=True)


def function(forward, backward):
    """An op of one input from two functions of arrays: y = forward(x), dx = backward(dy, x)."""

    class Op(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx, dy):
            return backward(dy, *ctx.saved_for_backward)

    return Op.apply


def batch_norm_of(terms):
    """Batch normalisation over axis 0, with the terms of dx that are named."""

    def forward(x):
        centred = x - x.mean(0)
        return centred / ((centred * centred).mean(0) + 1e-5) ** 0.5

    def backward(dy, x):
        x_hat, inv_std = forward(x), (x.var(0) + 1e-5) ** -0.5
        dx = dy.copy()
        if "mean" in terms:
            dx -= dy.mean(0)
        if "variance" in terms:
            dx -= x_hat * (dy * x_hat).mean(0)
        return dx * inv_std

    return function(forward, backward)


METHODS = ["auto", "complex", "directional"]


@pytest.mark.parametrize("method", METHODS)
def test_right_gradients_pass(method):
    assert gradcheck(mr.exp, leaf(3, 4), method=method)
    assert gradcheck(lambda a, b: (a * b).sum(0), (leaf(3, 4), leaf(4)), method=method)
    assert gradcheck(batch_norm_of({"mean", "variance"}), leaf(5, 3), method=method)
    assert gradcheck(lambda x: x.sum(), leaf(2, 0), method=method)
    assert gradcheck(lambda x, unused: x / 2, (leaf(3), leaf(2)), method=method)


def test_ops_of_the_library_pass():
    assert gradcheck(lambda x, w, b: mr.conv2d(x, w, b, 2, 1), (leaf(2, 3, 5, 5), leaf(4, 3, 3, 3), leaf(4)))
    statistics = leaf(2, 3, 4, 4), leaf(3), leaf(3), leaf(2, 3, 4, 4)
    assert gradcheck(lambda x, w, b, z: mr.bn_add_relu(x, z, None, None, w, b, training=True), statistics)
    labels = Tensor(np.array([1, 0, 2]))
    assert gradcheck(lambda x, t: mr.cross_entropy(x, t, label_smoothing=0.1), (leaf(3, 4), labels))


@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_gradient_is_named(method):
    """Of one element only, and by a hundredth only."""

    class Product(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx, dy):
            a, b = ctx.saved_for_backward
            db = dy * a
            db[1, 2] *= 1.01
            return dy * b, db

    inputs = leaf(3, 4), leaf(3, 4)
    with pytest.raises(
        GradcheckError, match=r"of input 1 \(shape \(3, 4\)\): analytic -?\d+\.\d+, numeric -?\d+\.\d+ \(c"
    ):
        gradcheck(Product.apply, inputs, method=method)
    assert not gradcheck(Product.apply, inputs, method=method, raise_exception=False)


def test_all_wrong_inputs_are_named():
    class Swapped(Function):
        @staticmethod
        def forward(ctx, a, b, c):
            ctx.save_for_backward(a, b)
            return a * b + c

        @staticmethod
        def backward(ctx, dy):
            a, b = ctx.saved_for_backward
            return dy * a, dy * b, dy

    with pytest.raises(GradcheckError) as caught:
        gradcheck(Swapped.apply, (leaf(5), leaf(5), leaf(5)))
    assert [f"input {i}" in str(caught.value) for i in range(3)] == [True, True, False]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("terms", [{"mean"}, {"variance"}, set()])
def test_batch_norm_without_one_of_its_terms_is_wrong(terms, method):
    with pytest.raises(GradcheckError, match="wrong gradient of input 0"):
        gradcheck(batch_norm_of(terms), leaf(6, 3), method=method)


def test_a_plain_sum_would_not_have_seen_the_missing_variance_term():
    """Why the upstream gradient is random: with ones the broken backward is exactly right."""
    gradients = []
    for terms in ({"mean", "variance"}, {"mean"}):
        x = Tensor(np.random.default_rng(0).standard_normal((6, 3)), requires_grad=True)
        batch_norm_of(terms)(x).backward(np.ones((6, 3)))
        gradients.append(x.grad.array)
    np.testing.assert_allclose(*gradients, atol=1e-15)


# --- kinks ----------------------------------------------------------------------------------------------------------


def relu(slope_below):
    """ReLU whose backward lets the negative side pass with a slope: 0 is right."""
    return function(lambda x: np.maximum(x.real, 0), lambda dy, x: dy * np.where(x > 0, 1, slope_below))


KINKS = {
    "relu at zero": (mr.relu, np.zeros((3, 4))),
    "relu at one zero of many": (mr.relu, np.array([0.0, *rng.standard_normal(50)])),
    "relu close to zero": (mr.relu, np.array([1e-5, -1e-4, 1e-3, -2e-4, 1.0])),
    "abs at zero": (mr.abs, np.zeros(5)),
    "amax of equal values": (lambda x: mr.amax(x, 1), np.ones((2, 3))),
    "max pool of equal values": (lambda x: mr.max_pool2d(x, 2), np.ones((1, 2, 4, 4))),
    "norm at zero": (mr.norm, np.zeros(4)),
    "a jump": (function(np.sign, lambda dy, x: 0 * dy), np.array([0.0, 1.0])),
}


@pytest.mark.parametrize("method", ["auto", "directional"])
@pytest.mark.parametrize("name", KINKS)
def test_a_kink_is_no_wrong_gradient(name, method):
    fn, point = KINKS[name]
    assert gradcheck(fn, Tensor(point, requires_grad=True), method=method)


def test_beside_a_kink_the_step_shrinks_and_the_point_stays():
    given, seen = np.array([2e-5, -1e-4, 1.0]), []
    assert gradcheck(lambda x: seen.append(x.array.copy()) or mr.relu(x), Tensor(given, requires_grad=True))
    assert max(abs(x - given).max() for x in seen) < 2e-3
    seen.clear()
    assert gradcheck(lambda x: seen.append(x.array.copy()) or mr.relu(x), Tensor(given * [0, 1, 1], requires_grad=True))
    assert max(abs(x - given).max() for x in seen) > 1e-2  # on a kink it has to move


@pytest.mark.parametrize("point", [np.zeros(6), np.array([1e-5, -1e-4, -0.5, 2.0])], ids=["at a kink", "close to one"])
def test_a_wrong_gradient_is_found_at_a_kink_too(point):
    x = Tensor(point, requires_grad=True)
    assert gradcheck(relu(0.0), x)
    with pytest.raises(GradcheckError, match="wrong gradient of input 0") as caught:
        gradcheck(relu(0.01), x)
    assert not isinstance(caught.value, KinkError)


def test_a_function_that_is_all_kinks_says_so():
    saw = function(lambda x: abs(x * 1e9 % 1 - 0.5), lambda dy, x: dy)
    with pytest.raises(KinkError, match=r"at a kink of fn along input 0 \(shape \(3,\)\)"):
        gradcheck(saw, leaf(3))
    assert not gradcheck(saw, leaf(3), raise_exception=False)


# --- complex step ---------------------------------------------------------------------------------------------------


def test_the_complex_step_is_exact_to_rounding_and_auto_takes_it():
    def fn(x):
        return mr.exp(x * x).sum()

    assert gradcheck(fn, leaf(4), rtol=1e-14, method="complex")
    assert gradcheck(fn, leaf(4), rtol=1e-14)
    slightly_wrong = function(np.exp, lambda dy, x: dy * np.exp(x) * (1 + 3e-8))
    assert gradcheck(slightly_wrong, leaf(4), method="directional")
    with pytest.raises(GradcheckError, match="complex step"):
        gradcheck(slightly_wrong, leaf(4))


def test_where_the_complex_step_misleads_auto_does_not_follow():
    """abs of a complex number has no derivative in that sense: the step gives 0, and so does this wrong backward."""
    fn = function(lambda x: abs(x) + 0 * x, lambda dy, x: 0 * dy)
    assert gradcheck(fn, leaf(4), method="complex")
    with pytest.raises(GradcheckError, match="central differences"):
        gradcheck(fn, leaf(4))
    assert gradcheck(mr.abs, leaf(4))
    with pytest.raises(TypeError, match="made a real number of a complex one"):
        gradcheck(mr.abs, leaf(4), method="complex")


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_inputs_that_cannot_be_checked():
    x = leaf(3)
    cases = [
        (TypeError, "input 0 is float32", mr.exp, Tensor(np.ones(3, np.float32), requires_grad=True)),
        (TypeError, "input 1 is a ndarray", mr.mul, (x, np.ones(3))),
        (ValueError, "no input requires gradients", mr.exp, Tensor(np.ones(3))),
        (ValueError, "was computed by Mul; pass a leaf", mr.exp, x * 2),
        (ValueError, "does not depend on an input", lambda x: x.detach() * 2, x),
        (ValueError, "is float32", lambda x: x.to(np.float32), x),
        (TypeError, "returned a tuple", lambda x: (x, x), x),
        (ValueError, "gave two results", lambda x: mr.dropout(x, 0.5), leaf(40)),
        (ValueError, "NaN or Inf", lambda x: x * np.inf, x),
    ]
    for error, message, fn, inputs in cases:
        with pytest.raises(error, match=message):
            gradcheck(fn, inputs)
    with pytest.raises(ValueError, match="method='numeric' must be"):
        gradcheck(mr.exp, x, method="numeric")


def test_what_was_given_is_as_it_was_afterwards():
    x, y = leaf(3), leaf(3)
    x.grad = Tensor(np.ones(3))
    arrays, grad, values = (x.array, y.array), x.grad, (x.array.copy(), y.array.copy())
    gradcheck(lambda a, b: mr.relu(a) * b, (x, y))
    gradcheck(batch_norm_of(set()), x, raise_exception=False)
    assert x.array is arrays[0] and y.array is arrays[1]
    assert x.grad is grad and y.grad is None
    np.testing.assert_array_equal(x.array, values[0])
    np.testing.assert_array_equal(y.array, values[1])


def test_the_parameters_of_a_module():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = leaf(5, 3)
    assert gradcheck(lambda *_: model(x), [x, *model.parameters()])


def test_the_seed_decides_the_directions():
    seen = []
    for seed in (0, 0, 1):
        points = []

        def fn(x, points=points):
            points.append(x.array.copy())
            return x * x

        gradcheck(fn, Tensor(np.ones(3), requires_grad=True), seed=seed)
        seen.append(np.stack(points))
    np.testing.assert_array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2])
