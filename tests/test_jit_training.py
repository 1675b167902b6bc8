"""A trace trains a module as the module itself would be trained, bit for bit, by launches where that can be."""

import random
import threading

import numpy as np
import pytest

import minires
from minires import nn, optim
from minires.engine import Function
from minires.hooks import TraceHook
from minires.models import create_model


def images(n=4, size=32, seed=0):
    return minires.from_numpy(np.random.default_rng(seed).standard_normal((n, 3, size, size)).astype(np.float32))


def labels(n=4, seed=0):
    return minires.from_numpy(np.random.default_rng(seed).integers(0, 10, n))


class Pair:
    """The same network twice, the second one traced, and how they are trained."""

    def __init__(self, make, bf16=False, lr=0.05):
        self.bf16, self.models, self.optimizers = bf16, [], []
        for _ in range(2):
            minires.manual_seed(3)
            self.models.append(make())
            self.optimizers.append(optim.SGD(self.models[-1].parameters(), lr=lr, momentum=0.9))
        self.traced = minires.jit.trace(self.models[1])
        self.calls = [self.models[0], self.traced]

    step = property(lambda self: self.traced.training_step.step)

    def forward(self, x):
        with minires.autocast("cpu", dtype=minires.bfloat16, enabled=self.bf16):
            return [model(x) for model in self.calls]

    def train(self, x, t, update=True):
        """A step of both. What must be alike is."""
        losses = [nn.functional.cross_entropy(y, t) for y in self.forward(x)]
        for loss in losses:
            loss.backward()
        assert losses[0].array.tobytes() == losses[1].array.tobytes()
        self.assert_alike()
        if update:
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()

    def assert_alike(self):
        for (name, a), b in zip(self.models[0].named_parameters(), self.models[1].parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            assert a.array.tobytes() == b.array.tobytes(), name
            assert a.grad is None or a.grad.array.tobytes() == b.grad.array.tobytes(), name
        for (name, a), b in zip(self.models[0].named_buffers(), self.models[1].buffers(), strict=True):
            assert a.array.tobytes() == b.array.tobytes() and a.version[0] == b.version[0], name


def resnet20(**options):
    return create_model("resnet20", num_classes=10, **options)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet50", "preact_resnet20"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_trace_trains_as_the_module_does(name, bf16):
    pair = Pair(lambda: create_model(name, num_classes=10), bf16)
    for seed in range(5):
        pair.train(images(seed=seed), labels(seed=seed))
        assert (pair.step is not None) == (seed > 0)  # the first call of a shape is the module's
    assert len(pair.step.launches.calls) > 100


def test_gradients_accumulate():
    pair = Pair(resnet20)
    for seed in range(8):
        pair.train(images(seed=seed), labels(seed=seed), update=seed % 3 == 2)
    assert pair.step


def test_gradients_are_cleared_before_or_after_the_forward():
    pair = Pair(resnet20, lr=1e-4)
    for seed in range(6):
        ys = pair.forward(images(seed=seed))
        for optimizer in pair.optimizers if seed % 2 else ():
            optimizer.zero_grad()
        for y in ys:
            y.sum().backward()
        pair.assert_alike()
        for optimizer in pair.optimizers:
            optimizer.step()
    assert pair.step


def test_backward_of_an_earlier_forward():
    """The activations of the first are gone: its forward runs again, and the running statistics do not move twice."""
    pair = Pair(resnet20)
    for seed in range(3):
        pair.train(images(seed=seed), labels(seed=seed))
    assert pair.step
    first, second = pair.forward(images(seed=5)), pair.forward(images(seed=6))
    for y in (*first, *second):
        y.sum().backward()
    pair.assert_alike()
    third = pair.forward(images(seed=7))
    for y in third:
        y.sum().backward(retain_graph=True)
        y.sum().backward()
    pair.assert_alike()


def test_a_write_between_forward_and_backward_is_refused():
    pair = Pair(resnet20)
    for seed in range(3):
        pair.train(images(seed=seed), labels(seed=seed))
    y = pair.traced(images())
    with minires.no_grad():
        pair.models[1].conv1.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="written into after the forward pass"):
        y.sum().backward()


def test_the_gradient_of_the_input():
    pair = Pair(resnet20)
    for seed in range(5):
        xs = [images(seed=seed).requires_grad_() for _ in range(2)]
        for call, x in zip(pair.calls, xs, strict=True):
            call(x).sum().backward()
        assert xs[0].grad.array.tobytes() == xs[1].grad.array.tobytes()
    assert pair.step
    pair.assert_alike()


def test_what_changes_is_seen():
    pair = Pair(resnet20)

    def trained(times=3):
        for seed in range(times):
            pair.train(images(seed=seed), labels(seed=seed))
        return pair.step

    first = trained()
    assert first is trained()
    for model in pair.models:  # evaluation in between, as after an epoch
        model.eval()
    with minires.no_grad():
        pair.forward(images())
    for model in pair.models:
        model.train()
    assert first is trained(1)
    for model in pair.models:  # frozen layers
        model.layer1.requires_grad_(False)
    assert trained() not in (None, first)
    for model in pair.models:
        model.bn1.momentum = 0.5
    trained()
    for model in pair.models:  # in evaluation mode, with gradients
        model.layer2.eval()
    trained()
    for model in pair.models:  # another array
        model.conv1.weight.array = model.conv1.weight.array * 2
    before = pair.step
    assert trained() not in (None, before)
    before = trained()
    pair.train(images(3), labels(3))  # another shape, once
    assert pair.step is before is trained()
    for _ in range(2):
        pair.train(images(3), labels(3))
    assert pair.step not in (None, before)
    assert trained() not in (None, before)
    other = resnet20().state_dict()
    for model in pair.models:
        model.load_state_dict(other)
    trained()


def test_threads_of_the_kernels():
    pair, threads = Pair(resnet20), minires.get_num_threads()
    for seed in range(3):
        pair.train(images(seed=seed), labels(seed=seed))
    before = pair.step
    minires.set_num_threads(1)
    try:
        pair.train(images(), labels())
        assert pair.step is (before if threads == 1 else pair.step) and pair.step
    finally:
        minires.set_num_threads(threads)


class Odd(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.net, self.what = resnet20(), what

    def forward(self, x):
        return self.what(self.net(x))


class Refusing(Function):
    """y = x, at the fourth call a ValueError."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        Refusing.calls += 1
        if Refusing.calls == 4:  # two models, two calls: the next is on random numbers
            raise ValueError("not these numbers")
        return x

    @staticmethod
    def backward(ctx, dy):
        return dy


@pytest.mark.parametrize(
    "what",
    [
        lambda y: minires.sin(y),  # NumPy's
        lambda y: y if y.sum() < 1e9 else 2 * y,
        lambda y: Refusing.apply(y),
        lambda y: nn.functional.dropout(y, 0.5),
        lambda y: y if random.random() < 2 else 2 * y,
        lambda y: y if np.random.rand() < 2 else 2 * y,  # noqa: NPY002
    ],
)
def test_modules_that_are_more_than_compiled_functions_run_themselves(what):
    pair = Pair(lambda: Odd(what), lr=1e-4)
    for seed in range(4):
        state = minires.get_rng_state()
        losses = []
        for call in pair.calls:
            minires.set_rng_state(state)
            losses.append((call(images(seed=seed)) ** 2).sum())
            losses[-1].backward()
        assert losses[0].array.tobytes() == losses[1].array.tobytes()
        pair.assert_alike()
    assert pair.step is None


def test_a_module_with_momentum_none_counts_its_batches():
    pair = Pair(resnet20)
    for model in pair.models:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
    for seed in range(4):
        pair.train(images(seed=seed), labels(seed=seed))
    assert pair.step is None  # 1 / the number of batches is Python's


def test_hooks_see_the_ops():
    pair = Pair(resnet20)
    for seed in range(3):
        pair.train(images(seed=seed), labels(seed=seed))
    with TraceHook() as trace:
        pair.traced(images()).sum().backward()
    assert len(trace.records) > 50
    seen = []
    pair.traced.model.layer1.register_forward_hook(lambda *_: seen.append(1))
    pair.traced(images())
    pair.traced(images())
    assert len(seen) == 2
    parameter = pair.models[1].fc.bias
    pair.traced.model.layer1._forward_hooks.clear()
    parameter.register_hook(lambda g: seen.append(g))
    for seed in range(4):
        pair.traced(images(seed=seed)).sum().backward()
    assert len(seen) == 2 + 4  # of the user's gradients, and of no others


def test_a_second_try_leaves_nothing_behind():
    """The runs on random numbers move no buffer, gradient or random number."""
    pair = Pair(resnet20)
    pair.train(images(), labels(), update=False)
    before = [p.grad.array.copy() for p in pair.models[1].parameters()]
    state = repr(minires.get_rng_state())
    buffers = [b.array.copy() for b in pair.models[0].buffers()]
    y = pair.traced(images(seed=1))
    pair.models[0](images(seed=1))
    assert pair.step and repr(minires.get_rng_state()) == state and y.requires_grad
    for p, g in zip(pair.models[1].parameters(), before, strict=True):
        assert p.grad.array.tobytes() == g.tobytes()
    pair.assert_alike()
    assert any(b.array.tobytes() != a.tobytes() for a, b in zip(buffers, pair.models[0].buffers(), strict=True))


def test_a_fault_while_noting_is_said_and_the_weights_are_what_they_were(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    pair = Pair(resnet20)
    pair.train(images(), labels())
    weights = [p.array.copy() for p in pair.models[1].parameters()]
    monkeypatch.setattr("minires.jit.training.Launches.repeat", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        pair.traced(images())
    assert all(p.array.tobytes() == w.tobytes() for p, w in zip(pair.models[1].parameters(), weights, strict=True))


def test_threads_may_share_it():
    pair, errors = Pair(resnet20), []
    for seed in range(3):
        pair.train(images(seed=seed), labels(seed=seed))

    def work(seed):
        try:
            for _ in range(5):
                pair.traced(images(seed=seed)).sum().backward()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors


def test_an_interrupted_try_leaves_the_weights_as_they_were(monkeypatch):
    pair = Pair(resnet20)
    pair.train(images(), labels())
    weights = [p.array.copy() for p in pair.models[1].parameters()]
    negative, calls = np.negative, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return negative(*arguments, **options)

    monkeypatch.setattr("numpy.negative", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pair.traced(images())
    assert all(p.array.tobytes() == w.tobytes() for p, w in zip(pair.models[1].parameters(), weights, strict=True))


def test_parameters_that_cannot_be_written():
    """Frozen ones, of a file mapped into memory."""
    pair = Pair(resnet20)
    for model in pair.models:
        model.conv1.requires_grad_(False)
        model.conv1.weight.array.flags.writeable = False
    for seed in range(4):
        pair.train(images(seed=seed), labels(seed=seed))
    assert pair.step


def test_a_result_that_is_a_part_of_the_input():
    class Untouched(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(minires.ones(1))

        def forward(self, x):
            return x[:, :1]

    model = Untouched()
    traced = minires.jit.trace(model)
    for _ in range(4):
        x = images().requires_grad_()
        traced(x).sum().backward()
        assert x.grad.array[:, 0].min() == 1 and not x.grad.array[:, 1:].any()
