"""Softmax and the losses: values against the formulas, gradients, ignored rows, extremes, errors, PyTorch."""

import itertools

import numpy as np
import pytest
from differences import check_gradients

from minires import Tensor
from minires.gradcheck import gradcheck
from minires.ops import cross_entropy, log_softmax, mse_loss, nll_loss, softmax

REDUCTIONS = ["none", "mean", "sum"]
SHAPES = [(4, 5), (5,), (2, 3, 4), (2, 3, 2, 2)]
SUM = {"none": lambda loss, d: loss, "sum": lambda loss, d: loss.sum(), "mean": lambda loss, d: loss.sum() / d}


def draw(shape, seed=0):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape))


def classes_of(shape):
    return shape[min(len(shape) - 1, 1)]


def classes(shape, seed=1):
    k, shape = classes_of(shape), shape[:1] * (len(shape) > 1) + shape[2:]
    return np.asarray(np.random.default_rng(seed).integers(0, k, shape))


def probabilities(shape, seed=2):
    p = np.random.default_rng(seed).random(shape)
    return p / p.sum(min(len(shape) - 1, 1), keepdims=True)


def one_by_one(x, target, weight=None, smoothing=0.0, ignore_index=-100):
    """The definition, row by row: the losses, and the sum of the rows' weights."""
    k = classes_of(x.shape)
    weight = np.ones(k) if weight is None else weight
    rows = np.moveaxis(x, min(x.ndim - 1, 1), -1).reshape(-1, k)
    soft = target.dtype.kind == "f"
    targets = np.moveaxis(target, min(x.ndim - 1, 1), -1).reshape(-1, k) if soft else target.reshape(-1)
    loss, total = [], 0.0
    for row, t in zip(rows, targets, strict=True):
        log_p = np.log(np.exp(row) / np.exp(row).sum())
        counts = soft or t != ignore_index
        q = t if soft else np.eye(k)[t if counts else 0]
        loss.append(-(weight * (q * (1 - smoothing) + smoothing / k) * log_p).sum() if counts else 0.0)
        total += 1 if soft else weight[t] * counts
    shape = x.shape[:1] * (x.ndim > 1) + x.shape[2:]
    return np.reshape(loss, shape), total


@pytest.mark.parametrize("op", [softmax, log_softmax])
@pytest.mark.parametrize("shape, dim", [((5,), 0), ((3, 4), 0), ((3, 4), -1), ((2, 3, 4), 1), ((), 0), ((2, 0, 3), 2)])
def test_softmax(op, shape, dim):
    x = draw(shape)
    y = check_gradients(lambda t: op(t, dim), x)
    want = np.exp(x) / np.exp(x).sum(dim if shape else (), keepdims=True)
    np.testing.assert_allclose(y.array, want if op is softmax else np.log(want), rtol=1e-13, atol=1e-14)
    assert y.shape == shape


def test_softmax_of_large_numbers_and_in_another_dtype():
    x = np.array([[1e30, -1e30, 1e30], [-1e4, -1e4, -np.inf]], np.float32)
    np.testing.assert_array_equal(softmax(Tensor(x), 1).array, np.float32([[0.5, 0, 0.5], [0.5, 0.5, 0]]))
    assert softmax(Tensor(np.array([1, 2])), 0).dtype == np.float32
    leaf = Tensor(x[:, :2], True)
    y = log_softmax(leaf, 1, dtype=np.float64)
    y.backward(Tensor(draw(y.shape)))
    assert y.dtype == np.float64 and leaf.grad.dtype == np.float32


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignore", [False, True])
def test_cross_entropy_with_classes(shape, reduction, weighted, smoothing, ignore):
    x, t, k = draw(shape), classes(shape), classes_of(shape)
    weight = np.linspace(0.5, 2, k) if weighted else None
    t = np.where(t == t.flat[0], -1, t) if ignore and t.ndim else t
    w = None if weight is None else Tensor(weight)
    y = check_gradients(lambda x: cross_entropy(x, Tensor(t), w, reduction, smoothing, -1), x)
    want = SUM[reduction](*one_by_one(x, t, weight, smoothing, -1))
    np.testing.assert_allclose(y.array, want, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_with_probabilities(shape, reduction, weighted, smoothing):
    x, q, k = draw(shape), probabilities(shape), classes_of(shape)
    weight = np.linspace(0.5, 2, k) if weighted else None
    w = None if weight is None else Tensor(weight)
    y = check_gradients(lambda x, q: cross_entropy(x, q, w, reduction, smoothing), x, q)
    np.testing.assert_allclose(y.array, SUM[reduction](*one_by_one(x, q, weight, smoothing)), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_nll_of_log_softmax_is_cross_entropy(shape, reduction, weighted):
    x, t, axis = draw(shape), classes(shape), min(len(shape) - 1, 1)
    t = np.where(t == t.flat[0], 7, t) if t.ndim else t
    w = Tensor(np.linspace(0.5, 2, shape[axis])) if weighted else None
    y = check_gradients(lambda x: nll_loss(x, Tensor(t), w, reduction, 7), x)
    with_softmax = nll_loss(log_softmax(Tensor(x), axis), Tensor(t), w, reduction, 7)
    want = cross_entropy(Tensor(x), Tensor(t), w, reduction, ignore_index=7)
    np.testing.assert_allclose(with_softmax.array, want.array, rtol=1e-13, atol=1e-14)
    assert y.shape == want.shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mse(reduction):
    x, t = draw((3, 4)), draw((3, 4), 1)
    y = check_gradients(lambda x, t: mse_loss(x, t, reduction), x, t)
    np.testing.assert_allclose(y.array, SUM[reduction]((x - t) ** 2, 12), rtol=1e-13)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: cross_entropy(x, Tensor(np.array([2, 0, 1])), label_smoothing=0.1),
        lambda x: cross_entropy(x, Tensor(np.array([2, 0, 1]))),
        lambda x: log_softmax(x, 1),
        lambda x: softmax(x, 0),
        lambda x: mse_loss(x, x * 2),
    ],
)
def test_complex_numbers_pass(loss):
    x = draw((3, 4))
    slope = loss(Tensor(x + 1e-30j * draw((3, 4), 5))).array.imag / 1e-30
    leaf = Tensor(x, True)
    y, dy = loss(leaf), draw(slope.shape, 6)
    y.backward(Tensor(dy))
    np.testing.assert_allclose((leaf.grad.array * draw((3, 4), 5)).sum(), (slope * dy).sum(), rtol=1e-12)
    assert gradcheck(loss, Tensor(x, True))


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_large_logits_in_float32(scale):
    x = (scale * draw((6, 9))).astype(np.float32)
    t = classes((6, 9))
    leaf = Tensor(x, True)
    loss = cross_entropy(leaf, Tensor(t), reduction="none")
    loss.backward(Tensor(np.ones(6, np.float32)))
    shifted = x.astype(np.float64) - x.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    np.testing.assert_allclose(loss.array, -log_p[np.arange(6), t], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(leaf.grad.array, np.exp(log_p) - np.eye(9)[t], atol=1e-5)


def test_impossible_classes():
    """A logit of -inf is a class of probability 0: nothing flows there; as a target its loss is infinite."""
    x = Tensor(np.array([[0.0, -np.inf, 1.0], [-np.inf, 2.0, 2.0]], np.float32), True)
    cross_entropy(x, Tensor(np.array([0, 2]))).backward()
    assert np.all(np.isfinite(x.grad.array)) and x.grad.array[0, 1] == x.grad.array[1, 0] == 0
    assert cross_entropy(x, Tensor(np.array([1, 2]))).item() == np.inf
    ignored = cross_entropy(x, Tensor(np.array([2, -100])))  # row 1 would count for class 0, at -inf
    np.testing.assert_allclose(ignored.item(), np.log1p(np.exp(-1)), rtol=1e-6)
    soft = cross_entropy(x, Tensor(np.array([[0.5, 0, 0.5], [0, 1, 0]], np.float32)))
    assert np.isfinite(soft.item())


def test_a_nan_logit_shows():
    x = np.zeros((3, 20), np.float32)
    x[1, 13] = np.nan
    loss = cross_entropy(Tensor(x), Tensor(np.array([0, 1, 2])), reduction="none").array
    assert list(np.isnan(loss)) == [False, True, False]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mean_over_nothing_is_nan(smoothing):
    x = Tensor(draw((2, 3)))
    nothing = Tensor(np.array([-100, -100]))
    assert np.isnan(cross_entropy(x, nothing, label_smoothing=smoothing).item())
    assert np.isnan(nll_loss(x, nothing).item())
    assert cross_entropy(x, nothing, reduction="sum", label_smoothing=smoothing).item() == 0
    empty = Tensor(np.empty((0, 3))), Tensor(np.empty(0, np.int64))
    assert np.isnan(cross_entropy(*empty, label_smoothing=smoothing).item())


def test_the_target_is_not_written_into():
    t = np.array([1, -100, 0])
    cross_entropy(Tensor(draw((3, 2))), Tensor(t))
    np.testing.assert_array_equal(t, [1, -100, 0])


@pytest.mark.parametrize("loss", [cross_entropy, nll_loss])
@pytest.mark.parametrize(
    "target, message",
    [
        (np.array([0, 1, 2, 12]), "target 12 at row 3 is not a class: there are 10"),
        (np.array([0, -1, 2, 3]), "target -1 at row 1 is not a class: there are 10"),
        (np.array([0, 1, 2]), r"needs class targets of shape \(4,\), not \(3,\)"),
        (np.zeros((4, 10), int), r"needs class targets of shape \(4,\), not \(4, 10\)"),
    ],
)
def test_targets_that_do_not_fit(loss, target, message):
    with pytest.raises(ValueError, match=message):
        loss(Tensor(draw((4, 10))), Tensor(target))


X, T = Tensor(draw((4, 3))), Tensor(np.array([0, 1, 2, 0]))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: cross_entropy(X, T, reduction="max"), ValueError, "reduction='max' must be one of"),
        (lambda: cross_entropy(X, T, label_smoothing=1.5), ValueError, "label_smoothing=1.5"),
        (lambda: cross_entropy(X, T, Tensor(np.ones(4))), ValueError, r"weight has shape \(4,\), 3 classes"),
        (lambda: cross_entropy(X, Tensor(np.ones(4))), ValueError, "must be like the input"),
        (lambda: cross_entropy(X, X, ignore_index=1), ValueError, "ignore_index is for class targets"),
        (lambda: cross_entropy(T, T), TypeError, "input must be floating, not int64"),
        (lambda: cross_entropy(Tensor(np.array(1.0)), T), ValueError, r"must be \(N, K\)"),
        (lambda: cross_entropy(X, Tensor(np.ones(4, bool))), TypeError, "must be integers, not bool"),
        (lambda: nll_loss(X, X), TypeError, "must be integers, not float64"),
        (
            lambda: cross_entropy(Tensor(draw((2, 3, 2))), Tensor(np.array([[0, 1], [2, 5]]))),
            ValueError,
            r"5 at \(1, 1\)",
        ),
        (lambda: mse_loss(X, Tensor(draw((4, 1)))), ValueError, r"\(4, 3\) and target \(4, 1\) differ"),
        (lambda: mse_loss(T, T), TypeError, "one floating dtype"),
    ],
)
def test_what_does_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.peers
def test_like_pytorch():
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    for shape, reduction, weighted in itertools.product(SHAPES, REDUCTIONS, [False, True]):
        x, t, q = draw(shape), classes(shape), probabilities(shape)
        w = np.linspace(0.5, 2, classes_of(shape)) if weighted else None
        for smoothing, ignore in itertools.product([0.0, 0.2], [-100, 1]):
            some = dict(label_smoothing=smoothing, ignore_index=ignore)
            _compare(torch, cross_entropy, F.cross_entropy, x, t, w, reduction=reduction, **some)
        _compare(torch, cross_entropy, F.cross_entropy, x, q, w, reduction=reduction, label_smoothing=0.2)
        _compare(torch, cross_entropy, F.cross_entropy, x, q, w, reduction=reduction)
        _compare(torch, nll_loss, F.nll_loss, x, t, w, reduction=reduction, ignore_index=0)
    for reduction in REDUCTIONS:
        _compare(torch, mse_loss, F.mse_loss, draw((3, 4)), draw((3, 4), 1), reduction=reduction)
    for dim in (0, 1, -1):
        for ours, theirs in ((softmax, F.softmax), (log_softmax, F.log_softmax)):
            _compare(torch, lambda x, f=ours, d=dim: f(x, d), lambda x, f=theirs, d=dim: f(x, d), draw((2, 3, 4)))


def _compare(torch, ours, theirs, x, *constants, **params):
    mine, other = Tensor(x, True), torch.tensor(x, requires_grad=True)
    y = ours(mine, *(None if a is None else Tensor(a) for a in constants), **params)
    want = theirs(other, *(None if a is None else torch.tensor(a) for a in constants), **params)
    np.testing.assert_allclose(y.array, want.detach().numpy(), rtol=1e-12, atol=1e-13)
    if np.isnan(y.array).all():  # every row ignored
        return
    dy = draw(y.shape, 9)
    y.backward(Tensor(dy))
    want.backward(torch.tensor(dy))
    np.testing.assert_allclose(mine.grad.array, other.grad.numpy(), rtol=1e-12, atol=1e-13)
