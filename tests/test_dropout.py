"""Dropout: who is dropped, how the rest is scaled, and that backward uses the same mask."""

import numpy as np
import pytest

import minires
from minires import Tensor


def test_evaluation_and_probability_zero_give_the_tensor_itself():
    x = minires.ones(3)
    assert minires.dropout(x, 0.5, training=False) is x
    assert minires.dropout(x, 0.0) is x


@pytest.mark.parametrize("dtype", [minires.float32, minires.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_kept_elements_are_scaled_and_backward_has_the_same_mask(p, dtype):
    minires.manual_seed(0)
    n = 20_000
    x = Tensor(np.random.default_rng(1).uniform(1, 2, (n // 100, 100)).astype(dtype), True)
    y = minires.dropout(x, p)
    assert y.dtype == dtype
    kept = y.array != 0
    np.testing.assert_allclose(y.array[kept], x.array[kept] / (1 - p), rtol=4 * np.finfo(dtype).eps)
    assert abs(kept.sum() - n * (1 - p)) < 5 * np.sqrt(n * p * (1 - p))  # five standard deviations of the binomial
    dy = np.random.default_rng(2).standard_normal(x.shape).astype(dtype)
    y.backward(Tensor(dy))
    np.testing.assert_allclose(x.grad.array, np.where(kept, dy / (1 - p), 0), rtol=4 * np.finfo(dtype).eps)


def test_probability_one_gives_zeros():
    x = minires.ones(4, requires_grad=True)
    y = minires.dropout(x, 1.0)
    y.backward(minires.ones(4))
    assert y.tolist() == x.grad.tolist() == [0, 0, 0, 0]


def test_the_seed_decides_and_masks_differ_from_call_to_call():
    x = minires.ones(100)
    minires.manual_seed(7)
    first, second = minires.dropout(x), minires.dropout(x)
    assert first.tolist() != second.tolist()
    minires.manual_seed(7)
    assert minires.dropout(x).tolist() == first.tolist()
    state = minires.get_rng_state()
    minires.dropout(x)
    minires.set_rng_state(state)
    assert minires.dropout(x).tolist() == second.tolist()


def test_channels_last_memory_stays():
    x = Tensor(np.ones((2, 5, 5, 3), np.float32).transpose(0, 3, 1, 2))
    assert minires.dropout(x).array.transpose(0, 2, 3, 1).flags.c_contiguous


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_bad_probability(p):
    with pytest.raises(ValueError, match="must be a probability"):
        minires.dropout(minires.ones(2), p)
