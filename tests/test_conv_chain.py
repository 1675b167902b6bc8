"""A residual branch as one op: the same values, gradients and running statistics as its readable line."""

import numpy as np
import pytest
from device_double import install
from needs import nvrtc

import minires
from minires import nn
from minires.dispatch import observe
from minires.engine import Tensor
from minires.hooks import BranchGradHook
from minires.models.blocks import BasicBlock, Bottleneck
from minires.ops.conv_chain import conv_bn_chain
from minires.state import unfused

SAME, HALF = ((1, 1), (1, 1), (1, 1), 1), ((2, 2), (1, 1), (1, 1), 1)
POINT = ((1, 1), (0, 0), (1, 1), 1)


def draw(dtype, residual=True, seed=0):
    """Arrays: x, z, dy and per convolution w, gamma, beta, running mean and variance; the windows."""
    rng = np.random.default_rng(seed)
    windows, shapes = (POINT, HALF, POINT), ((8, 16, 1, 1), (8, 8, 3, 3), (16, 8, 1, 1))
    layers = []
    for shape in shapes:
        k = shape[0]
        w = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        layers.append([w, rng.uniform(0.5, 1.5, k), 0.3 * rng.standard_normal(k), rng.standard_normal(k), np.ones(k)])
    x, z, dy = rng.standard_normal((3, 16, 7, 6)), *rng.standard_normal((2, 3, 16, 4, 3))
    cast = [a.astype(dtype) for a in (x, z, dy)]
    wide = np.float32 if np.dtype(dtype).itemsize == 2 else dtype
    layers = [[layer[0].astype(dtype), *(v.astype(wide) for v in layer[1:])] for layer in layers]
    return cast[0], cast[1] if residual else None, cast[2], layers, windows


def outcome(x, z, dy, layers, windows, move=np.copy):
    """By name: y, every gradient and the running statistics after one step."""
    x, z = Tensor(move(x), requires_grad=True), None if z is None else Tensor(move(z), requires_grad=True)
    tensors = [[Tensor(move(a), requires_grad=i < 3) for i, a in enumerate(layer)] for layer in layers]
    names = ("weight", "bias", "running_mean", "running_var")
    norms = [dict(zip(names, t[1:], strict=True), training=True, momentum=0.3, eps=1e-3) for t in tensors]
    y = conv_bn_chain(x, z, [t[0] for t in tensors], norms, windows)
    y.backward(Tensor(move(dy)))
    found = {"y": y, "dx": x.grad} | ({} if z is None else {"dz": z.grad})
    for i, (w, gamma, beta, mean, var) in enumerate(tensors):
        found |= {f"dw{i}": w.grad, f"dgamma{i}": gamma.grad, f"dbeta{i}": beta.grad, f"mean{i}": mean, f"var{i}": var}
    return {name: t.detach().cpu().numpy() for name, t in found.items()}


def names_of(call):
    names = []
    with observe(lambda kernel: names.append(kernel.problem.name)):
        call()
    return names


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("residual", [True, False])
def test_one_op_is_the_readable_line(dtype, residual):
    values = draw(dtype, residual)
    got = outcome(*values)
    with unfused():
        expected = outcome(*values)
    assert 0.2 < (expected["y"] > 0).mean() < 0.9 and got.keys() == expected.keys()
    for name, want in expected.items():
        size = max(1.0, np.abs(want).max())
        np.testing.assert_allclose(got[name], want, rtol=0, atol=256 * np.finfo(dtype).eps * size, err_msg=name)
    assert "conv2d_norm_act_wgrad" in names_of(lambda: outcome(*values))


def test_its_gradient_is_that_of_its_values():
    x, z, _, layers, windows = draw(np.float64)
    weights = [Tensor(layer[0]) for layer in layers]
    flat = [Tensor(a, requires_grad=True) for layer in layers for a in layer[1:3]]

    def op(x, z, w, *flat):
        norms = [
            dict(weight=flat[2 * i], bias=flat[2 * i + 1], running_mean=None, running_var=None, training=True)
            | dict(momentum=0.1, eps=1e-3)
            for i in range(3)
        ]
        return conv_bn_chain(x, z, [weights[0], w, weights[2]], norms, windows)

    inputs = [Tensor(a[:2], requires_grad=True) for a in (x, z)]
    assert minires.gradcheck(op, [*inputs, Tensor(weights[1].array, requires_grad=True), *flat])


def test_what_has_no_kernels_takes_the_readable_line():
    x, z, dy, layers, windows = draw(np.float32)
    grouped = [list(layer) for layer in layers]
    grouped[1][0] = grouped[1][0][:, :4]
    windows = (windows[0], (*windows[1][:3], 2), windows[2])
    assert not any("norm_act" in name for name in names_of(lambda: outcome(x, z, dy, grouped, windows)))
    half = draw(np.float16)
    assert not any("norm_act" in name for name in names_of(lambda: outcome(*half)))
    layers[2][0] = layers[2][0][:, :5]
    with pytest.raises(ValueError, match="conv2d: input of 8 channels does not fit"):
        outcome(x, z, dy, layers, draw(np.float32)[-1])


@pytest.mark.parametrize("block, stride", [(BasicBlock, 1), (BasicBlock, 2), (Bottleneck, 2)])
def test_a_block_trains_alike(block, stride):
    minires.manual_seed(0)
    plain, one = block(16, 8, stride), block(16, 8, stride)
    one.load_state_dict(plain.state_dict())
    one.one_op = True
    x, outputs = minires.randn(4, 16, 6, 7), []
    for module in (plain, one):
        outputs.append(module(x))
        outputs[-1].backward(minires.cos(minires.arange(outputs[0].numel()).reshape(*outputs[0].shape).float()))
    np.testing.assert_allclose(outputs[1].numpy(), outputs[0].numpy(), atol=1e-5)
    for (name, a), b in zip(plain.named_parameters(), one.parameters(), strict=True):
        np.testing.assert_allclose(b.grad.numpy(), a.grad.numpy(), atol=2e-4, err_msg=name)
    for (name, a), b in zip(plain.named_buffers(), one.buffers(), strict=True):
        np.testing.assert_allclose(b.numpy(), a.numpy(), atol=1e-5, err_msg=name)
    one.eval(), plain.eval()
    assert not any("norm_act" in name for name in names_of(lambda: one(x)))


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_one_op_on_a_device_in_16_bits(half, monkeypatch):
    """Our CUDA kernels, interpreted, within a whole forward and backward: as close to float64 as 16 bits are."""
    nvrtc()
    dtype = np.dtype(getattr(minires, half))
    x, z, dy, layers, windows = draw(dtype)
    wide = [None if a is None else a.astype(np.float64) for a in (x, z, dy)]
    expected = outcome(*wide, [[a.astype(np.float64) for a in layer] for layer in layers], windows)
    install(monkeypatch)
    got = {}
    names = names_of(lambda: got.update(outcome(x, z, dy, layers, windows, lambda a: Tensor(a).to("cuda").array)))
    assert names.count("conv2d_norm_act_dgrad") == names.count("conv2d_norm_act_fprop") == 3
    eps = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[half]
    for name, want in expected.items():
        off = np.abs(got[name].astype(np.float64) - want)
        size = np.sqrt((want**2).mean())
        assert np.sqrt((off**2).mean()) < 8 * eps * size, name
        assert got[name].dtype == (dtype if name in ("y", "dx", "dz", "dw0", "dw1", "dw2") else np.float32), name


def test_the_identity_path_of_a_block_is_seen():
    block = BasicBlock(8, 8)
    block.one_op = True
    x = minires.randn(2, 8, 5, 5, requires_grad=True) * 1.0
    with BranchGradHook() as hook:
        block(x).sum().backward()
    (join,) = hook.joins
    assert [(share.op, share.slot, share.identity) for share in join.shares] == [
        ("ConvBnChain", 0, False),
        ("ConvBnChain", 1, True),
    ]


def test_the_flag_of_a_network():
    model = minires.models.create_model("resnet20", one_op_blocks=True)
    assert model.one_op_blocks and isinstance(model, nn.Module)
    model.one_op_blocks = False
    assert not model.one_op_blocks
    assert not minires.models.create_model("preact_resnet20", one_op_blocks=True).one_op_blocks
