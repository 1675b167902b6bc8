"""Sums, means, norms, largest and smallest elements: gradients, conventions at ties and at zero, memory order."""

import numpy as np
import pytest
from differences import check_gradients

import minires
from minires import Tensor

DIMS = [None, 0, -1, (0, 2), [1], (-1, 0, 1)]
REDUCE = {
    "sum": np.sum,
    "mean": np.mean,
    "amax": np.max,
    "amin": np.min,
    "norm": lambda x, axis, keepdims: np.sqrt((x * x).sum(axis, keepdims=keepdims)),
    "var": lambda x, axis, keepdims: x.var(axis, ddof=1, keepdims=keepdims),
    "std": lambda x, axis, keepdims: x.std(axis, ddof=1, keepdims=keepdims),
}


def spaced(shape, seed=0):
    """Distinct numbers of both signs, in random order: no ties."""
    return np.random.default_rng(seed).permutation(np.linspace(-2, 2.5, int(np.prod(shape)))).reshape(shape)


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", DIMS, ids=str)
@pytest.mark.parametrize("name", REDUCE)
def test_gradients(name, dim, keepdim):
    x = spaced((3, 2, 4))
    y = check_gradients(lambda t: getattr(minires, name)(t, dim=dim, keepdim=keepdim), x)
    axis = tuple(dim) if isinstance(dim, list) else dim
    np.testing.assert_allclose(y.array, REDUCE[name](x, axis=axis, keepdims=keepdim), rtol=1e-13)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, np.inf, "fro"])
@pytest.mark.parametrize("dim", [None, 1])
def test_norms(p, dim):
    x = spaced((3, 5))
    y = check_gradients(lambda t: t.norm(p, dim), x)
    order = 2 if p == "fro" else p
    expected = np.linalg.norm(x.ravel() if dim is None else x, order, axis=dim)
    np.testing.assert_allclose(y.array, expected, rtol=1e-13)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, np.inf])
def test_the_norm_of_zeros_has_gradient_zero(p):
    x = Tensor(np.array([[0.0, 0.0], [3.0, -4.0]]), True)
    x.norm(p, 1).backward(Tensor(np.array([5.0, 7.0])))
    np.testing.assert_array_equal(x.grad.array[0], 0)
    assert np.all(x.grad.array[1] != 0) or p == np.inf


def test_the_deviation_of_equal_numbers_has_gradient_zero():
    x = Tensor(np.full((2, 3), 4.0), True)
    x.std().backward(Tensor(np.array(3.0)))
    np.testing.assert_array_equal(x.grad.array, 0)


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("name", ["max", "min"])
def test_extremes_along_an_axis(name, dim, keepdim):
    x = spaced((3, 2, 4))
    values = check_gradients(lambda t: getattr(minires, name)(t, dim, keepdim).values, x)
    both = getattr(Tensor(x), name)(dim, keepdim=keepdim)
    np.testing.assert_array_equal(values.array, getattr(np, name)(x, dim, keepdims=keepdim))
    np.testing.assert_array_equal(both.values.array, values.array)
    np.testing.assert_array_equal(both[1].array, getattr(np, f"arg{name}")(x, dim, keepdims=keepdim))
    assert both.indices.dtype == minires.int64 and not both.indices.requires_grad
    alone = getattr(minires, f"arg{name}")(Tensor(x), dim, keepdim)
    np.testing.assert_array_equal(alone.array, both.indices.array)


def test_ties():
    x = np.array([[1.0, 3.0, 3.0], [3.0, 0.0, 2.0]])
    whole, along, over = (Tensor(x, True) for _ in range(3))
    whole.max().backward(Tensor(np.array(6.0)))  # of all: shared evenly
    np.testing.assert_array_equal(whole.grad.array, [[0, 2, 2], [2, 0, 0]])
    values, indices = along.max(1)  # along an axis: to the one whose index was given
    values.backward(Tensor(np.array([5.0, 7.0])))
    np.testing.assert_array_equal(along.grad.array, [[0, 5, 0], [7, 0, 0]])
    assert indices.tolist() == [1, 0]
    over.amax(1).backward(Tensor(np.array([5.0, 7.0])))
    np.testing.assert_array_equal(over.grad.array, [[0, 2.5, 2.5], [7, 0, 0]])


def test_arg_of_all_and_of_nan():
    x = Tensor(np.array([[1.0, 5.0], [np.nan, 0.0]]))
    assert x.argmax().item() == 2 and Tensor(x.array[0]).argmin().item() == 0
    assert x.argmax().shape == ()


def test_topk():
    x = spaced((3, 5))
    values = check_gradients(lambda t: t.topk(2, 1).values, x)
    np.testing.assert_array_equal(values.array, np.sort(x, 1)[:, :-3:-1])
    least = Tensor(x).topk(3, 0, largest=False)
    np.testing.assert_array_equal(least.values.array, np.sort(x, 0))
    np.testing.assert_array_equal(np.take_along_axis(x, least.indices.array, 0), least.values.array)
    with pytest.raises(ValueError, match="k=6"):
        Tensor(x).topk(6)


def test_what_scripts_count_with_it():
    outputs = minires.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]], requires_grad=True)
    labels = minires.tensor([1, 1, 1])
    _, predicted = minires.max(outputs.data, 1)
    assert (predicted == labels).sum().item() == 2
    assert type((predicted == labels).sum().item()) is int
    assert predicted.eq(labels).float().mean().item() == np.float32(2 / 3)


def test_dtypes():
    ints, floats = minires.tensor([[1, 2], [3, 4]]), minires.ones(2, 2)
    assert ints.sum().dtype == minires.int64 and (ints > 1).sum().dtype == minires.int64
    assert ints.to(minires.uint8).sum(0).dtype == minires.int64
    assert ints.sum(dtype=minires.float32).dtype == ints.mean(dtype=minires.float32).dtype == minires.float32
    for name in ("sum", "mean", "norm", "amax", "max", "var", "std"):
        y = getattr(floats, name)()
        assert y.dtype == minires.float32 and isinstance(y.array, np.ndarray), name
    for name in ("mean", "norm"):
        with pytest.raises(TypeError, match="int64"):
            getattr(ints, name)()


def test_bad_input():
    x = minires.ones(2, 3)
    with pytest.raises(ValueError, match="out of bounds"):
        x.sum(2)
    with pytest.raises(ValueError, match=r"p=0.5 must be"):
        x.norm(0.5)
    with pytest.raises(ValueError, match="zero-size"):
        minires.zeros(0).max()


@pytest.mark.parametrize("op", [lambda x: x.sum((2, 3)), lambda x: x.mean((2, 3), True), lambda x: x.max(1).values])
def test_the_gradient_lies_in_the_memory_order_of_the_input(op):
    x = Tensor(np.ones((2, 5, 5, 3), np.float32).transpose(0, 3, 1, 2), True)
    (y := op(x * 1)).backward(Tensor(np.ones_like(y.array)))
    assert x.grad.array.transpose(0, 2, 3, 1).flags.c_contiguous and x.grad.array.flags.writeable


@pytest.mark.peers
@pytest.mark.parametrize("dim", [None, 0, 1, (0, 1)])
@pytest.mark.parametrize("name", [*REDUCE, "max", "min"])
def test_pytorch(name, dim):
    torch = pytest.importorskip("torch")
    if name in ("max", "min") and isinstance(dim, tuple):
        pytest.skip("max takes one axis")
    x = np.round(spaced((4, 3)))  # with ties
    ours, theirs = Tensor(x, True), torch.tensor(x, requires_grad=True)
    args = {} if dim is None else {"dim": dim}
    y, t = getattr(minires, name)(ours, **args), getattr(torch, name)(theirs, **args)
    if isinstance(y, tuple):
        assert y.indices.tolist() == t.indices.tolist()
        y, t = y.values, t.values
    np.testing.assert_allclose(y.array, t.detach().numpy(), rtol=1e-13)
    dy = np.random.default_rng(0).standard_normal(y.shape)
    y.backward(Tensor(dy))
    t.backward(torch.tensor(dy))
    np.testing.assert_allclose(ours.grad.array, theirs.grad.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.peers
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, np.inf])
def test_norm_equals_pytorch_with_ties_and_zeros(p):
    torch = pytest.importorskip("torch")
    x = np.array([[0.0, 0.0, 0.0], [3.0, -3.0, 0.0], [1.0, 2.0, -2.5]])
    ours, theirs = Tensor(x, True), torch.tensor(x, requires_grad=True)
    y, t = ours.norm(p, 1), theirs.norm(p, 1)
    dy = np.array([2.0, 3.0, 5.0])
    y.backward(Tensor(dy))
    t.backward(torch.tensor(dy))
    np.testing.assert_allclose(y.array, t.detach().numpy(), rtol=1e-13)
    np.testing.assert_allclose(ours.grad.array, theirs.grad.numpy(), rtol=1e-12)


@pytest.mark.peers
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("name", ["sum", "mean", "amax", "amin", "var", "std"])
def test_no_axes_are_all_axes_as_in_pytorch(name, keepdim):
    torch = pytest.importorskip("torch")
    x = spaced((3, 4))
    for dim in ((), []):
        y = getattr(Tensor(x), name)(dim=dim, keepdim=keepdim)
        want = getattr(torch.tensor(x), name)(dim=dim, keepdim=keepdim).numpy()
        assert y.shape == want.shape
        np.testing.assert_allclose(y.array, want, rtol=1e-13)


def test_the_norm_over_no_axes_is_over_all():
    x = Tensor(spaced((3, 4)))
    for p in (1, 2, 3, np.inf):
        np.testing.assert_array_equal(x.norm(p, dim=()).array, x.norm(p).array)
    assert x.squeeze(()).shape == (3, 4)  # not a reduction: no axes are none


@pytest.mark.parametrize("name", ["argmax", "argmin"])
def test_the_index_in_the_flattened_tensor_may_keep_its_axes(name):
    x = spaced((3, 4))
    y = getattr(Tensor(x), name)(keepdim=True)
    assert y.shape == (1, 1) and y.item() == getattr(x, name)() and y.dtype == np.int64
    assert getattr(Tensor(x), name)().shape == ()


def test_variance_of_too_few_numbers():
    two = minires.tensor([1.0, 2.0])
    with np.errstate(all="ignore"):
        assert [two.var(correction=n).item() for n in (2, 3)] == [np.inf, np.inf]
        assert two.std(correction=3).item() == np.inf
        assert np.isnan(minires.ones(2).var(correction=3).item())


@pytest.mark.parametrize("name", ["var", "std"])
def test_unbiased_is_a_correction_of_one(name):
    x = Tensor(spaced((3, 4)))
    for unbiased in (False, True):
        y, same = getattr(x, name)(1, unbiased=unbiased), getattr(x, name)(1, correction=int(unbiased))
        np.testing.assert_array_equal(y.array, same.array)
