"""What is written where backward still needs it: refused, noticed, or right; never a silently wrong gradient."""

import numpy as np
import pytest

import minires
from minires import Tensor
from minires.nn import functional as F


def leaf(*values):
    return minires.tensor(values, requires_grad=True)


def test_copy_does_not_cut_the_graph():
    x = leaf(1.0, 2.0)
    y, free = x * 2, minires.zeros(2)
    for target, value in ((y, minires.ones(2)), (free, x * 2), (x, minires.ones(2))):
        with pytest.raises(RuntimeError, match=r"inside no_grad\(\) or on \.data"):
            target.copy_(value)
    assert x.tolist() == [1, 2] and y.tolist() == [2, 4] and free.tolist() == [0, 0]
    with minires.no_grad():
        assert x.copy_(y) is x and free.copy_(x).tolist() == [2, 4]
    assert x.requires_grad and x.is_leaf
    assert free.copy_(np.ones(2)).tolist() == [1, 1]


def test_data_may_always_be_written():
    x = leaf(1.0, 2.0)
    memory = x.array
    x.data = leaf(3.0, 4.0)
    x.data.mul_(2)
    assert x.tolist() == [6, 8] and x.array is memory and x.requires_grad and x.is_leaf
    with pytest.raises(ValueError, match=r"shape \(3,\) into a tensor of shape \(2,\)"):
        x.data = np.zeros(3)


@pytest.mark.parametrize("halves", [False, True])
def test_a_gradient_retained_before_an_in_place_op_is_of_the_result(halves):
    x = leaf(1.0, 2.0)
    y = x * 2
    y.retain_grad()
    if halves:
        y = y.half()
        y.retain_grad()
        y += leaf(1.0, 1.0)  # float32, brought back to float16
    y *= 3
    y.backward(minires.tensor([5.0, 7.0], dtype=y.dtype))
    assert y.grad.tolist() == [5, 7] and x.grad.tolist() == [30, 42]


def test_retained_gradients_of_other_tensors_stay_where_they_were():
    x = leaf(1.0, 2.0)
    y = x * 2
    y.retain_grad()
    z = y * 1
    z *= y
    z.backward(minires.ones(2))
    assert y.grad.tolist() == [4, 8] and z.grad is None


def _max(x):
    y, indices = x.max(1)
    return y, lambda: indices.add_(1)


def _max_kept(x):
    y, indices = x.max(1, keepdim=True)
    return y, lambda: indices.fill_(0)


def _topk(x):
    y, indices = x.topk(2)
    return y, lambda: indices.zero_()


def _index(x):
    rows = minires.tensor([0, 1])
    return x[:, rows], lambda: rows.zero_()


def _mask(x):
    mask = x.detach() > 0
    return x[mask], lambda: mask.fill_(False)


def _where(x):
    mask = x.detach() > 0
    return minires.where(mask, x, 0.0), lambda: mask.fill_(False)


def _cross_entropy(x):
    target = minires.tensor([0, 1])
    return F.cross_entropy(x, target), lambda: target.fill_(2)


def _nll(x):
    target = minires.tensor([0, 1])
    return F.nll_loss(x, target), lambda: target.fill_(2)


CHOICES = [_max, _max_kept, _topk, _index, _mask, _where, _cross_entropy, _nll]


@pytest.mark.parametrize("op", CHOICES)
def test_writing_into_what_chose_the_elements_is_noticed(op):
    x = minires.tensor([[3.0, -1.0, 2.0], [-4.0, 5.0, 6.0]], requires_grad=True)
    y, write = op(x)
    write()
    with pytest.raises(RuntimeError, match="needs a tensor that was written into after the forward pass"):
        y.sum().backward()


@pytest.mark.parametrize("op", CHOICES)
def test_what_chose_the_elements_is_let_go_after_backward(op):
    x = minires.tensor([[3.0, -1.0, 2.0], [-4.0, 5.0, 6.0]], requires_grad=True)
    y, write = op(x)
    y.sum().backward()
    write()
    with pytest.raises(RuntimeError, match="freed"):
        y.sum().backward()


def test_an_index_of_numpy_or_a_list_is_copied():
    x, rows = leaf(1.0, 2.0, 3.0), np.array([2, 2])
    y = x[rows]
    rows[:] = 0
    y.backward(minires.tensor([5.0, 7.0]))
    assert x.grad.tolist() == [0, 0, 12]


def test_requires_grad_of_a_computed_or_integer_tensor_cannot_be_assigned():
    x = leaf(1.0)
    y, n = x * 2, minires.tensor([1])
    with pytest.raises(RuntimeError, match=r"use detach\(\)"):
        y.requires_grad = False
    with pytest.raises(ValueError, match="only floating tensors can require gradients, not int64"):
        n.requires_grad = True
    assert y.requires_grad_() is y and y.requires_grad and not n.requires_grad
    x.requires_grad = False
    assert not (x * 2).requires_grad


@pytest.mark.parametrize("data", [[1.0, 2.0], (1.0,), 2, 2.5, minires.ones(2), "1"], ids=str)
def test_the_tensor_class_wraps_arrays_alone(data):
    with pytest.raises(TypeError, match=r"use minires\.tensor\(\.\.\.\)"):
        Tensor(data)


# Gradients on and off


def on():
    return (minires.ones(1, requires_grad=True) * 2).requires_grad


def test_set_grad_enabled_takes_effect_at_once():
    try:
        minires.set_grad_enabled(False)
        assert not on()
        with minires.set_grad_enabled(True):
            assert on()
        assert not on()
        with minires.no_grad():
            pass
        assert not on()
    finally:
        minires.set_grad_enabled(True)
    assert on()


@pytest.mark.parametrize(
    "decorator", [minires.no_grad, minires.no_grad(), lambda function: minires.set_grad_enabled(False)(function)]
)
def test_as_decorator(decorator):
    @decorator
    def run(depth):
        """Its name stays."""
        return on() or (depth > 0 and run(depth - 1)) or on()

    assert on() and not run(2) and on()
    assert run.__name__ == "run" and run.__doc__ == "Its name stays."

    @decorator
    def fails():
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert on()


def test_making_a_no_grad_changes_nothing_until_it_is_entered():
    off = minires.no_grad()
    assert on()
    for _ in range(2):
        with off:
            assert not on()
        assert on()
