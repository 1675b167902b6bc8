"""The engine on `cuda` without a GPU: CuPy's place is taken by device_double.py, and kernels are interpreted.

What this shows: every line between a training script and the launches runs on arrays that are as strict as CuPy's, and
what it computes agrees with the CPU. What it cannot show: CuPy itself, and the GPU.
"""

import numpy as np
import pytest
from minires.kernels.cuda import compile as compiler

import minires
from minires import nn, optim
from minires.nn import functional as F

pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'minires[cuda]'")
try:
    compiler.nvrtc()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)

from device_double import install, ndarray

compiler.supported_archs()  # looked up before CuPy's place is taken


@pytest.fixture
def launched(monkeypatch):
    return install(monkeypatch)


class Block(nn.Module):
    def __init__(self, c, k, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, k, 3, stride, 1, bias=False), nn.BatchNorm2d(k)
        self.conv2, self.bn2 = nn.Conv2d(k, k, 3, 1, 1, bias=False), nn.BatchNorm2d(k)
        self.downsample = nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k)) if c != k else None

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Net(nn.Module):
    """A stem with max pooling, a block that keeps its shape, one that does not, a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.pool, self.block1, self.block2 = nn.MaxPool2d(3, 2, 1), Block(4, 4), Block(4, 8, 2)
        self.head, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.pool(F.relu(self.bn(self.stem(x))))
        return self.fc(minires.flatten(self.head(self.block2(self.block1(x))), 1))


def _steps(device, make_optimizer, steps=2):
    """The losses of a few training steps, and the model after them."""
    minires.manual_seed(3)
    model = Net().to(device)
    optimizer = make_optimizer(model.parameters())
    rng, losses = np.random.default_rng(0), []
    for _ in range(steps):
        x = minires.tensor(rng.standard_normal((3, 3, 9, 8), np.float32), device=device)
        target = minires.tensor(rng.integers(0, 5, 3), device=device)
        loss = nn.CrossEntropyLoss()(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
        lambda p: optim.AdamW(p, lr=1e-2, amsgrad=True),
    ],
    ids=["sgd", "adamw"],
)
def test_training_steps_agree_with_the_cpu(launched, make_optimizer):
    losses, model = _steps("cuda", make_optimizer)
    assert all(isinstance(p.array, ndarray) for p in model.parameters())
    entries = {launch.function.entry for launch in launched}
    for part in ("fprop", "dgrad", "wgrad", "bn_statistics", "bn_dx", "maxpool_bwd", "avgpool_bwd", "linear", "ce_bwd"):
        assert any(part in entry for entry in entries), f"{part} did not run as a kernel of ours"
    wanted, reference = _steps("cpu", make_optimizer)
    assert np.allclose(losses, wanted, rtol=1e-5)
    for (name, a), (_, b) in zip(model.state_dict().items(), reference.state_dict().items(), strict=True):
        assert np.allclose(a.cpu().numpy(), b.numpy(), rtol=1e-4, atol=1e-5), name
