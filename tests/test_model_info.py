"""What layers cost: `describe` counts outputs, parameters, multiply-adds and the bytes that backward needs."""

import numpy as np
import pytest

from minires import models, nn
from minires.models import describe


def conv_macs(c, k, taps, p):
    return c * k * taps * taps * p * p


def test_describe_resnet20():
    found = describe("resnet20")
    layers = conv_macs(16, 16, 3, 32) * 6, conv_macs(16, 32, 3, 16) + 5 * conv_macs(32, 32, 3, 16)
    third = conv_macs(32, 64, 3, 8) + 5 * conv_macs(64, 64, 3, 8)
    assert found.macs == conv_macs(3, 16, 3, 32) + sum(layers) + third + 64 * 10 == 40_551_040
    assert found.parameters == 269_722
    rows = {row.name: row for row in found.rows}
    assert [row.name for row in found.rows][:3] == ["conv1", "bn1", "layer1.0.conv1"]
    assert rows["layer2.0.conv1"].output_shape == (1, 32, 16, 16)
    assert rows["layer2.0.conv1"].parameters == 16 * 32 * 9
    assert rows["layer2.0.conv1"].macs == conv_macs(16, 32, 3, 16)
    assert rows["fc"].output_shape == (1, 10) and rows["fc"].type == "Linear"
    assert rows["layer2.0.downsample"].type == "ZeroPadShortcut"


@pytest.mark.parametrize("name, giga", [("resnet18", 1.81), ("resnet50", 4.09)])
def test_multiply_adds_are_the_papers(name, giga):
    assert round(describe(name).macs / 1e9, 2) == giga


def test_saved_bytes_count_each_array_once():
    """conv1 keeps the images, bn1 conv1's output (which tells the mask of the ReLU too), conv2 bn1's output."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
            self.conv2 = nn.Conv2d(16, 5, 1)
            self.unused = nn.Linear(2, 2)

        def forward(self, x):
            return self.conv2(self.bn1(self.conv1(x), relu=True))

    net = Net()
    before = {key: value.array.copy() for key, value in net.state_dict().items()}
    found = describe(net, input_shape=(2, 3, 8, 8))
    rows = {row.name: row for row in found.rows}
    image, activation = 4 * 2 * 3 * 64, 4 * 2 * 16 * 64
    assert rows["conv1"].saved_bytes == image
    for name in ("bn1", "conv2"):  # and vectors of 16 channels, each array from the start of a cache line on
        assert activation <= rows[name].saved_bytes <= activation + 4 * (4 * 16 + 64)
    assert rows["conv2"].macs == 2 * 64 * 16 * 5
    assert rows["unused"].parameters == 6 and rows["unused"].output_shape == ()
    assert found.parameters == sum(p.array.size for p in net.parameters())
    assert found.saved_bytes == sum(row.saved_bytes for row in found.rows)
    for key, value in net.state_dict().items():  # the module itself did not run
        np.testing.assert_array_equal(value.array, before[key])
    assert all(p.grad is None for p in net.parameters())


def test_describe_scales_with_the_batch_and_frozen_layers_keep_less():
    one, two = describe("resnet20", image_size=(16, 8)), describe("resnet20", image_size=(16, 8), batch=2)
    assert two.macs == 2 * one.macs and two.parameters == one.parameters
    assert 1.9 < two.saved_bytes / one.saved_bytes <= 2
    model = models.resnet20()
    model.layer1.requires_grad_(False)
    model.conv1.requires_grad_(False)
    model.bn1.requires_grad_(False)
    rows = {row.name: row for row in describe(model, image_size=(16, 8)).rows}
    frozen = ("conv1", "bn1", "layer1.0.conv1", "layer1.0.bn1", "layer1.2.bn2")
    assert all(rows[name].saved_bytes == 0 for name in frozen) and rows["layer2.0.bn1"].saved_bytes > 0


def test_describe_as_text():
    found = describe("resnet20", in_channels=1)
    lines = str(found).splitlines()
    assert lines[0] == "resnet20, input 1 × 1 × 32 × 32"
    assert lines[1].split() == ["layer", "type", "output", "parameters", "MACs", "saved", "bytes"]
    assert lines[2].split()[:4] == ["conv1", "Conv2d", "1", "×"]
    assert lines[-1].startswith("total") and f"{found.parameters:,}" in lines[-1] and f"{found.macs:,}" in lines[-1]
    assert max(map(len, lines)) <= 120
