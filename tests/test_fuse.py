"""Networks whose batch normalisations are folded into their convolutions compute the same."""

import numpy as np
import pytest

import minires
from minires import nn
from minires.dispatch import exact, observe
from minires.engine import Tensor, no_grad
from minires.models import ResNet, create_model
from minires.models.blocks import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck
from minires.ops.activation import relu
from minires.ops.arithmetic import add
from minires.ops.conv import conv2d
from minires.ops.fused import conv_bias_act


def trained(model, seed=0):
    """With statistics and parameters of BatchNorm as training leaves them: none of them 0 or 1."""
    rng = np.random.default_rng(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t, low, high in ((module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 2.0)):
                t.array[...] = rng.uniform(low, high, t.shape)
            for t, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5)):
                if t is not None:
                    t.array[...] = rng.uniform(low, high, t.shape)
    return model.eval()


def agree(model, fused, x, tolerance):
    """Relative to the largest output. Winograd, which rounds more and rounds other weights, is left out here."""
    with no_grad(), exact():
        want, got = model(x).array, fused(x).array
    assert np.isfinite(want).all() and np.abs(want).max() > 0
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-13)])
@pytest.mark.parametrize("drop_skip", [(), "all"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck])
@pytest.mark.parametrize("stem, shortcut", [("cifar", "A"), ("imagenet", "B")])
def test_every_kind_of_network_agrees(block, stem, shortcut, drop_skip, dtype, tolerance):
    minires.manual_seed(0)
    model = ResNet(block, (2, 1), (8, 16), stem=stem, shortcut=shortcut, num_classes=7, drop_skip=drop_skip)
    model = trained(model).to(dtype=dtype)
    x = minires.randn(2, 3, 33, 20, dtype=dtype)
    fused = nn.fuse_for_inference(model)
    agree(model, fused, x, tolerance)
    left = norms(fused)
    assert all(name.endswith("bn1") or name == "bn" for name in left) if block.preact else not left


@pytest.mark.parametrize("name, size", [("resnet20", 32), ("resnet18", 64), ("resnet50", 64)])
def test_networks_of_the_papers_agree(name, size):
    minires.manual_seed(0)
    model = trained(create_model(name, num_classes=10))
    fused = nn.fuse_for_inference(model)
    agree(model, fused, minires.randn(2, 3, size, size), 1e-5)
    used = set()
    with observe(lambda kernel: used.add(kernel.problem.name)), no_grad():
        x = minires.randn(2, 3, size, size)
        got = fused(x).array
    with no_grad():
        want = model(x).array
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()  # with Winograd
    assert not {"batchnorm2d_fprop_infer", "conv2d_fprop", "relu_fprop", "add_fprop"} & used


def test_the_model_itself_stays_as_it_is():
    model = trained(create_model("resnet20")).train()
    before = {name: t.array.copy() for name, t in model.state_dict().items()}
    fused = nn.fuse_for_inference(model)
    assert model.training and not any(module.training for module in fused.modules())
    for t in fused.parameters():
        t.array[...] = 0
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], t.array) for name, t in after.items())


def test_pairs_of_a_sequential_and_of_one_s_own_module():
    class Mine(nn.Module):
        conv_bn = (("c", "n"), ("missing", "n"))

        def __init__(self):
            super().__init__()
            self.c, self.n = nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4, affine=False)

        def forward(self, x):
            return self.n(self.c(x))

    model = trained(nn.Sequential(Mine(), nn.Conv2d(4, 6, 2, bias=False), nn.BatchNorm2d(6), nn.ReLU()))
    fused = nn.fuse_for_inference(model)
    assert not norms(fused)
    agree(model, fused, minires.randn(2, 3, 6, 5), 1e-5)


def test_what_cannot_be_folded_stays():
    conv = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(
        conv,
        nn.BatchNorm2d(3),
        conv,  # one convolution, two normalisations
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.BatchNorm2d(3),  # no convolution before it
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4, track_running_stats=False),  # no statistics
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.array[...] = -0.7
    model.eval()
    fused = nn.fuse_for_inference(model)
    assert len(norms(fused)) == 4
    agree(model, fused, minires.randn(2, 3, 4, 5), 1e-6)


def test_hooks_are_not_copied():
    model, seen = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), []
    model.register_forward_hook(lambda *_: seen.append(1))
    nn.fuse_for_inference(model)(minires.randn(1, 3, 2, 2))
    assert not seen


def draw(dtype, residual_shape, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (2, 6, 7, 5), (4, 3, 3, 3), (4,), residual_shape, (2, 4, 4, 3)
    return [None if s is None else rng.standard_normal(s).astype(dtype) for s in shapes]


def outcome(op, values):
    *inputs, dy = values
    tensors = [None if a is None else Tensor(a.copy(), requires_grad=True) for a in inputs]
    y = op(*tensors)
    y.backward(dy)
    return [y.array, *(None if t is None else t.grad.array for t in tensors)]


GEOMETRY = dict(stride=2, padding=1, groups=2)


@pytest.mark.parametrize("activate", [False, True])
@pytest.mark.parametrize("residual_shape", [None, (2, 4, 4, 3), (4, 1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_conv_bias_act_is_its_readable_line(dtype, residual_shape, activate):
    def line(x, w, b, z):
        y = conv2d(x, w, b, **GEOMETRY)
        y = y if z is None else add(y, z)
        return relu(y) if activate else y

    values = draw(dtype, residual_shape)
    got = outcome(lambda x, w, b, z: conv_bias_act(x, w, b, z, **GEOMETRY, relu=activate), values)
    for a, want in zip(got, outcome(line, values), strict=True):
        if want is not None:
            np.testing.assert_allclose(a, want, rtol=0, atol=32 * np.finfo(dtype).eps * max(1, np.abs(want).max()))


def test_conv_bias_act_names_what_does_not_fit():
    x, w, b, _, _ = map(Tensor, draw(np.float32, (1,)))
    with pytest.raises(ValueError, match="6 channels does not fit weight"):
        conv_bias_act(x, w, b)
