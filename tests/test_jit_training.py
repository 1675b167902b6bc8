"""A trace trains a module as the module itself would be trained, bit for bit, by launches where that can be."""

import copy
import pickle
import threading

import numpy as np
import pytest
from trained_pair import Pair, images, labels, resnet20

import minires
from minires import nn
from minires.hooks import TraceHook
from minires.models import create_model


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet50", "preact_resnet20"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_trace_trains_as_the_module_does(name, bf16):
    pair = Pair(lambda: create_model(name, num_classes=10), bf16)
    for seed in range(5):
        pair.train(images(seed=seed), labels(seed=seed))
        assert pair.step
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

    def trained(times=9):
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
    for _ in range(9):
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


def test_a_rehearsal_leaves_nothing_behind():
    """It moves no buffer, gradient or random number."""
    pair = Pair(resnet20)
    pair.train(images(3), labels(3), update=False)
    before, state = [p.grad.array.copy() for p in pair.models[1].parameters()], repr(minires.get_rng_state())
    first = pair.step
    for seed in range(4):
        for y in pair.forward(images(seed=seed)):
            assert y.requires_grad
        assert repr(minires.get_rng_state()) == state
    assert pair.step not in (None, first)
    for p, g in zip(pair.models[1].parameters(), before, strict=True):
        assert p.grad.array.tobytes() == g.tobytes()
    pair.assert_alike()


def test_a_fault_while_noting_is_said_and_the_weights_are_what_they_were(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    pair = Pair(resnet20)
    weights = [p.array.copy() for p in pair.models[1].parameters()]
    monkeypatch.setattr("minires.jit.rehearsal.Launches.repeat", broken)
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
    def interrupted(*_):
        raise KeyboardInterrupt

    pair = Pair(resnet20)
    weights = [p.array.copy() for p in pair.models[1].parameters()]
    monkeypatch.setattr("minires.jit.rehearsal.Needs.plan", interrupted)
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


# --- what users do with gradients -----------------------------------------------------------------------------------


@pytest.fixture
def launched():
    """A pair whose second network is launches."""
    pair = Pair(resnet20)
    for seed in range(3):
        pair.train(images(seed=seed), labels(seed=seed))
    assert pair.step
    return pair


def test_two_calls_in_one_graph(launched):
    for call in launched.calls:
        (call(images(seed=5)).sum() + call(images(seed=6)).sum()).backward()
    launched.assert_alike()


def test_gradients_that_are_kept_stay(launched):
    kept = []
    for model, call in zip(launched.models, launched.calls, strict=True):
        mine = []
        for seed in range(3):
            call(images(seed=seed)).sum().backward()
            mine.append([p.grad for p in model.parameters()])
            model.zero_grad()
        kept.append([g.array.tobytes() for grads in mine for g in grads])
    assert kept[0] == kept[1]


def test_gradients_of_inputs_that_are_kept_stay():
    pair = Pair(resnet20)
    xs = [[images(seed=seed).requires_grad_() for seed in range(5)] for _ in range(2)]
    for call, mine in zip(pair.calls, xs, strict=True):
        for x in mine:
            call(x).sum().backward()
        call(mine[4]).sum().backward()
    assert pair.step
    assert [x.grad.array.tobytes() for x in xs[0]] == [x.grad.array.tobytes() for x in xs[1]]


def test_gradients_do_not_keep_the_memory_of_a_step(launched):
    launched.train(images(), labels(), update=False)
    grads = [p.grad.array for p in launched.models[1].parameters()]
    for g in grads:
        while isinstance(g.base, np.ndarray):
            g = g.base
        assert memoryview(g).nbytes <= max(a.nbytes for a in grads) + 8192


def rows(seed):
    return minires.from_numpy(np.random.default_rng(seed).standard_normal((64, 64)).astype(np.float32))


@pytest.mark.parametrize("kept", [True, False])
def test_a_gradient_that_is_the_input_and_then_the_upstream_gradient(kept):
    pair = Pair(lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
    for model, call in zip(pair.models, pair.calls, strict=True):
        for _ in range(2):
            model.zero_grad()
            y = call(rows(1))
            y.backward(rows(2), retain_graph=True)
        grads = [p.grad for p in model.parameters()]
        if not kept:
            model.zero_grad()
        call(grads[2]).sum().backward()
        y.backward(grads[2])
    assert pair.step
    pair.assert_alike()


def test_an_interrupted_second_backward_leaves_kept_gradients_alone(launched):
    y = launched.traced(images())
    y.sum().backward(retain_graph=True)
    kept = [p.grad for p in launched.models[1].parameters()]
    before = [g.array.tobytes() for g in kept]
    launched.models[1].zero_grad()

    def interrupt():
        raise KeyboardInterrupt

    launches = launched.step.launches
    for at in (launches.marks[1] - 5, launches.marks[2] - 5):  # in the forward that is run again, and in backward
        call, launches.calls[at] = launches.calls[at], (interrupt, [], [])
        with pytest.raises(KeyboardInterrupt):
            (y * y).sum().backward(retain_graph=True)
        launches.calls[at] = call
        assert before == [g.array.tobytes() for g in kept]
        assert all(p.grad is None for p in launched.models[1].parameters())


def test_two_losses_of_one_forward(launched):
    for call in launched.calls:
        y = call(images(seed=4))
        y.sum().backward(retain_graph=True)
        (y * y).sum().backward()
    launched.assert_alike()


def test_copies_begin_anew(launched):
    other = copy.deepcopy(launched.traced)
    assert other.training_step.step is None and other.model is not launched.models[1]
    pickle.loads(pickle.dumps(launched.traced))(images())
    for seed in range(4):
        a, b = launched.calls[0](images(seed=seed)), other(images(seed=seed))
        assert a.array.tobytes() == b.array.tobytes()
    launched.traced.model = launched.models[0]
    assert launched.traced(images()).array.tobytes() == launched.models[0](images()).array.tobytes()
