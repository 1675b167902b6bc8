"""ResNets beside the same networks written in PyTorch: ten SGD steps from the same weights on the same images.

The settings are those in which training is not chaotic: PyTorch differs from itself by less than our bounds when its
memory layout changes. torchvision is not needed: the networks stand here, under torchvision's names.
"""

import numpy as np
import pytest

import minires
from minires import models, optim
from minires.engine import Tensor
from minires.nn import functional as F

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peers


def conv(c, k, taps, stride=1):
    return torch.nn.Conv2d(c, k, taps, stride, taps // 2, bias=False)


class OptionA(torch.nn.Module):
    def __init__(self, c, k):
        super().__init__()
        self.extra = (k - c) // 2

    def forward(self, x):
        return torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))


class TorchBlock(torch.nn.Module):
    """taps: the sizes of its filters, (3, 3) or (1, 3, 1); the last 3x3 one or, with (3, 3), the first strides."""

    def __init__(self, c, width, stride, taps, option, preact=False, first=False):
        super().__init__()
        self.taps, self.preact, self.first = taps, preact, first
        out = width * (4 if len(taps) == 3 else 1)
        channels = [c, *[width] * (len(taps) - 1), out]
        for i, size in enumerate(taps, 1):
            strides = stride if (i == 2) == (len(taps) == 3) and size == 3 else 1
            setattr(self, f"conv{i}", conv(channels[i - 1], channels[i], size, strides))
            if not (preact and first and i == 1):
                setattr(self, f"bn{i}", torch.nn.BatchNorm2d(channels[i - 1 if preact else i]))
        self.downsample = None
        if stride != 1 or c != out:
            projection = [conv(c, out, 1, stride)] + ([] if preact else [torch.nn.BatchNorm2d(out)])
            self.downsample = OptionA(c, out) if option == "A" else torch.nn.Sequential(*projection)

    def forward(self, x):
        out = x
        for i in range(1, len(self.taps) + 1):
            if self.preact:
                if not (self.first and i == 1):
                    out = torch.relu(getattr(self, f"bn{i}")(out))
                if i == 1 and self.downsample is not None:
                    x = out
                out = getattr(self, f"conv{i}")(out)
            else:
                out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
                out = out if i == len(self.taps) else torch.relu(out)
        out = out + (x if self.downsample is None else self.downsample(x))
        return out if self.preact else torch.relu(out)


class TorchResNet(torch.nn.Module):
    def __init__(self, taps, depths, widths, option, classes, imagenet, preact=False):
        super().__init__()
        self.conv1 = conv(3, widths[0], 7, 2) if imagenet else conv(3, widths[0], 3)
        self.bn1 = torch.nn.BatchNorm2d(widths[0])
        self.maxpool = torch.nn.MaxPool2d(3, 2, 1) if imagenet else torch.nn.Identity()
        self.depths, c = depths, widths[0]
        for n, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
            blocks = []
            for i in range(depth):
                stride = 2 if n > 1 and i == 0 else 1
                blocks.append(TorchBlock(c, width, stride, taps, option, preact, first=n == 1 and i == 0))
                c = width * (4 if len(taps) == 3 else 1)
            setattr(self, f"layer{n}", torch.nn.Sequential(*blocks))
        self.bn = torch.nn.BatchNorm2d(c) if preact else None
        self.fc = torch.nn.Linear(c, classes)

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for n in range(1, len(self.depths) + 1):
            x = getattr(self, f"layer{n}")(x)
        if self.bn is not None:
            x = torch.relu(self.bn(x))
        return self.fc(x.mean((2, 3)))


BASIC, BOTTLENECK = (3, 3), (1, 3, 1)
NETWORKS = {
    "resnet18": (BASIC, (2, 2, 2, 2), (64, 128, 256, 512), "B", 10, True),
    "resnet50": (BOTTLENECK, (3, 4, 6, 3), (64, 128, 256, 512), "B", 10, True),
    "resnet20": (BASIC, (3, 3, 3), (16, 32, 64), "A", 10, False),
    "preact_resnet20": (BASIC, (3, 3, 3), (16, 32, 64), "A", 10, False, True),
    "preact_resnet50": (BOTTLENECK, (3, 4, 6, 3), (64, 128, 256, 512), "B", 10, True, True),
}


def pair(name, dtype, **options):
    """Our network and PyTorch's with our weights, which load by name and with nothing missing."""
    minires.manual_seed(0)
    ours = models.create_model(name, num_classes=10, **options).to(dtype=dtype)
    theirs = TorchResNet(*NETWORKS[name]).to(getattr(torch, dtype))
    theirs.load_state_dict({key: torch.from_numpy(np.array(value.array)) for key, value in ours.state_dict().items()})
    return ours, theirs


def batches(n, size, dtype, steps):
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((n, 3, size, size)).astype(dtype), rng.integers(0, 10, n)) for _ in range(steps)]


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-4), ("float64", 1e-9)])
@pytest.mark.parametrize(
    "name, size, batch, options, settings",
    [
        ("resnet18", 64, 8, {"zero_init_residual": True}, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}),
        ("resnet50", 64, 8, {"zero_init_residual": True}, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}),
        ("resnet20", 32, 32, {}, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}),
    ],
)
def test_ten_steps_follow_torch(name, size, batch, options, settings, dtype, bound):
    ours, theirs = pair(name, dtype, **options)
    mine = optim.SGD(ours.parameters(), **settings)
    its = torch.optim.SGD(theirs.parameters(), **settings)
    losses = []
    for images, labels in batches(batch, size, dtype, steps=10):
        mine.zero_grad()
        loss = F.cross_entropy(ours(Tensor(images)), Tensor(labels))
        loss.backward()
        mine.step()

        its.zero_grad()
        expected = torch.nn.functional.cross_entropy(theirs(torch.from_numpy(images)), torch.from_numpy(labels))
        expected.backward()
        its.step()
        losses.append((float(loss.array), expected.item()))
    found, expected = np.array(losses).T
    assert found[0] != found[-1]
    assert (np.abs(found - expected) / expected).max() < bound, losses


@pytest.mark.parametrize("name, size", [("preact_resnet20", 17), ("preact_resnet50", 64), ("resnet18", 45)])
def test_logits_and_gradients_are_torchs(name, size):
    ours, theirs = pair(name, "float64")
    ((images, _),) = batches(3, size, "float64", steps=1)
    y, expected = ours(Tensor(images)), theirs(torch.from_numpy(images))
    np.testing.assert_allclose(y.array, expected.detach().numpy(), rtol=1e-9, atol=1e-9)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    y.backward(Tensor(dy))
    expected.backward(torch.from_numpy(dy))
    grads = {key: p.grad.numpy() for key, p in theirs.named_parameters()}
    for key, p in ours.named_parameters():
        scale = np.abs(grads[key]).max()
        np.testing.assert_allclose(p.grad.array, grads[key], rtol=0, atol=1e-8 * scale, err_msg=key)
