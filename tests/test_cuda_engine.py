"""The engine on `cuda` without a GPU: CuPy's place is taken by device_double.py, and kernels are interpreted.

What this shows: every line between a training script and the launches runs on arrays that are as strict as CuPy's, and
what it computes agrees with the CPU. What it cannot show: CuPy itself, and the GPU.
"""

import itertools
import math
import pickle

import numpy as np
import pytest
from device_double import install, ndarray
from needs import nvrtc

import minires
from minires import nn, ops, optim
from minires.data import DataLoader, ImageDataset, Subset
from minires.data import transforms as T
from minires.hooks import BranchGradHook
from minires.nn import functional as F
from minires.nn.checkpoint import checkpoint
from minires.train.loop import resume, train
from minires.train.recipe import Recipe

nvrtc()


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
    with minires.exact():  # as the kernels launched: AdamW makes a step of lr * sign(g), also where g is rounding alone
        wanted, reference = _steps("cpu", make_optimizer)
    assert np.allclose(losses, wanted, rtol=1e-5)
    for (name, a), (_, b) in zip(model.state_dict().items(), reference.state_dict().items(), strict=True):
        assert np.allclose(a.cpu().numpy(), b.numpy(), rtol=1e-4, atol=1e-5), name


def _on(device, *values):
    return [minires.tensor(v, device=device) for v in values]


_CLASSES, _LABELS = np.array([0, 4, 2]), np.array([[0.2, 0.8, 0, 0, 0]] * 3, np.float32)
OPS = {
    **{
        name: (lambda x, name=name: getattr(ops, name)(x))
        for name in "abs exp neg sin cos sigmoid tanh relu sum mean std var norm amax amin".split()
    },
    **{
        f"{name} with an array and a number": (lambda x, name=name: getattr(ops, name)(x * x + 1, x[0]) + 2.0 * x - 1)
        for name in "add sub mul div maximum minimum pow".split()
    },
    **{f"{name} along an axis": (lambda x, name=name: getattr(x, name)(dim=1)[0]) for name in ("max", "min")},
    "sqrt, log": lambda x: ops.sqrt(x * x + 1).log(),
    "topk": lambda x: x.topk(2, dim=1)[0],
    "softmax": lambda x: x.softmax(1) + x.log_softmax(0),
    "shapes": lambda x: x[None].expand(2, 3, 5).permute(2, 0, 1).flatten(1).T.unsqueeze(1).squeeze(1).reshape(-1, 6),
    "indices": lambda x: minires.cat([x[1:, ::2], x[[0, 2]][:, :3], x[1][None, :3]]),
    "a mask": lambda x: x[x.detach() > 0],
    "an index tensor": lambda x: x[minires.tensor(np.array([0, 2, 0]), device=x.device)],
    "choices": lambda x: minires.where(x.detach() > 0, x.clamp(-0.5, 0.5), 3 * x),
    "cat, stack, pad": lambda x: F.pad(minires.cat([x, minires.stack([x[0], x[1]])]), (1, 2)),
    "matmul": lambda x: x @ x.T,
    "numbers of NumPy": lambda x: np.float32(2) * x - np.float32(1) / (x * x + np.float32(1)),
    "casts": lambda x: x.double().float() + x.half().float(),
    "floor division": lambda x: x.detach() // 2 + x % 2,
    "cross entropy": lambda x: F.cross_entropy(x, *_on(x.device, _CLASSES), label_smoothing=0.1, ignore_index=4),
    "weighted cross entropy": lambda x: F.cross_entropy(x, *_on(x.device, _CLASSES, np.arange(5, dtype=np.float32))),
    "cross entropy with probabilities": lambda x: F.cross_entropy(x, *_on(x.device, _LABELS)),
    "mse, nll": lambda x: F.mse_loss(x, x.detach() * 2) + F.nll_loss(x, *_on(x.device, _CLASSES)),
    "a checkpoint": lambda x: checkpoint(lambda v: v.tanh() * 2, x, modules=[]),
    "anomaly-free branches": lambda x: _with_branches(x),
}


def _with_branches(x):
    y = x + x.tanh()
    with BranchGradHook():
        y.sum().backward(retain_graph=True)
    return y


@pytest.mark.parametrize("name", OPS)
def test_op_agrees_with_the_cpu(launched, name):
    values = np.random.default_rng(len(name)).standard_normal((3, 5)).astype(np.float32)
    results = {}
    for device in ("cuda", "cpu"):
        x = minires.tensor(values, device=device, requires_grad=True)
        y = OPS[name](x)
        assert y.device == x.device == minires.device(device)
        y.backward(
            minires.tensor(np.linspace(-1, 1, math.prod(y.shape), dtype=np.float32).reshape(y.shape), device=device)
        )
        assert x.grad.device == x.device
        results[device] = y.cpu().detach().numpy(), x.grad.cpu().numpy()
    for a, b in zip(results["cuda"], results["cpu"], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


LAYERS = {
    "convolution with bias and groups": lambda: nn.Conv2d(4, 6, 3, padding="same", groups=2),
    "uneven padding": lambda: nn.Conv2d(4, 4, 2, padding="same", dilation=(1, 3)),
    "batch norm without parameters": lambda: nn.BatchNorm2d(4, affine=False, momentum=None),
    "batch norm without statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "batch norm in evaluation": lambda: nn.BatchNorm2d(4).eval(),
    "max pooling": lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "average pooling": lambda: nn.AvgPool2d((2, 3), 1),
    "adaptive pooling": lambda: nn.AdaptiveAvgPool2d((2, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_agrees_with_the_cpu(launched, name):
    values = np.random.default_rng(len(name)).standard_normal((2, 4, 5, 7)).astype(np.float32)
    results = {}
    for device in ("cuda", "cpu"):
        minires.manual_seed(0)
        layer = LAYERS[name]().to(device)
        x = minires.tensor(values, device=device, requires_grad=True)
        y = layer(x)
        y.backward(
            minires.tensor(np.linspace(-1, 1, math.prod(y.shape), dtype=np.float32).reshape(y.shape), device=device)
        )
        grads = [p.grad for p in layer.parameters()]
        results[device] = [t.cpu().detach().numpy() for t in (y, x.grad, *grads, *layer.state_dict().values())]
    assert launched or name == "adaptive pooling", "windows of several sizes are array code"
    for a, b in zip(results["cuda"], results["cpu"], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_batch_norm_of_16_bits_runs_as_such(launched, dtype):
    """Activations stay in 16 bits, parameters in float32, and nothing is converted on the way."""
    values = np.random.default_rng(0).standard_normal((3, 5, 4, 3)).astype(np.float32)
    results = {}
    for device in ("cuda", "cpu"):
        bn = nn.BatchNorm2d(5).to(device)
        x, z = (minires.tensor(v, device=device).to(dtype=np.dtype(dtype)) for v in (values, values[::-1].copy()))
        x.requires_grad = True
        launched.clear()
        y = F.bn_add_relu(x, z, bn.running_mean, bn.running_var, bn.weight, bn.bias, training=True)
        y.backward(z)
        assert y.dtype == x.grad.dtype == np.dtype(dtype) and bn.weight.grad.dtype == np.float32
        if device == "cuda":
            assert {launch.function.entry.partition("_")[0] for launch in launched} == {"bn"}
        grads = [t.cpu().to(dtype=np.float32).detach().numpy() for t in (y, x.grad, bn.weight.grad, bn.running_var)]
        results[device] = grads
    eps = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    for a, b, bound in zip(results["cuda"], results["cpu"], (eps, eps, 1e-5, 1e-6), strict=True):
        np.testing.assert_allclose(a, b, rtol=2 * bound, atol=bound)


def test_casts_run_as_kernels_and_saturate_as_numpy_does(launched):
    values = np.array(
        [0, -0.0, 1e-45, 6e-8, 2.0**-24, 65519, 65520, -1e38, 3.4e38, np.inf, -np.inf, np.nan], np.float32
    )
    for dtype in ("float16", "bfloat16"):
        there = minires.tensor(values, device="cuda").to(dtype=np.dtype(dtype))
        with np.errstate(over="ignore"):
            wanted = values.astype(dtype)
        np.testing.assert_array_equal(there.cpu().numpy().astype(np.float32), wanted.astype(np.float32))
        np.testing.assert_array_equal(there.float().cpu().numpy(), wanted.astype(np.float32))
    assert [launch.function.entry for launch in launched] == ["narrowed", "widened"] * 2


def test_batches_made_on_the_device_are_the_cpu_s(launched):
    """Same random choices, same bits, for every epoch, also of a part of the data set and after pickling."""
    rng = np.random.default_rng(0)
    augment = T.Augment((0.4, 0.5, 0.6), (0.2, 0.3, 0.2), padding=2, flip=True, cutout=3)
    images, labels = rng.integers(0, 256, (11, 6, 5, 3), np.uint8), rng.integers(0, 3, 11)
    data = ImageDataset(images, labels, ["a", "b", "c"], transform=augment)
    there = data.on("cuda")
    assert not launched and there.device.type == "cuda" and data.device.type == "cpu"
    for of in (lambda d: d, lambda d: Subset(d, [7, 0, 3, 9, 2]), lambda d: pickle.loads(pickle.dumps(d))):
        loaders = [DataLoader(of(d), 4, shuffle=True, generator=5) for d in (data, there)]
        for (x, target), (y, same) in zip(*(itertools.chain(loader, loader) for loader in loaders), strict=True):
            assert y.device.type == "cuda" and y.array.strides == x.array.strides
            np.testing.assert_array_equal(y.cpu().numpy(), x.numpy())
            np.testing.assert_array_equal(same.numpy(), target.numpy())
    assert {launch.function.entry for launch in launched} == {"augment"}
    assert there.with_transform(T.Augment(0.5, 0.5))[3][0].shape == (3, 6, 5)
    with pytest.raises(TypeError, match="only Augment runs on cuda"):
        data.with_transform(T.PerImage(T.ToTensor())).on("cuda")


def test_a_run_trains_stops_resumes_and_is_evaluated(launched, tmp_path, monkeypatch):
    """The whole loop on the device: batches, metrics, averages, checkpoints, resumption, evaluation."""
    monkeypatch.setattr("minires.train.start.create_model", lambda *_, **__: Tiny())
    ended = {}
    for device in ("cuda", "cpu"):
        out = tmp_path / device
        train(Recipe(dataset="digits", batch_size=256, steps=2, device=device, ema=0.5, clip=1.0, out=str(out)))
        ended[device] = resume(out, {"steps": 3}, extend=True)
    assert (ended["cuda"].device, ended["cuda"].steps) == ("cuda:0", 3)
    assert {"ce_fprop", "sgd_step", "augment"} <= {launch.function.entry for launch in launched}
    assert abs(ended["cuda"].test_loss - ended["cpu"].test_loss) < 1e-5


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn(self.conv(x))), 1).flatten(1))


def test_weights_travel_through_files(launched, tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(), nn.Conv2d(2, 2, 1)).to("cuda")
    minires.save(model.state_dict(), tmp_path / "w.safetensors")
    for where in ("cpu", "cuda"):
        other = nn.Sequential(nn.Linear(3, 2), nn.Dropout(), nn.Conv2d(2, 2, 1)).to(where)
        other.load_state_dict(minires.load(tmp_path / "w.safetensors", map_location="cuda"))
        for a, b in zip(other.parameters(), model.parameters(), strict=True):
            assert a.device == minires.device(where) and np.array_equal(
                a.cpu().detach().numpy(), b.cpu().detach().numpy()
            )


def test_what_a_user_does_with_a_tensor(launched):
    x = minires.randn(2, 3, device="cuda")
    assert "device=cuda:0" in repr(x) and f"{x.sum().item():.3f}" and float(x.sum()) == x.sum().item()
    assert x.is_cuda and x.cpu().numpy().shape == (2, 3) and len(x) == 2 and len(list(x)) == 2
    x[0] = 1
    x += 1
    x.mul_(2).clamp_(-1, 1).zero_()
    assert bool((x == 0).all()) and x.tolist() == [[0, 0, 0]] * 2
    with pytest.raises(TypeError, match=r"a tensor on cuda:0 has no NumPy array: use \.cpu"):
        x.numpy()
    with pytest.raises(TypeError, match=r"different devices: cpu and cuda:0; move them with \.to"):
        F.relu(x) + minires.zeros(2, 3)


def test_images_stay_channels_last_on_their_way(launched):
    x = np.random.default_rng(0).standard_normal((2, 5, 4, 3)).astype(np.float32).transpose(0, 3, 1, 2)
    there = minires.tensor(x, device="cuda")
    assert there.array.strides == x.strides and np.array_equal(there.cpu().numpy(), x)


def test_autotune_waits_for_the_device(launched):
    from device_double import _Device

    from minires import dispatch

    before, x = _Device.synchronized, minires.randn(5, 7, device="cuda")
    with dispatch.autotune():
        F.relu(x)
    assert _Device.synchronized >= before + 2
