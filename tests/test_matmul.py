"""Matrix products: NumPy's values and shapes, gradients, empty ones, errors, PyTorch."""

import numpy as np
import pytest
from differences import check_gradients

from minires import Tensor
from minires.dispatch import run, use_kernels
from minires.gradcheck import gradcheck
from minires.ops import linear, matmul

SHAPES = [
    ((5,), (5,)),
    ((2, 5), (5,)),
    ((5,), (5, 3)),
    ((2, 5), (5, 3)),
    ((4, 2, 5), (5,)),
    ((5,), (4, 5, 3)),
    ((4, 2, 5), (5, 3)),
    ((2, 5), (4, 5, 3)),
    ((4, 2, 5), (4, 5, 3)),
    ((4, 2, 5), (1, 5, 3)),
    ((3, 1, 2, 5), (4, 5, 2)),
    ((2, 1, 3, 4), (4,)),
    ((1, 1), (1, 1)),
]
EMPTY = [((2, 0), (0, 3)), ((0, 5), (5, 3)), ((4, 0, 5), (5,)), ((0,), (0,)), ((0, 0), (5, 0, 0))]
ROWS = [(3,), (4, 3), (2, 5, 3), (2, 1, 2, 3)]


def draw(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


@pytest.mark.parametrize("a, b", SHAPES + EMPTY, ids=str)
def test_matmul(a, b):
    a, b = draw(a, b)
    y = check_gradients(matmul, a, b)
    np.testing.assert_allclose(y.array, np.matmul(a, b), rtol=1e-14)
    assert y.shape == np.matmul(a, b).shape


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [*ROWS, (0, 3), (2, 0, 3)], ids=str)
def test_linear(rows, bias):
    x, w, b = draw(rows, (4, 3), (4,))
    y = check_gradients(linear, x, w, b) if bias else check_gradients(linear, x, w)
    np.testing.assert_allclose(y.array, x @ w.T + (b if bias else 0), rtol=1e-13, atol=1e-14)
    assert y.shape == (*rows[:-1], 4)


def test_gradients_are_computed_only_where_they_are_needed():
    for needed in (0, 1):
        inputs = [Tensor(a, i == needed) for i, a in enumerate(draw((4, 3), (2, 3)))]
        y = linear(*inputs)
        assert [saved is None for saved in y.node.saved_for_backward] == [needed == 0, needed == 1]
        y.backward(Tensor(np.ones(y.shape)))
        assert inputs[1 - needed].grad is None


def test_integers_have_a_product():
    y = matmul(Tensor(np.arange(6).reshape(2, 3)), Tensor(np.arange(3)))
    np.testing.assert_array_equal(y.array, [5, 14])
    assert y.dtype == np.int64


@pytest.mark.parametrize("op, shapes", [(matmul, ((2, 3), (3, 4))), (linear, ((2, 3), (4, 3), (4,)))])
def test_complex_numbers_pass(op, shapes):
    gradcheck(op, [Tensor(a, True) for a in draw(*shapes)], method="complex")


def test_our_own_tiles_agree_with_blas():
    """Dispatch prefers BLAS; the register tiles stay within reach and right at a real layer's size."""
    x, w, b = (a.astype(np.float32) for a in draw((9, 130), (37, 130), (37,)))
    with use_kernels(linear_fprop="linear_fprop_tile"):
        y = run("linear_fprop", x, w, b)
    bound = 32 * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(w).T + np.abs(b))
    assert np.all(np.abs(y - run("linear_fprop", x, w, b)) <= bound)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: matmul(*map(Tensor, draw((2, 3), (4, 5)))), ValueError, "rows of 3, .* columns of 4"),
        (lambda: matmul(*map(Tensor, draw((2, 3), (4,)))), ValueError, "columns of 4"),
        (lambda: matmul(*map(Tensor, draw((3, 2, 3), (2, 3, 2)))), ValueError, "do not broadcast"),
        (lambda: matmul(Tensor(np.array(2.0)), *map(Tensor, draw((3,)))), ValueError, "at least one axis"),
        (lambda: linear(*map(Tensor, draw((2, 3), (4, 5)))), ValueError, r"input \(2, 3\) .* weight \(4, 5\)"),
        (lambda: linear(*map(Tensor, draw((2, 3), (4, 3), (3,)))), ValueError, r"bias has shape \(3,\).*\(4,\)"),
        (lambda: matmul(Tensor(np.ones((2, 2), "f4")), *map(Tensor, draw((2, 2)))), TypeError, "float32, float64"),
        (lambda: linear(Tensor(np.ones((2, 2), "f4")), *map(Tensor, draw((2, 2)))), TypeError, "float32, float64"),
    ],
)
def test_what_does_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.peers
def test_like_pytorch():
    torch = pytest.importorskip("torch")
    cases = [(matmul, torch.matmul, draw(*shapes)) for shapes in SHAPES + EMPTY]
    for rows in ROWS:
        cases += [(linear, torch.nn.functional.linear, draw(rows, (4, 3), *more)) for more in ([], [(4,)])]
    for ours, theirs, arrays in cases:
        mine, other = [Tensor(a, True) for a in arrays], [torch.tensor(a, requires_grad=True) for a in arrays]
        y, want = ours(*mine), theirs(*other)
        dy = np.asarray(np.random.default_rng(1).standard_normal(y.shape))
        y.backward(Tensor(dy))
        want.backward(torch.tensor(dy))
        np.testing.assert_allclose(y.array, want.detach().numpy(), rtol=1e-13, atol=1e-13)
        for a, b in zip(mine, other, strict=True):
            np.testing.assert_allclose(a.grad.array, b.grad.numpy(), rtol=1e-13, atol=1e-13)
