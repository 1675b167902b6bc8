"""Arithmetic, pointwise functions and choices: gradients, broadcasting, dtypes, memory order."""

import numpy as np
import pytest
from differences import check_gradients
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import minires
from minires import Tensor
from minires.ops.layout import unbroadcast

BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "pow": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
}
UNARY = {"neg": np.negative, "abs": np.abs, "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos}
SHAPES = [
    ((2, 3), (2, 3)),
    ((2, 3), (3,)),
    ((2, 3), ()),
    ((), (2, 3)),
    ((), ()),
    ((2, 1, 3), (4, 1)),
    ((1, 3), (2, 1)),
    ((2, 1, 2, 3), (2, 4, 2, 3)),  # one channel over several
    ((1,), (1, 1, 1)),
    ((0, 3), (3,)),
]


def spaced(shape, seed):
    """Distinct numbers from 0.5 to 2, in random order: no kinks, and logarithms and powers are well defined."""
    size = int(np.prod(shape))
    return np.random.default_rng(seed).permutation(np.linspace(0.5, 2 + seed / 64, size)).reshape(shape)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("name", BINARY)
def test_binary_gradients(name, shapes):
    a, b = spaced(shapes[0], 1) - 1 / 128, spaced(shapes[1], 2)
    y = check_gradients(getattr(minires, name), a, b)
    np.testing.assert_array_equal(y.array, BINARY[name](a, b))


@given(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=3), st.sampled_from(sorted(BINARY)))
def test_the_gradient_of_a_broadcast_operand_is_that_of_its_copies_summed(drawn, name):
    op = getattr(minires, name)
    arrays = [spaced(shape, seed) for seed, shape in enumerate(drawn.input_shapes, 1)]
    dy = np.random.default_rng(0).standard_normal(drawn.result_shape)
    small = [Tensor(a, True) for a in arrays]
    large = [Tensor(np.broadcast_to(a, dy.shape).copy(), True) for a in arrays]
    for operands in (small, large):
        y = op(*operands)
        assert y.shape == dy.shape
        y.backward(Tensor(dy))
    for x, copies in zip(small, large, strict=True):
        ones = (1,) * (dy.ndim - x.ndim) + x.shape
        axes = tuple(i for i, (n, m) in enumerate(zip(ones, dy.shape, strict=True)) if n != m or i < dy.ndim - x.ndim)
        expected = copies.grad.array.sum(axes, keepdims=True).reshape(x.shape)
        np.testing.assert_allclose(x.grad.array, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", UNARY)
def test_unary_gradients(name):
    x = spaced((3, 4), 1)
    y = check_gradients(getattr(minires, name), x)
    np.testing.assert_array_equal(y.array, UNARY[name](x))
    if name in ("neg", "abs", "exp", "sin", "cos"):
        check_gradients(getattr(minires, name), -x)


@pytest.mark.parametrize("name", ["neg", "exp", "log", "sqrt", "sin", "cos"])
def test_analytic_functions_take_complex_numbers(name):
    x, h = spaced((5,), 3), 1e-30
    y = getattr(minires, name)(Tensor(x + 1j * h))
    real = Tensor(x, True)
    getattr(minires, name)(real).backward(Tensor(np.ones(5)))
    np.testing.assert_allclose(y.array.imag / h, real.grad.array, rtol=1e-14)


@pytest.mark.parametrize("p", [2, 3, 0, 1, -1, 0.5, -1.5, 2.5])
def test_power_with_a_number(p):
    y = check_gradients(lambda x: x**p, spaced((2, 3), 1))
    np.testing.assert_array_equal(y.array, spaced((2, 3), 1) ** p)
    if p != 0:
        check_gradients(lambda x: abs(p) ** x, spaced((2, 3), 1))


def test_gradients_where_the_formula_has_no_value():
    x = Tensor(np.array([0.0, 0.0, 2.0, 0.0]), True)
    p = Tensor(np.array([0.0, 2.0, 0.0, 1.0]), True)
    (x**p).backward(Tensor(np.array([3.0, 5.0, 7.0, 11.0])))
    np.testing.assert_array_equal(x.grad.array, [0, 0, 0, 11])
    np.testing.assert_allclose(p.grad.array, [0, 0, 7 * np.log(2), 0])
    zero = Tensor(np.array([0.0, -2.0]), True)
    (abs(zero) + zero**0 + zero**2).backward(Tensor(np.array([3.0, 5.0])))
    np.testing.assert_array_equal(zero.grad.array, [0, -25])


def test_ties_of_maximum_and_limits_of_clamp():
    a, b = Tensor(np.array([1.0, 2.0, 3.0]), True), Tensor(np.array([1.0, 3.0, 2.0]), True)
    minires.maximum(a, b).backward(Tensor(np.array([3.0, 5.0, 7.0])))
    np.testing.assert_array_equal(a.grad.array, [1.5, 0, 7])
    np.testing.assert_array_equal(b.grad.array, [1.5, 5, 0])
    x = Tensor(np.array([-2.0, -1.0, 0.5, 1.0, 2.0]), True)
    y = x.clamp(-1, 1)
    y.backward(Tensor(np.array([3.0, 5.0, 7.0, 11.0, 13.0])))
    np.testing.assert_array_equal(y.array, [-1, -1, 0.5, 1, 1])
    np.testing.assert_array_equal(x.grad.array, [0, 5, 7, 11, 0])
    np.testing.assert_array_equal(x.clamp(min=0).array, [0, 0, 0.5, 1, 2])
    with pytest.raises(ValueError, match="min, max or both"):
        x.clamp()


def test_where():
    condition = Tensor(np.array([[True], [False]]))
    y = check_gradients(lambda a, b: minires.where(condition, a, b), spaced((2, 3), 1), spaced((3,), 2))
    np.testing.assert_array_equal(y.array, np.where(condition.array, spaced((2, 3), 1), spaced((3,), 2)))
    with pytest.raises(TypeError, match="bool"):
        minires.where(Tensor(np.ones(2)), y, y)


def test_alpha():
    check_gradients(lambda a, b: minires.add(a, b, alpha=3), spaced((2, 3), 1), spaced((3,), 2))
    check_gradients(lambda a, b: minires.sub(a, b, alpha=-0.5), spaced((2, 3), 1), spaced((3,), 2))
    np.testing.assert_array_equal(minires.add(Tensor(np.ones(2)), 2, alpha=3).array, [7, 7])


def test_equal_operands_get_the_same_gradient_and_nobody_writes_into_it():
    x = Tensor(np.array([1.0, 2.0]), True)
    ((x + x) + (x + x)).backward(Tensor(np.array([3.0, 5.0])))
    np.testing.assert_array_equal(x.grad.array, [12, 20])


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [
        (lambda f, i: f * 2.0, "float32"),
        (lambda f, i: 2 - f, "float32"),
        (lambda f, i: f * np.float64(2), "float32"),
        (lambda f, i: f * 2j, "complex64"),
        (lambda f, i: i * 0.5, "float32"),
        (lambda f, i: i * 2, "int64"),
        (lambda f, i: i**2, "int64"),
        (lambda f, i: i**0.5, "float32"),
        (lambda f, i: i / i, "float32"),
        (lambda f, i: i + f, "float32"),
        (lambda f, i: i.int() + i, "int64"),
        (lambda f, i: (i > 1) + 1, "int64"),
        (lambda f, i: (i > 1) * f, "float32"),
        (lambda f, i: f.half() + i, "float16"),
        (lambda f, i: f + f.double(), "float64"),
        (lambda f, i: f + f.double().sum(), "float32"),  # a tensor without axes gives way within its kind
        (lambda f, i: i + f.double().sum(), "float64"),
        (lambda f, i: f * np.ones(2, np.float64), "float64"),
        (lambda f, i: np.ones(2, np.float32) * f, "float32"),
        (lambda f, i: minires.exp(i), "float32"),
        (lambda f, i: f.to(minires.bfloat16) * 2, "bfloat16"),
        (lambda f, i: f.to(minires.bfloat16) + f, "float32"),
    ],
)
def test_dtypes(operation, dtype):
    f, i = minires.tensor([1.0, 2.0]), minires.tensor([1, 2])
    y = operation(f, i)
    assert isinstance(y, Tensor) and y.dtype == dtype


def test_gradients_come_back_in_the_dtype_of_each_operand():
    f, d = minires.tensor([1.0, 2.0], requires_grad=True), Tensor(np.array([3.0, 4.0]), True)
    (f * d).backward(Tensor(np.array([3.0, 5.0])))
    assert f.grad.dtype == minires.float32 and d.grad.dtype == minires.float64
    np.testing.assert_array_equal(f.grad.array, [9, 20])


@pytest.mark.parametrize(
    "op", [lambda x: x * 2, lambda x: x + x, lambda x: x + x[:, :1], lambda x: -x, minires.exp, lambda x: x**2]
)
def test_channels_last_memory_stays(op):
    x = Tensor(np.ones((2, 5, 5, 3), np.float32).transpose(0, 3, 1, 2), True)
    y = op(x)
    assert y.array.transpose(0, 2, 3, 1).flags.c_contiguous
    y.backward(Tensor(np.ones_like(y.array)))
    assert x.grad.array.transpose(0, 2, 3, 1).flags.c_contiguous


def test_unbroadcast_gives_back_the_same_array_where_there_is_nothing_to_sum():
    dy = np.ones((2, 3))
    assert unbroadcast(dy, (2, 3)) is dy


def test_bad_operands():
    x = minires.ones(2, 3)
    with pytest.raises(TypeError, match="must be a Tensor, an array or a number, not str"):
        minires.add(x, "2")
    with pytest.raises(TypeError, match="one operand must be a Tensor"):
        minires.add(1, 2)
    with pytest.raises(ValueError, match="broadcast"):
        x + minires.ones(2)


@pytest.mark.peers
@pytest.mark.parametrize("name", [*BINARY, *UNARY])
def test_values_dtypes_and_gradients_equal_pytorch(name):
    torch = pytest.importorskip("torch")
    shapes = ((2, 3), (4, 1, 3)) if name in BINARY else ((2, 3),)
    arrays = [spaced(shape, seed) for seed, shape in enumerate(shapes, 1)]
    ours, theirs = [Tensor(a, True) for a in arrays], [torch.tensor(a, requires_grad=True) for a in arrays]
    y, t = getattr(minires, name)(*ours), getattr(torch, name)(*theirs)
    np.testing.assert_allclose(y.array, t.detach().numpy(), rtol=1e-14)
    dy = np.random.default_rng(0).standard_normal(y.shape)
    y.backward(Tensor(dy))
    t.backward(torch.tensor(dy))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.grad.array, b.grad.numpy(), rtol=1e-12)


@pytest.mark.peers
def test_promotion_equals_pytorch():
    torch = pytest.importorskip("torch")
    names = ["bool", "uint8", "int32", "int64", "float16", "float32", "float64"]
    numbers = [True, 2, 2.5]
    for a in names:
        for shape in ((2,), ()):
            mine, theirs = minires.ones(shape, dtype=a), torch.ones(shape, dtype=getattr(torch, a))
            for n in numbers:
                assert (mine * n).dtype == str((theirs * n).dtype).removeprefix("torch."), (a, n)
            for b in names:
                expected = (theirs + torch.ones(2, dtype=getattr(torch, b))).dtype
                assert (mine + minires.ones(2, dtype=b)).dtype == str(expected).removeprefix("torch."), (a, b, shape)


# Choices


def test_an_infinite_gradient_does_not_reach_what_was_not_chosen():
    """A product with the mask would make nan of it."""
    x = minires.tensor([1.0, -1.0], requires_grad=True)
    dy = minires.tensor([np.inf, np.inf])
    zero = minires.zeros(2)
    for op in (lambda: minires.where(x > 0, x, zero), lambda: x.clamp(0), lambda: x.maximum(zero)):
        x.grad = None
        op().backward(dy)
        assert x.grad.tolist() == [np.inf, 0]
    x.grad = None
    (minires.where(x > 0, zero, x)).backward(dy)
    assert x.grad.tolist() == [0, np.inf]


@pytest.mark.peers
@pytest.mark.parametrize("bounds", ["min", "max", "both"])
def test_clamp_by_tensors_equals_pytorch(bounds):
    torch = pytest.importorskip("torch")
    x = np.array([[-2.0, 0.0, 1.0, 3.0], [1.0, 0.5, 2.0, -1.0]])  # with ties
    low, high = np.array([-1.0, 0.0, 1.0, 1.0]), np.array([[2.0], [1.5]])
    ours, theirs = [[make(v) for v in (x, low, high)] for make in (lambda v: Tensor(v, True), torch.tensor)]
    for t in theirs:
        t.requires_grad_()
    used = {"min": (1,), "max": (2,), "both": (1, 2)}[bounds]
    dy = np.random.default_rng(0).standard_normal(x.shape)
    y = ours[0].clamp(**{("min", "max")[i - 1]: ours[i] for i in used})
    t = theirs[0].clamp(**{("min", "max")[i - 1]: theirs[i] for i in used})
    y.backward(dy)
    t.backward(torch.tensor(dy))
    np.testing.assert_array_equal(y.array, t.detach().numpy())
    for i in (0, *used):
        np.testing.assert_allclose(ours[i].grad.array, theirs[i].grad.numpy(), rtol=1e-13)


def test_clamp_keeps_a_nan():
    x, limit = Tensor(np.array([np.nan, 1.0])), Tensor(np.array([0.0, np.nan]))
    assert np.isnan(x.clamp(limit).array).all() and np.isnan(x.clamp(max=limit).array).all()


# Division that rounds down


@pytest.mark.parametrize("b", [np.array([1.5, -0.7, 2.0]), np.array([[2.0], [-3.0]])], ids=["same", "broadcast"])
def test_remainder(b):
    a = np.array([4.1, -3.2, 7.3])
    y = check_gradients(lambda s, t: s % t, a, b)
    np.testing.assert_allclose(y.array, np.mod(a, b), rtol=1e-13)
    q = Tensor(a, True) // Tensor(b)
    np.testing.assert_array_equal(q.array, np.floor(a / b))
    assert not q.requires_grad


def test_rounding_down_with_numbers_and_integers():
    n = minires.tensor([7, -7])
    assert (n // 2).tolist() == [3, -4] and (n % 3).tolist() == [1, 2] and (n // 2).dtype == np.int64
    assert (9 // n).tolist() == [1, -2] and (9 % n).tolist() == [2, -5]
    assert (n % 2.5).dtype == np.float32
    for op in (lambda: n // 0, lambda: n % 0):
        with pytest.raises(ZeroDivisionError, match="an integer is divided by 0"):
            op()


def test_a_bool_has_no_negative():
    with pytest.raises(TypeError, match="use ~ to invert a mask"):
        -minires.tensor([True])
