"""Shapes, axes, pieces and indices: values as NumPy's, gradients against differences."""

import numpy as np
import pytest
from differences import check_gradients
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import minires
from minires import Tensor


def numbered(*shape):
    return np.arange(np.prod(shape), dtype=np.float64).reshape(shape) - 3.5


CASES = {
    "reshape": (lambda x: x.reshape(4, -1), lambda x: x.reshape(4, -1)),
    "reshape to a tuple": (lambda x: minires.reshape(x, (12, 2)), lambda x: x.reshape(12, 2)),
    "view": (lambda x: x.view(x.size(0), -1), lambda x: x.reshape(2, -1)),
    "flatten": (lambda x: minires.flatten(x, 1), lambda x: x.reshape(2, 12)),
    "flatten all": (lambda x: x.flatten(), lambda x: x.reshape(24)),
    "flatten the first": (lambda x: x.flatten(0, 1), lambda x: x.reshape(6, 4)),
    "unsqueeze": (lambda x: x.unsqueeze(-1), lambda x: x[..., None]),
    "unsqueeze in front": (lambda x: x.unsqueeze(0), lambda x: x[None]),
    "squeeze": (lambda x: x[:1].unsqueeze(2).squeeze(), lambda x: x[0]),
    "squeeze one": (lambda x: x[:1].unsqueeze(2).squeeze(2), lambda x: x[:1]),
    "squeeze an axis that is larger": (lambda x: x.squeeze(1), lambda x: x),
    "permute": (lambda x: x.permute(2, 0, 1), lambda x: x.transpose(2, 0, 1)),
    "permute by a tuple": (lambda x: x.permute((1, -1, 0)), lambda x: x.transpose(1, 2, 0)),
    "transpose": (lambda x: x.transpose(0, -1), lambda x: x.swapaxes(0, 2)),
    "T": (lambda x: x.T, lambda x: x.T),
    "t": (lambda x: x[0].t(), lambda x: x[0].T),
    "expand": (lambda x: x[:, :1].expand(5, -1, 7, 4), lambda x: np.broadcast_to(x[:, :1], (5, 2, 7, 4))),
    "expand_as": (lambda x: x[0, 0].expand_as(x), lambda x: np.broadcast_to(x[0, 0], x.shape)),
    "pad": (
        lambda x: minires.pad(x, (1, 2), value=7),
        lambda x: np.pad(x, ((0, 0), (0, 0), (1, 2)), constant_values=7),
    ),
    "pad an image": (lambda x: minires.pad(x, (1, 0, 2, 3)), lambda x: np.pad(x, ((0, 0), (2, 3), (1, 0)))),
    "pad channels": (lambda x: minires.pad(x, (0, 0, 0, 0, 1, 2)), lambda x: np.pad(x, ((1, 2), (0, 0), (0, 0)))),
    "cat": (lambda x: minires.cat([x, x[:, :1], x], 1), lambda x: np.concatenate([x, x[:, :1], x], 1)),
    "stack": (lambda x: minires.stack((x, x * 2), -1), lambda x: np.stack((x, x * 2), -1)),
    "clone": (lambda x: x.clone(), lambda x: x),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    op, expected = CASES[name]
    x = numbered(2, 3, 4)
    np.testing.assert_array_equal(check_gradients(op, x).array, expected(x))


INDICES = {
    "number": 1,
    "negative number": -2,
    "numbers": (0, 2),
    "all": (1, 2, 3),
    "slice": slice(1, 3),
    "steps": (slice(None), slice(None, None, 2), slice(3, 0, -1)),
    "ellipsis": (..., 0),
    "new axis": (None, slice(None), None, 1),
    "list": [2, 0, 2],
    "repeated": (slice(None), np.array([1, 1, 1])),
    "pairs": ([0, 2, 0], [1, 1, 1]),
    "rows": np.array([[0, 1], [2, 0]]),
    "mask": np.arange(36).reshape(3, 3, 4) % 5 == 0,
    "row mask": np.array([True, False, True]),
    "mask and number": (np.array([True, False, True]), 0),
    "tensor": Tensor(np.array([2, 2, 1])),
    "tensor of one": Tensor(np.array(2)),
    "tensor mask": (slice(None), Tensor(np.array([False, True, True]))),
    "NumPy number": np.int64(2),
    "empty": [],
    "nothing": (),
}


@pytest.mark.parametrize("name", INDICES)
def test_indexing(name):
    index = INDICES[name]
    x = numbered(3, 3, 4)
    parts = index if isinstance(index, tuple) else (index,)
    plain = tuple(p.array if isinstance(p, Tensor) else np.array(p, int) if isinstance(p, list) else p for p in parts)
    y = check_gradients(lambda t: t[index], x)
    np.testing.assert_array_equal(y.array, x[plain])
    assert isinstance(y.array, np.ndarray)


@given(st.data())
def test_drawn_basic_indices(data):
    x = numbered(*data.draw(hnp.array_shapes(max_dims=4, max_side=4)))
    index = data.draw(hnp.basic_indices(x.shape, allow_newaxis=True))
    t = Tensor(x, True)
    y = t[index]
    np.testing.assert_array_equal(y.array, x[index])
    assert not y.array.size or np.shares_memory(y.array, x)
    dy = np.random.default_rng(0).standard_normal(y.shape)
    y.backward(Tensor(dy))
    expected = np.zeros_like(x)
    expected[index] = dy
    np.testing.assert_array_equal(t.grad.array, expected)


@given(st.data())
def test_drawn_integer_indices_add_up_where_they_repeat(data):
    x = numbered(*data.draw(hnp.array_shapes(max_dims=3, max_side=3)))
    index = data.draw(hnp.integer_array_indices(x.shape))
    t = Tensor(x, True)
    y = t[index]
    dy = np.random.default_rng(0).standard_normal(y.shape)
    y.backward(Tensor(dy))
    expected = np.zeros(x.size)
    for at, share in zip(np.arange(x.size).reshape(x.shape)[index].ravel(), dy.ravel(), strict=True):
        expected[at] += share
    np.testing.assert_allclose(t.grad.array.ravel(), expected, rtol=1e-12, atol=1e-12)


def test_cat_of_different_dtypes_and_the_gradient_of_each():
    a, b = minires.ones(2, requires_grad=True), minires.ones(3, dtype=minires.float64, requires_grad=True)
    y = minires.cat([a, b])
    assert y.dtype == minires.float64
    y.backward(Tensor(np.arange(5.0)))
    assert a.grad.dtype == minires.float32 and a.grad.tolist() == [0, 1]
    assert b.grad.tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    "op",
    [
        lambda x: minires.pad(x, (1, 1, 1, 1)),
        lambda x: minires.cat([x, x], 1),
        lambda x: x[:, 1:],
        lambda x: x[[0, 0]],
        lambda x: x.clone(),
    ],
)
def test_channels_last_memory_stays(op):
    x = Tensor(np.ones((2, 5, 5, 3), np.float32).transpose(0, 3, 1, 2), True)
    y = op(x)
    strides = y.array.strides
    assert strides[0] > strides[2] > strides[3] > strides[1]
    y.backward(Tensor(np.ones_like(y.array)))
    assert x.grad.array.transpose(0, 2, 3, 1).flags.c_contiguous


def test_views_show_the_memory_and_count_writes_together():
    x = minires.zeros(2, 3)
    for view in (x.view(-1), x[1], x[:, 1:], x.T, x.transpose(0, 1), x.unsqueeze(0), x.expand(4, 2, 3), x[0, 0]):
        assert np.shares_memory(view.array, x.array) and view.version is x.version
    for copy in (x[[0]], x.clone(), x.T.reshape(6), x + 0):
        assert not np.shares_memory(copy.array, x.array) and copy.version is not x.version


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.reshape(5), "reshape"),
        (lambda x: x.permute(0, 1), "each of the 3 axes"),
        (lambda x: x.permute(0, 1, 1), "repeated"),
        (lambda x: x.transpose(0, 3), "out of bounds"),
        (lambda x: x.t(), "at most two axes"),
        (lambda x: x.expand(2, 3), "cannot be repeated"),
        (lambda x: x.expand(2, 5, 4), "cannot be repeated"),
        (lambda x: x[:, :1].expand(-1, 2, 3, 4), "cannot be repeated"),
        (lambda x: x[:0].expand(2, 3, 4), "cannot be repeated"),
        (lambda x: x.flatten(2, 1), "lies behind"),
        (lambda x: minires.pad(x, (1, -1)), "to crop, slice"),
        (lambda x: minires.pad(x, (1, 1, 1)), "pairs"),
        (lambda x: minires.pad(x, (0,) * 8), "at most 3 pairs"),
        (lambda x: minires.pad(x, (1, 1), mode="reflect"), "only 'constant'"),
        (lambda x: minires.cat([]), "at least one"),
        (lambda x: minires.cat([x, x[0]]), "dimensions"),
        (lambda x: x[2], "out of bounds"),
        (lambda x: x[0, 0, 0, 0], "too many indices"),
        (lambda x: x[Tensor(np.ones(2))], "integers or bools"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, IndexError), match=message):
        call(Tensor(numbered(2, 3, 4)))


@pytest.mark.peers
def test_pad_equals_pytorch():
    torch = pytest.importorskip("torch")
    x = numbered(1, 2, 3, 4)
    for sizes in [(1, 2), (1, 2, 3, 4), (0, 1, 0, 0, 2, 1), (1, 0, 0, 2, 3, 0, 0, 1)]:
        theirs = torch.nn.functional.pad(torch.tensor(x), sizes, "constant", 2.5)
        np.testing.assert_array_equal(minires.pad(Tensor(x), sizes, "constant", 2.5).array, theirs.numpy())


def test_cat_skips_lists_that_began_empty():
    x = minires.tensor([[1.0, 2.0]], requires_grad=True)
    y = minires.cat([minires.zeros(0), x, x], 1)
    y.backward(minires.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert y.tolist() == [[1, 2, 1, 2]] and x.grad.tolist() == [[4, 6]]
    assert minires.cat([minires.zeros(0), minires.zeros(0)]).shape == (0,)
    assert minires.cat([minires.zeros(0, dtype=np.float64), x]).dtype == np.float64
