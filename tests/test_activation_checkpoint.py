"""Activation checkpointing: the plain run's gradients bit for bit, with less kept."""

import functools
import gc
import tracemalloc
import weakref

import numpy as np
import pytest

import minires
from minires import nn
from minires.capture import capture
from minires.engine import Tensor
from minires.hooks import BranchGradHook, TimerHook, TraceHook
from minires.models import create_model
from minires.models.blocks import BasicBlock
from minires.models.resnet import ResNet
from minires.nn import checkpoint
from minires.ops import cross_entropy


def numbers(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def step(model, n=4, hook=None, training=True, image_grad=False):
    """A training step: loss, gradients and buffers by name, and where the random numbers stand then."""
    model.train(training).zero_grad()
    x, labels = Tensor(numbers(n, 3, 32, 32), image_grad), Tensor(np.arange(n) % 10)
    minires.manual_seed(7)
    loss = cross_entropy(model(x), labels)
    if hook is None:
        loss.backward()
    else:
        with hook:
            loss.backward()
    found = {name: p.grad.array for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: b.array.copy() for name, b in model.named_buffers()} | {"loss": loss.array}
    found |= {"image": x.grad.array} if image_grad else {}
    return found | {"random": minires.randn(3).array}


def same(a, b):
    assert a.keys() == b.keys()
    assert not [name for name in a if not np.array_equal(a[name], b[name])]


def twins(build):
    """The same model twice: build() with the same seed."""
    minires.manual_seed(0)
    plain = build()
    minires.manual_seed(0)
    return plain, build()


@pytest.mark.parametrize("every", [True, 2, 5])
@pytest.mark.parametrize("name", ["resnet20", "preact_resnet20", "plain20", "preact_resnet164"])
def test_gradients_and_buffers_are_equal_bit_for_bit(name, every):
    plain, saving = twins(lambda: create_model(name))
    saving.checkpoint_blocks = every
    for _ in range(2):  # the second step starts from moved statistics and adds nothing to old gradients
        same(step(plain, 2), step(saving, 2))
    assert int(saving.get_buffer("layer1.0.bn2.num_batches_tracked").array) == 2


def test_resnet110():
    plain, saving = twins(lambda: create_model("resnet110", zero_init_residual=True))
    saving.checkpoint_blocks = 4
    same(step(plain, 2, image_grad=True), step(saving, 2, image_grad=True))


def test_in_evaluation_mode_and_with_frozen_layers():
    plain, saving = twins(lambda: create_model("resnet20"))
    saving.checkpoint_blocks = True
    same(step(plain, training=False), step(saving, training=False))
    for model in (plain, saving):
        model.conv1.requires_grad_(False)
        model.layer1.requires_grad_(False)  # these blocks need no gradient at all
        model.get_submodule("layer2.1").requires_grad_(False)  # this one hands one through
    same(step(plain), step(saving))
    saving.requires_grad_(False)
    assert not saving(Tensor(numbers(1, 3, 32, 32))).requires_grad


class Noisy(nn.Module):
    """Dropout; a layer used twice; a mean over all batches; and an input that is used before, inside and after."""

    def __init__(self, saving):
        super().__init__()
        self.saving = saving
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv, self.drop = nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.4)
        self.bn = nn.BatchNorm2d(8, momentum=None)
        self.head = nn.Linear(8, 10)

    def part(self, x):
        y = self.drop(self.conv(self.drop(self.bn(x, relu=True))))
        return self.conv(y) * x + y + x

    def forward(self, x):
        x = self.stem(x)
        before = x * x
        y = checkpoint(self.part, x) if self.saving else self.part(x)
        z = checkpoint(self.part, y) if self.saving else self.part(y)
        return self.head((z + before * y + x * 0.3 + self.conv(x)).mean((2, 3)))


def test_dropout_shared_weights_and_inputs_with_other_uses():
    plain, saving = twins(lambda: Noisy(False))
    saving.saving = True
    for _ in range(3):
        same(step(plain), step(saving))
    assert int(saving.bn.num_batches_tracked.array) == 6


def test_inside_one_another():
    plain, saving = twins(lambda: nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)), nn.Dropout(0.5)))
    x = numbers(5, 6)
    dy = numbers(5, 6, seed=1)

    def inner(x):
        return checkpoint(saving[2], checkpoint(saving[1], x))

    def outer(x):
        return saving[3](checkpoint(inner, saving[0](x), modules=[saving[1], saving[2]]))

    minires.manual_seed(3)
    plain(Tensor(x)).backward(dy)
    minires.manual_seed(3)
    saving[4](checkpoint(outer, Tensor(x), modules=[saving])).backward(dy)
    same(
        {n: p.grad.array for n, p in plain.named_parameters()},
        {n: p.grad.array for n, p in saving.named_parameters()},
    )


def test_hooks_see_the_plain_run():
    plain, saving = twins(lambda: create_model("resnet20"))
    saving.checkpoint_blocks = 2
    joins, grads = [], []
    for model in (plain, saving):
        hook = BranchGradHook(arrays=True)
        step(model, hook=hook)
        joins.append(hook.joins)
        with capture(model, "layer2.0.conv1", grads=True) as cache:
            step(model)
        grads.append(cache["layer2.0.conv1"].grad.array)
    np.testing.assert_array_equal(*grads)
    assert len(joins[0]) == len(joins[1]) == 9
    for a, b in zip(*joins, strict=True):
        assert [(s.op, s.module, s.slot, s.norm) for s in a.shares] == [
            (s.op, s.module, s.slot, s.norm) for s in b.shares
        ]
        assert a.gram == b.gram and all(map(np.array_equal, *([s.array for s in join.shares] for join in (a, b))))
    seen = []
    for model in (plain, saving):
        hook = TraceHook()
        step(model, hook=hook)
        seen.append([(r.op, r.module) for r in hook.records if r.direction == "backward" and r.op != "Checkpoint"])
    assert seen[0] == seen[1] and ("Conv2d", "layer3.1.conv2") in seen[0]
    with TimerHook() as timer:
        step(saving)
    assert timer.by_op()["Checkpoint"].forward < 0.1 * timer.total.forward


def test_tensor_hooks_and_retained_gradients_fire_once():
    layer, seen = nn.Linear(3, 3), []
    x = Tensor(numbers(2, 3), True)
    layer.weight.register_hook(lambda g: seen.append("weight"))
    layer.register_full_backward_hook(lambda module, gi, go: seen.append("module"))
    y = checkpoint(layer, x)
    y.retain_grad()
    y.backward(numbers(2, 3, seed=1))
    assert sorted(seen) == ["module", "weight"]
    np.testing.assert_array_equal(y.grad.array, numbers(2, 3, seed=1))


def test_retained_graph_walks_back_twice():
    layer, x = nn.Linear(3, 2), Tensor(numbers(4, 3), True)
    y, dy = checkpoint(layer, x), numbers(4, 2, seed=1)
    y.backward(dy, retain_graph=True)
    once = x.grad.array.copy()
    y.backward(dy)
    np.testing.assert_array_equal(x.grad.array, 2 * once)
    with pytest.raises(RuntimeError, match="freed what Checkpoint saved"):
        y.backward(dy)


def test_without_gradients_it_is_the_function():
    layer, x = nn.Linear(3, 2), Tensor(numbers(4, 3))
    with minires.no_grad():
        assert not checkpoint(layer, x).requires_grad
    assert checkpoint(layer, x).requires_grad  # its parameters need gradients even where x does not
    assert not checkpoint(minires.flatten, x, modules=[]).requires_grad


def test_an_exception_in_backward_leaves_everything_as_it_was():
    layer, calls = nn.BatchNorm2d(2), []

    def once(x):
        calls.append(0)
        y = layer(x)
        if len(calls) == 2:
            raise ArithmeticError("again")
        return y

    x = Tensor(numbers(2, 2, 3, 3), True)
    y = checkpoint(once, x, modules=[layer])
    before, numbers_before = layer.running_mean.array.copy(), minires.random.get_rng_state()
    with pytest.raises(ArithmeticError):
        y.backward(numbers(2, 2, 3, 3))
    np.testing.assert_array_equal(layer.running_mean.array, before)
    assert x.grad is None and layer.weight.grad is None and minires.random.get_rng_state() == numbers_before
    assert minires.engine.state.scope is None


def test_errors():
    x, layer = Tensor(numbers(2, 3), True), nn.Linear(3, 3)
    with pytest.raises(TypeError, match=r"cannot see which modules '<lambda>' uses: name them"):
        checkpoint(lambda x: layer(x), x)
    with pytest.raises(TypeError, match="an input is ndarray, not a Tensor"):
        checkpoint(layer, x.array)
    with pytest.raises(TypeError, match="returns one Tensor, not tuple"):
        checkpoint(lambda x: (x, x), x, modules=[])
    y = checkpoint(layer, x)
    layer.weight.data.copy_(numbers(3, 3))
    with pytest.raises(RuntimeError, match="written into after the forward"):
        y.backward(numbers(2, 3))
    y = checkpoint(layer, x)
    layer.eval()
    with pytest.raises(RuntimeError, match=r"switched by train\(\) or eval\(\)"):
        y.backward(numbers(2, 3))
    for bad in (-1, 1.5, "yes"):
        with pytest.raises(ValueError, match="checkpoint_blocks="):
            create_model("resnet20", checkpoint_blocks=bad)


def peak(every):
    """Most bytes of arrays alive at once in a step of 30 blocks."""
    model = ResNet(BasicBlock, (30,), (8,), stem="cifar", num_classes=10, checkpoint_blocks=every)
    step(model)
    model.zero_grad()
    gc.collect()
    tracemalloc.start()
    step(model, 16)
    try:
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_less_memory():
    """Four arrays per block are kept; or one per block and those of one block; or one per four blocks and theirs."""
    plain, each, segments = peak(False), peak(1), peak(True)
    assert each < 0.4 * plain and segments < 0.8 * each, (plain, each, segments)


def test_nothing_of_a_part_outlives_its_turn():
    """Once backward is through, the graph that was made again is gone without the collector's help."""
    model = create_model("resnet20", checkpoint_blocks=True)
    kept = []
    block = model.get_submodule("layer1.1")
    block.register_forward_hook(lambda module, args, y: kept.append(weakref.ref(y)))
    step(model)
    assert len(kept) == 2 and [ref() for ref in kept] == [None, None]


def test_layer_keeps_torchvisions_ways():
    model = create_model("resnet20")
    assert model.checkpoint_blocks == 0 and len(model.layer1) == 3 and isinstance(model.layer1, nn.Sequential)
    model.checkpoint_blocks = True
    assert model.checkpoint_blocks == 1 and len(model.layer1[:2]) == 2
    part = functools.partial(model.stem)
    assert checkpoint(part, Tensor(numbers(1, 3, 32, 32)), modules=[model]).requires_grad
