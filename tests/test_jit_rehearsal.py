"""Modules whose forward does more than call compiled functions are found out on a copy, and train as they are."""

import random

import numpy as np
import pytest
from trained_pair import Pair, images, labels, resnet20

import minires
from minires import nn, ops
from minires.engine import Function


class Odd(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.net, self.what = resnet20(), what

    def forward(self, x):
        return self.what(self.net(x))


class Refusing(Function):
    """y = x; for the numbers of a rehearsal a ValueError."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        Refusing.calls += 1
        if Refusing.calls in (2, 9):  # two models in turn, and what the second tries before its first and fourth call
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


class Clips(Odd):
    def __init__(self):
        super().__init__(lambda y: y)
        self.scale = nn.Parameter(minires.ones(1) * 2.6)

    def forward(self, x):
        with minires.no_grad():
            self.scale.clamp_(0.0, 4.6)
        return self.net(x) * self.scale


class Keeps(Odd):
    def __init__(self):
        super().__init__(lambda y: y)
        self.kept = {}

    def forward(self, x):
        self.kept["x"] = ops.relu(self.net.conv1(x))
        return self.net(x)


class Hidden(Odd):
    """One of its parameters is in a list, where nobody looks for it."""

    def __init__(self):
        super().__init__(lambda y: y)
        self.hidden = [minires.ones(16, 3, 3, 3).requires_grad_()]

    def forward(self, x):
        y = ops.relu(ops.conv2d(x, self.hidden[0], stride=2))
        return ops.linear(ops.avg_pool2d(y, y.shape[2:]).reshape(len(y), 16), self.net.fc.weight[:, :16]) + self.net(x)


class Masked(Odd):
    def __init__(self):
        super().__init__(lambda y: y)
        self.second = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x):
        known = minires.from_numpy((x.array != 0).astype(np.float32))
        return ops.avg_pool2d(ops.relu(self.second(known)), 32).reshape(len(x), 16)[:, :10] + self.net(x)


class Gated(Odd):
    def __init__(self):
        super().__init__(lambda y: y)
        self.register_buffer("gate", minires.ones(3, 3, 1, 1))

    def forward(self, x):
        return self.net(ops.conv2d(x, self.gate.abs()))


@pytest.mark.parametrize("make", [Clips, Keeps, Hidden, Masked, Gated])
def test_modules_whose_forward_does_more_run_themselves(make):
    pair = Pair(make, lr=1e-4)
    for seed in range(6):
        x = images(seed=seed)
        x.array[:, :, seed : seed + 4] = 0
        for model in pair.models:
            for buffer in (b for name, b in model.named_buffers() if name == "gate"):
                buffer.data = buffer.array + 1
        pair.train(x, labels(seed=seed))
    assert pair.step is None
    hidden = [model.hidden[0].grad.array.tobytes() for model in pair.models if make is Hidden]
    assert len({*hidden}) < 2


def test_running_statistics_of_integers():
    x, n = images(), minires.from_numpy(np.full(3, 4))
    y = nn.functional.batch_norm(x, minires.zeros(3), n)
    np.testing.assert_allclose(y.array, x.array / np.sqrt(4 + 1e-5), rtol=1e-5)
