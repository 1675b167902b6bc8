"""Optimizers: against their formulas in NumPy, against PyTorch (peers), their groups, state and errors."""

import math

import numpy as np
import pytest

from minires.engine import Tensor
from minires.nn import Parameter
from minires.nn.utils import clip_grad_norm_, clip_grad_value_, parameters_to_vector, vector_to_parameters
from minires.optim import LARS, SGD, Adam, AdamW

SHAPES = ((5, 3, 3, 3), (7,), (4, 6))


def _parameters(seed=0, dtype=np.float64, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return [Parameter(rng.standard_normal(shape).astype(dtype)) for shape in shapes]


def _set_grads(params, step, scale=1.0):
    rng = np.random.default_rng((1, step))
    for p in params:
        p.grad = Tensor((scale * rng.standard_normal(p.shape)).astype(p.dtype))


def _run(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        _set_grads(params, step)
        optimizer.step()
    return [p.array.copy() for p in params]


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_sgd_by_hand():
    (p,) = params = _parameters(shapes=((4, 3),))
    x, b = p.array.copy(), 0.0
    optimizer = SGD(params, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01)
    for step in range(4):
        _set_grads(params, step)
        g = p.grad.array + 0.01 * x
        b = g if step == 0 else 0.9 * b + 0.7 * g
        x = x - 0.1 * b
        optimizer.step()
        np.testing.assert_allclose(p.array, x, rtol=1e-13, atol=1e-15)


def test_nesterov_by_hand():
    (p,) = params = _parameters(shapes=((9,),))
    x, b = p.array.copy(), 0.0
    optimizer = SGD(params, lr=0.05, momentum=0.8, nesterov=True)
    for step in range(4):
        _set_grads(params, step)
        g = p.grad.array
        b = g if step == 0 else 0.8 * b + g
        x = x - 0.05 * (g + 0.8 * b)
        optimizer.step()
        np.testing.assert_allclose(p.array, x, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_by_hand(decoupled, amsgrad):
    (p,) = params = _parameters(shapes=((4, 3),))
    x, m, v, top = p.array.copy(), 0.0, 0.0, 0.0
    kind = AdamW if decoupled else Adam
    optimizer = kind(params, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, amsgrad=amsgrad)
    for step in range(5):
        _set_grads(params, step, scale=10.0 if step == 1 else 0.1)  # so that amsgrad has something to remember
        g = p.grad.array
        if decoupled:
            x = x - 0.01 * 0.1 * x
        else:
            g = g + 0.1 * x
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        top = np.maximum(top, v)
        root = np.sqrt((top if amsgrad else v) / (1 - 0.95 ** (step + 1)))
        x = x - 0.01 * m / (1 - 0.8 ** (step + 1)) / (root + 1e-6)
        optimizer.step()
        np.testing.assert_allclose(p.array, x, rtol=1e-12, atol=1e-14)


def test_lars_by_hand():
    p, q = params = _parameters(shapes=((4, 3), (3,)))
    x, b = [p.array.copy(), q.array.copy()], [0.0, 0.0]
    optimizer = LARS(
        [{"params": [p]}, {"params": [q], "trust": None}], lr=2.0, momentum=0.9, weight_decay=0.05, trust=0.02
    )
    for step in range(4):
        _set_grads(params, step)
        for i, grad in enumerate([p.grad.array, q.grad.array]):
            norm, slope = math.sqrt((x[i] ** 2).sum()), math.sqrt((grad**2).sum())
            ratio = 0.02 * norm / (slope + 0.05 * norm) if i == 0 else 1.0
            b[i] = 0.9 * b[i] + 2.0 * ratio * (grad + 0.05 * x[i])
            x[i] = x[i] - b[i]
        optimizer.step()
        for tensor, value in zip(params, x, strict=True):
            np.testing.assert_allclose(tensor.array, value, rtol=1e-12, atol=1e-14)


def test_lars_moves_a_parameter_of_zeros():
    p = Parameter(np.zeros(3))
    p.grad = Tensor(np.array([1.0, 2.0, 3.0]))
    LARS([p], lr=0.1).step()
    np.testing.assert_allclose(p.array, [-0.1, -0.2, -0.3])


@pytest.mark.parametrize("make", [lambda p: SGD(p, 0.1, momentum=0.9), AdamW, lambda p: LARS(p, 0.1)])
def test_float32_stays_float32_and_steps_are_in_place(make):
    params = _parameters(dtype=np.float32)
    arrays = [p.array for p in params]
    optimizer = make(params)
    before = [a.copy() for a in arrays]
    versions = [p.version[0] for p in params]
    _run(optimizer, params, 2)
    for p, array, old, version in zip(params, arrays, before, versions, strict=True):
        assert p.array is array and p.dtype == np.float32
        assert not np.array_equal(array, old)
        assert p.version[0] == version + 2
        kept = [value for value in optimizer.state[p].values() if isinstance(value, Tensor)]
        assert kept and all(value.dtype == np.float32 for value in kept)


def test_a_channels_last_parameter_is_updated_as_a_contiguous_one():
    shape = (5, 3, 3, 2)
    (p,) = _parameters(shapes=(shape,))
    q = Parameter(np.ascontiguousarray(p.array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2))
    assert q.array.strides != p.array.strides
    for tensor in (p, q):
        _run(SGD([tensor], 0.1, momentum=0.9, weight_decay=0.1), [tensor], 3)
    np.testing.assert_allclose(p.array, q.array, rtol=1e-14)


def test_parameters_without_gradient_stay():
    p, q = _parameters(shapes=((3,), (3,)))
    before = q.array.copy()
    optimizer = SGD([p, q], lr=0.1, momentum=0.9, weight_decay=0.5)
    _set_grads([p], 0)
    optimizer.step()
    assert np.array_equal(q.array, before) and q not in optimizer.state


@pytest.mark.parametrize("make", [lambda p: SGD(p, 0.1, momentum=0.9, dampening=0.3), lambda p: AdamW(p, amsgrad=True)])
def test_a_group_of_all_kinds_steps_as_its_parameters_do_alone(make):
    """Two dtypes, two layouts, one that begins later, one large enough for several tasks, an empty one."""
    shapes, dtypes = ((3, 4), (5, 3, 3, 2), (70_000,), (2,), (0,), ()), "f8 f4 f4 f8 f4 f4".split()

    def parameters():
        params = [p for shape, dtype in zip(shapes, dtypes, strict=True) for p in _parameters(0, dtype, (shape,))]
        params[1] = Parameter(np.ascontiguousarray(params[1].array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2))
        return params

    together, alone = parameters(), parameters()
    optimizer, several = make(together), [make([p]) for p in alone]
    for step in range(3):
        for params in (together, alone):
            _set_grads(params, step)
            params[0].grad = params[0].grad if step else None
        optimizer.step()
        for one in several:
            one.step()
    for p, q in zip(together, alone, strict=True):
        np.testing.assert_array_equal(p.array, q.array)
        assert p.dtype == q.dtype and p.array.strides == q.array.strides


# --- groups, state ----------------------------------------------------------------------------------------------------


def test_groups_override_the_defaults():
    p, q = _parameters(shapes=((3,), (3,)))
    before = [p.array.copy(), q.array.copy()]
    optimizer = SGD([{"params": p}, {"params": [q], "lr": 1.0, "name": "slow"}], lr=0.1)
    _set_grads([p, q], 0)
    grads = [p.grad.array, q.grad.array]
    optimizer.step()
    np.testing.assert_allclose(p.array, before[0] - 0.1 * grads[0], rtol=1e-14)
    np.testing.assert_allclose(q.array, before[1] - 1.0 * grads[1], rtol=1e-14)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 1.0]


def test_zero_grad():
    params = _parameters()
    optimizer = SGD(params, lr=0.1)
    _set_grads(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad.array == 0).all() and p.grad.shape == p.shape for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_closure():
    params = _parameters()
    optimizer = SGD(params, lr=0.1)
    before = params[0].array.copy()

    def closure():
        _set_grads(params, 3)
        return 1.25

    assert optimizer.step(closure) == 1.25
    np.testing.assert_allclose(params[0].array, before - 0.1 * params[0].grad.array, rtol=1e-14)


@pytest.mark.parametrize(
    "make", [lambda p: SGD(p, 0.1, momentum=0.9), lambda p: AdamW(p, amsgrad=True), lambda p: LARS(p, 0.1)]
)
def test_going_on_from_a_state_dict(make):
    straight = _parameters()
    expected = _run(make(straight), straight, 5)
    first = _parameters()
    optimizer = make(first)
    _run(optimizer, first, 3)
    second = [Parameter(p.array.copy()) for p in first]
    resumed = make(second)
    resumed.param_groups[0]["lr"] = 77.0
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for p, q in zip(first, second, strict=True):
        for name, value in optimizer.state[p].items():
            if isinstance(value, Tensor):
                assert not np.shares_memory(value.array, resumed.state[q][name].array)
    for got, want in zip(_run(resumed, second, 2, start=3), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_load_state_dict_refuses_another_model():
    params = _parameters()
    optimizer = SGD(params, 0.1, momentum=0.9)
    _run(optimizer, params, 1)
    with pytest.raises(ValueError, match=r"groups of \[3\] parameters, this optimizer of \[1\]"):
        SGD([Parameter(np.zeros(2))], 0.1).load_state_dict(optimizer.state_dict())
    other = SGD(_parameters(shapes=SHAPES[::-1]), 0.1, momentum=0.9)
    with pytest.raises(ValueError, match="momentum_buffer of parameter 0 has shape"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_repr_shows_the_settings():
    text = repr(SGD(_parameters(), lr=0.1, momentum=0.9))
    assert "Parameter Group 0" in text and "    momentum: 0.9" in text


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: SGD(p, lr=-1.0), ValueError, "lr=-1.0"),
        (lambda p: SGD(p, lr=float("nan")), ValueError, "lr=nan"),
        (lambda p: SGD(p, momentum=-0.1), ValueError, "momentum=-0.1"),
        (lambda p: SGD(p, weight_decay=-1), ValueError, "weight_decay=-1"),
        (lambda p: SGD(p, nesterov=True), ValueError, "nesterov=True needs momentum"),
        (lambda p: SGD(p, momentum=0.9, dampening=0.1, nesterov=True), ValueError, "nesterov=True needs momentum"),
        (lambda p: AdamW(p, betas=(0.9, 1.0)), ValueError, r"betas=\(0.9, 1.0\)"),
        (lambda p: AdamW(p, eps=-1), ValueError, "eps=-1"),
        (lambda p: LARS(p, lr=0.1, trust=-1), ValueError, "trust=-1"),
        (lambda p: SGD([]), ValueError, "empty parameter list"),
        (lambda p: SGD(p[0]), TypeError, "use a list"),
        (lambda p: SGD([np.zeros(3)]), TypeError, "parameter 0 of the group is a ndarray"),
        (lambda p: SGD([*p, p[0]]), ValueError, "in the optimizer already"),
        (lambda p: SGD([{"params": p}, {"params": [p[1]]}]), ValueError, "in the optimizer already"),
        (lambda p: SGD([{"params": p, "momentun": 0.9}]), ValueError, "no setting 'momentun'; it has: lr, momentum"),
        (lambda p: SGD([{"params": p, "lr": -2}]), ValueError, "lr=-2"),
        (lambda p: SGD([{"lr": 0.1}]), TypeError, "dict with 'params'"),
        (lambda p: SGD([p[0] * 2]), ValueError, "only leaves"),
    ],
)
def test_errors(make, error, message):
    import minires.ops  # noqa: F401  (gives Tensor its operators)

    with pytest.raises(error, match=message):
        make(_parameters())


# --- clipping and vectors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_clip_grad_norm(norm_type):
    params = [*_parameters(), Parameter(np.zeros(2))]  # the last has no gradient
    _set_grads(params[:-1], 0)
    grads = [p.grad.array.copy() for p in params[:-1]]
    flat = np.concatenate([g.ravel() for g in grads])
    norm = np.linalg.norm(flat, norm_type)
    before = clip_grad_norm_(params, norm / 2, norm_type)
    np.testing.assert_allclose(before.array, norm, rtol=1e-13)
    for p, g in zip(params, grads, strict=False):
        np.testing.assert_allclose(p.grad.array, g * (norm / 2 / (norm + 1e-6)), rtol=1e-12)
    clip_grad_norm_(params, norm, norm_type)  # short enough: nothing happens
    np.testing.assert_allclose(params[0].grad.array, grads[0] * (norm / 2 / (norm + 1e-6)), rtol=1e-12)


def test_clip_grad_norm_of_nothing_and_of_nan():
    assert clip_grad_norm_([Parameter(np.zeros(2))], 1.0).array == 0
    empty = Parameter(np.zeros(0))
    empty.grad = Tensor(np.zeros(0))
    assert clip_grad_norm_(empty, 1.0, math.inf).array == clip_grad_norm_(empty, 1.0).array == 0
    p = Parameter(np.zeros(2))
    p.grad = Tensor(np.array([np.nan, 1.0]))
    with pytest.raises(RuntimeError, match="norm of the gradients is nan"):
        clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="norm_type=0"):
        clip_grad_norm_(p, 1.0, norm_type=0)


def test_clip_grad_value():
    p = Parameter(np.zeros(3))
    p.grad = Tensor(np.array([-3.0, 0.5, 2.0]))
    clip_grad_value_([p], 1.0)
    assert p.grad.array.tolist() == [-1.0, 0.5, 1.0]


def test_vector_round_trip():
    params, others = _parameters(0), _parameters(1)
    vector_to_parameters(parameters_to_vector(params), others)
    assert all(np.array_equal(p.array, q.array) for p, q in zip(params, others, strict=True))
    with pytest.raises(ValueError, match="the vector has shape"):
        vector_to_parameters(Tensor(np.zeros(5)), params)


# --- PyTorch ----------------------------------------------------------------------------------------------------------

SGD_SETTINGS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.4},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    {"weight_decay": 5e-2},
    {"momentum": 0.7, "dampening": 0.1, "weight_decay": 5e-4},
]
ADAM_SETTINGS = [{}, {"weight_decay": 0.1, "betas": (0.7, 0.9)}, {"amsgrad": True, "eps": 1e-4}]


@pytest.mark.peers
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-12), (np.float32, 1e-6)])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *[("SGD", s) for s in SGD_SETTINGS],
        *[(name, s) for name in ("AdamW", "Adam") for s in ADAM_SETTINGS],
    ],
)
def test_equal_to_pytorch_step_by_step(name, settings, dtype, rtol):
    import torch

    import minires.optim

    ours = _parameters(dtype=dtype)
    theirs = [torch.nn.Parameter(torch.from_numpy(p.array.copy())) for p in ours]

    def groups(params):
        return [{"params": params[:2]}, {"params": params[2:], "lr": 0.03, "weight_decay": 0.02}]

    mine = getattr(minires.optim, name)(groups(ours), lr=0.01, **settings)
    peer = getattr(torch.optim, name)(groups(theirs), lr=0.01, **settings)
    for step in range(20):
        _set_grads(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = torch.from_numpy(p.grad.array.copy())
        mine.step()
        peer.step()
        for p, q in zip(ours, theirs, strict=True):
            want = q.detach().numpy()
            # relative to the size of the tensor: an element may pass through 0, and float32 rounds 20 times
            np.testing.assert_allclose(p.array, want, rtol=rtol, atol=rtol * abs(want).max())


@pytest.mark.peers
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_state_dict_of_pytorch_fits(name):
    import torch

    import minires.optim

    ours = _parameters()
    theirs = [torch.nn.Parameter(torch.from_numpy(p.array.copy())) for p in ours]
    settings = {"lr": 0.01, "momentum": 0.9} if name == "SGD" else {"lr": 0.01}
    peer = getattr(torch.optim, name)(theirs, **settings)
    mine = getattr(minires.optim, name)(ours, **settings)
    for step in range(6):
        _set_grads(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = torch.from_numpy(p.grad.array.copy())
        peer.step()
        if step == 2:  # from here on we go on from PyTorch's state
            state = peer.state_dict()
            kept = {i: {k: Tensor(v.numpy()) for k, v in d.items() if v is not None} for i, d in state["state"].items()}
            mine.load_state_dict({**state, "state": kept})
            for p, q in zip(ours, theirs, strict=True):
                p.data.copy_(q.detach().numpy())
        elif step > 2:
            mine.step()
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(p.array, q.detach().numpy(), rtol=1e-12)


@pytest.mark.peers
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_clip_grad_norm_equals_pytorch(norm_type):
    import torch

    ours = _parameters()
    _set_grads(ours, 0)
    theirs = [torch.nn.Parameter(torch.from_numpy(p.array.copy())) for p in ours]
    for p, q in zip(ours, theirs, strict=True):
        q.grad = torch.from_numpy(p.grad.array.copy())
    want = torch.nn.utils.clip_grad_norm_(theirs, 0.5, norm_type)
    np.testing.assert_allclose(clip_grad_norm_(ours, 0.5, norm_type).array, want.numpy(), rtol=1e-12)
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(p.grad.array, q.grad.numpy(), rtol=1e-12)
