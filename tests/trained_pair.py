"""The same network twice, once traced, trained side by side: what the tests of training by launches compare."""

import numpy as np

import minires
from minires import nn, optim
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
