"""Array ops and losses against plain-NumPy definitions, forward and backward, over drawn shapes and layouts."""

import math

import numpy as np
import pytest
from agreement import DATA, SIZE, agree, broadcastable
from hypothesis import given, settings
from hypothesis import strategies as st

import minires
from minires import Tensor, ops
from minires.engine import Function

SHAPE = st.lists(SIZE, min_size=0, max_size=4).map(tuple)
few = settings(max_examples=40)
more = settings(max_examples=100)


UNARY = {
    "relu": (ops.relu, lambda x: np.where(x.real > 0, x, 0), (0,)),
    "abs": (ops.abs, lambda x: np.where(x.real > 0, x, -x), (0,)),
    "neg": (ops.neg, lambda x: -x, ()),
    "exp": (ops.exp, np.exp, ()),
    "sin": (ops.sin, np.sin, ()),
    "cos": (ops.cos, np.cos, ()),
    "sigmoid": (ops.sigmoid, lambda x: 1 / (1 + np.exp(-x)), ()),
    "tanh": (ops.tanh, np.tanh, ()),
    "log": (lambda x: ops.log(ops.exp(x)), lambda x: x, ()),
    "sqrt": (lambda x: ops.sqrt(x * x + 0.1), lambda x: np.sqrt(x * x + 0.1), ()),
    "pow": (lambda x: ops.pow(x, 3), lambda x: x**3, ()),
    "rpow": (lambda x: 2.0**x, lambda x: 2.0**x, ()),
    "clamp": (
        lambda x: ops.clamp(x, -0.5, 0.5),
        lambda x: np.where(abs(x.real) > 0.5, np.sign(x.real) / 2, x),
        (0.5, -0.5),
    ),
}


@pytest.mark.parametrize("name", UNARY)
@settings(max_examples=20)
@given(DATA, SHAPE)
def test_elementwise(name, data, shape):
    op, definition, kinks = UNARY[name]
    agree(data, op, definition, shape, kinks=kinks)


def _away_from_zero(rng, shape):
    x = rng.standard_normal(shape)
    return x + np.where(x < 0, -0.5, 0.5)


def _greater(a, b):
    return np.where(a.real > b.real, a, b)


BINARY = {
    "add": (ops.add, lambda a, b: a + b),
    "sub": (ops.sub, lambda a, b: a - b),
    "mul": (ops.mul, lambda a, b: a * b),
    "div": (ops.div, lambda a, b: a / b),
    "pow": (lambda a, b: ops.pow(ops.abs(a), b), lambda a, b: np.where(a.real > 0, a, -a) ** b),
    "maximum": (ops.maximum, _greater),
    "minimum": (ops.minimum, lambda a, b: -_greater(-a, -b)),
    "where": (lambda a, b: ops.where(Tensor(np.array(True)), a, b), lambda a, b: a + 0 * b),
    "operators": (lambda a, b: (2 - a) * b / 3 + 1 / b, lambda a, b: (2 - a) * b / 3 + 1 / b),
}


@pytest.mark.parametrize("name", BINARY)
@settings(max_examples=30)
@given(DATA, broadcastable())
def test_broadcasting(name, data, shapes):
    op, definition = BINARY[name]
    agree(data, op, definition, *shapes, make=_away_from_zero, units=256)


@st.composite
def reduced(draw):
    """A shape, axes as `dim` and as NumPy's, keepdim."""
    shape = draw(st.lists(SIZE, min_size=1, max_size=4).map(tuple))
    axes = draw(
        st.lists(st.integers(-len(shape), len(shape) - 1), max_size=len(shape), unique_by=lambda a: a % len(shape))
    )
    if len(axes) == 1 and draw(st.booleans()):
        return shape, axes[0], tuple(axes), draw(st.booleans())
    return shape, tuple(axes) or None, tuple(axes) or None, draw(st.booleans())


def _variance(x, axes, keep):
    n = math.prod(x.shape) // math.prod(x.mean(axes).shape)
    return ((x - x.mean(axes, keepdims=True)) ** 2).sum(axes, keepdims=keep) / (n - 1)


REDUCTIONS = {
    "sum": (ops.sum, lambda x, axes, keep: x.sum(axes, keepdims=keep)),
    "mean": (ops.mean, lambda x, axes, keep: x.mean(axes, keepdims=keep)),
    "norm": (lambda x, d, k: ops.norm(x, 2, d, k), lambda x, a, k: np.sqrt((x * x).sum(a, keepdims=k))),
    "norm1": (lambda x, d, k: ops.norm(x, 1, d, k), lambda x, a, k: np.where(x.real > 0, x, -x).sum(a, keepdims=k)),
    "norm3": (
        lambda x, d, k: ops.norm(x, 3, d, k),
        lambda x, a, k: (np.where(x.real > 0, x, -x) ** 3).sum(a, keepdims=k) ** (1 / 3),
    ),
    "amax": (ops.amax, lambda x, axes, keep: _extreme(x, axes, keep, np.max)),
    "amin": (ops.amin, lambda x, axes, keep: _extreme(x, axes, keep, np.min)),
    "var": (lambda x, d, k: ops.var(x, d, keepdim=k), _variance),
    "std": (lambda x, d, k: ops.std(x, d, keepdim=k), lambda x, axes, keep: np.sqrt(_variance(x, axes, keep))),
}


def _extreme(x, axes, keep, choose):
    chosen = x.real == choose(x.real, axis=axes, keepdims=True)
    return np.where(chosen, x, 0).sum(axes, keepdims=keep)


@pytest.mark.parametrize("name", REDUCTIONS)
@settings(max_examples=30)
@given(DATA, reduced())
def test_reduction(name, data, case):
    shape, dim, axes, keep = case
    if name in ("var", "std"):  # two values at least
        shape = tuple(n + 1 for n in shape)
    op, definition = REDUCTIONS[name]
    agree(data, lambda x: op(x, dim, keep), lambda x: definition(x, axes, keep), shape, kinks=(0,), units=256)


@few
@given(DATA, st.lists(SIZE, min_size=1, max_size=4).map(tuple), st.sampled_from(["max", "min", "topk"]))
def test_values_with_indices(data, shape, name):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    k = data.draw(st.integers(1, shape[dim]))

    def definition(x):
        order = np.argsort(x.real if name == "min" else -x.real, axis=dim, kind="stable")
        order = np.take(order, np.arange(k if name == "topk" else 1), axis=dim)
        values = np.take_along_axis(x, order, dim)
        return values if name == "topk" else values.squeeze(dim)

    def op(x):
        values, indices = ops.topk(x, k, dim) if name == "topk" else getattr(ops, name)(x, dim)
        along = indices.array if name == "topk" else np.expand_dims(indices.array, dim)
        found = np.take_along_axis(x.array, along, dim)
        assert np.array_equal(found.reshape(values.shape), values.array)
        if name != "topk":
            argument = getattr(ops, "arg" + name)(x, dim)
            assert np.array_equal(argument.array, indices.array)
        return values

    agree(data, op, definition, shape, units=16)


@few
@given(DATA, st.lists(SIZE, min_size=1, max_size=4).map(tuple))
def test_shape_ops(data, shape):
    draw, n = data.draw, len(shape)
    axis, other = (draw(st.integers(-n, n - 1)) for _ in range(2))
    order = draw(st.permutations(range(n)))
    start, end = sorted(draw(st.integers(0, n - 1)) for _ in range(2))
    flat = (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])
    at = draw(st.integers(0, n))
    sides = draw(st.lists(st.integers(0, 2), min_size=2 * n, max_size=2 * n))[: 2 * draw(st.integers(1, n))]
    widths = [(0, 0)] * (n - len(sides) // 2) + list(zip(sides[::2], sides[1::2], strict=True))[::-1]
    for op, definition in [
        (lambda x: ops.reshape(x, -1), lambda x: x.reshape(-1)),
        (lambda x: x.view(*flat), lambda x: x.reshape(flat)),
        (lambda x: ops.flatten(x, start, end), lambda x: x.reshape(flat)),
        (lambda x: ops.transpose(x, axis, other), lambda x: x.swapaxes(axis, other)),
        (lambda x: ops.permute(x, *order), lambda x: x.transpose(order)),
        (lambda x: ops.unsqueeze(x, at), lambda x: np.expand_dims(x, at)),
        (ops.squeeze, np.squeeze),
        (lambda x: ops.expand(ops.unsqueeze(x, 0), 3, *shape), lambda x: np.broadcast_to(x, (3, *shape))),
        (lambda x: ops.pad(x, sides, value=2), lambda x: np.pad(x, widths, constant_values=2)),
    ]:
        agree(data, op, definition, shape)


@few
@given(DATA, st.lists(SIZE, min_size=1, max_size=4).map(tuple), st.integers(1, 4), st.booleans())
def test_cat_and_stack(data, shape, count, stack):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    if stack:
        shapes = [shape] * count
    else:
        lengths = data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
        shapes = [(*shape[:axis], length, *shape[axis:][1:]) for length in lengths]
    op, definition = (ops.stack, np.stack) if stack else (ops.cat, np.concatenate)
    agree(data, lambda *ts: op(ts, axis), lambda *arrays: definition(arrays, axis), *shapes)


@st.composite
def indices(draw, shape):
    """A NumPy index of any kind: integers, slices, None, ..., arrays of integers, masks."""
    parts = []
    for n in shape[: draw(st.integers(1, len(shape)))]:
        whole, ends = st.integers(-n, n - 1), st.none() | st.integers(-n, n)
        slices = st.builds(slice, ends, ends, st.sampled_from([None, None, 2]))
        parts.append(draw(st.one_of(whole, slices, slices, st.lists(whole, min_size=2, max_size=2).map(np.array))))
    if draw(st.booleans()):
        parts.append(...)
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), None)
    return tuple(parts) if draw(st.booleans()) or len(parts) > 1 else parts[0]


@more
@given(DATA, st.lists(SIZE, min_size=1, max_size=4).map(tuple), st.booleans())
def test_getitem(data, shape, mask):
    if mask:
        index = np.random.default_rng(math.prod(shape)).random(shape[: data.draw(st.integers(1, len(shape)))]) < 0.5
    else:
        index = data.draw(indices(shape), "index")
    agree(data, lambda x: x[index], lambda x: x[index], shape)


def _log_softmax(x, axis):
    shifted = x - x.real.max(axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))


@few
@given(DATA, st.lists(SIZE, min_size=1, max_size=4).map(tuple), st.booleans())
def test_softmax(data, shape, log):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    if log:
        agree(data, lambda x: ops.log_softmax(x, dim), lambda x: _log_softmax(x, dim), shape)
    else:
        agree(data, lambda x: ops.softmax(x, dim), lambda x: np.exp(_log_softmax(x, dim)), shape)


@more
@given(DATA, st.sampled_from(["mean", "sum", "none"]), st.booleans(), st.sampled_from([0.0, 0.0, 0.1, 1.0]))
def test_cross_entropy(data, reduction, weighted, smoothing):
    draw = data.draw
    n, k, rest = draw(st.integers(0, 6)), draw(st.integers(2, 6)), tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    shape = (n, k, *rest) if n else (k,)
    axis = 1 if n else 0
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    weight = rng.random(k) + 0.1 if weighted else np.ones(k)
    target = rng.integers(0, k, shape[:axis] + shape[axis + 1 :])
    ignored = np.asarray(rng.random(target.shape) < 0.2)
    ignored[(slice(1),) * ignored.ndim] = False  # one row at least counts
    target = np.where(ignored, -100, target)
    column = weight.reshape(-1, *(1,) * (len(shape) - axis - 1))
    one_hot = np.expand_dims(target, axis) == np.arange(k).reshape(column.shape)
    counted = (~ignored).astype(float)
    divisor = (one_hot * column).sum() if weighted else counted.sum()
    soft = draw(st.booleans(), "soft targets")

    def op(x, t=None):
        w = Tensor(weight.astype(x.dtype)) if weighted else None
        return ops.cross_entropy(x, Tensor(target) if t is None else t, w, reduction, smoothing)

    def definition(x, t=None):
        share = (one_hot if t is None else t) * (1 - smoothing) + smoothing / k
        each = -(share * column * _log_softmax(x, axis)).sum(axis) * (counted if t is None else 1)
        if reduction == "none":
            return each
        return each.sum() / ((divisor if t is None else each.size) if reduction == "mean" else 1)

    agree(data, op, definition, *[shape] * (1 + soft), units=256)


@few
@given(DATA, st.sampled_from(["mean", "sum", "none"]), SHAPE)
def test_mse_loss(data, reduction, shape):
    def definition(x, t):
        each = (x - t) ** 2
        return each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()

    agree(data, lambda x, t: ops.mse_loss(x, t, reduction), definition, shape, shape)


@few
@given(DATA, st.sampled_from(["mean", "sum", "none"]), st.integers(1, 5), st.integers(1, 5))
def test_nll_loss(data, reduction, n, k):
    target = np.random.default_rng(n + 10 * k).integers(0, k, n)

    def definition(x):
        each = -x[np.arange(n), target]
        return each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()

    agree(data, lambda x: ops.nll_loss(x, Tensor(target), reduction=reduction), definition, (n, k))


@few
@given(DATA, SHAPE, st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_dropout(data, shape, p):
    """What is dropped is random, so the definition is read off: every number is 0 or x / (1 - p)."""
    seen = {}

    def op(x):
        minires.manual_seed(3)
        y = ops.dropout(x, p)
        seen["kept"] = y.array != 0
        return y

    agree(data, op, lambda x: np.where(seen["kept"], x / max(1 - p, 1e-9), 0), shape, kinks=(0,))
    agree(data, lambda x: ops.dropout(x, p, training=False), lambda x: x, shape)


class _Wrong(Function):
    """x * x with a flaw."""

    @staticmethod
    def forward(ctx, x, *, flaw):
        ctx.save_for_backward(x)
        if flaw == "input":
            x += 1e-3
        return (x * x).astype("float16" if flaw == "dtype" else x.dtype) + (1e-6 if flaw == "value" else 0)

    @staticmethod
    def backward(ctx, dy):
        (x,), flaw = ctx.saved_for_backward, ctx.params["flaw"]
        if flaw == "dy" and dy.flags.writeable:
            dy *= 2
        return 2 * x * dy * (1 + 1e-5 * (flaw == "gradient"))


@pytest.mark.parametrize("flaw", ["value", "dtype", "input", "dy", "gradient"])
def test_a_wrong_op_is_found(flaw):
    @settings(max_examples=20, database=None, report_multiple_bugs=False)
    @given(DATA)
    def check(data):
        agree(data, lambda x: _Wrong.apply(x, flaw=flaw), lambda x: x * x, (3, 2))

    with pytest.raises(AssertionError):
        check()
