"""Containers, text and layers: bad arguments, fused batch normalisation, dropout; layers against PyTorch (peers)."""

import copy

import numpy as np
import pytest

from minires import nn
from minires.engine import Tensor
from minires.nn import functional as F

RNG = np.random.default_rng(0)


def _tensor(*shape, dtype=np.float64, requires_grad=False):
    return Tensor(RNG.standard_normal(shape).astype(dtype), requires_grad)


# --- containers -------------------------------------------------------------------------------------------------------


def test_sequential():
    layers = [nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)]
    net = nn.Sequential(*layers)
    assert list(net) == layers and len(net) == 3 and net[-1] is layers[2]
    assert list(net[1:]) == layers[1:] and isinstance(net[1:], nn.Sequential)
    net[1] = nn.Tanh()
    net.append(nn.Identity()).insert(0, nn.Flatten())
    assert [type(m).__name__ for m in net] == ["Flatten", "Linear", "Tanh", "Linear", "Identity"]
    assert [n for n, _ in net.named_children()] == ["0", "1", "2", "3", "4"]
    del net[0]
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    del net[1:3]
    assert [type(m).__name__ for m in net] == ["Linear", "Identity"]
    with pytest.raises(IndexError, match="index 5 is out of range for a Sequential of 2 modules"):
        net[5]
    named = nn.Sequential({"a": nn.Linear(2, 2), "b": nn.ReLU()})
    assert named.a is named[0] and [n for n, _ in named.named_children()] == ["a", "b"]
    assert [n for n, _ in named[1:].named_children()] == ["b"]


def test_module_list_and_dict():
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    layers.extend([nn.ReLU()]).append(nn.Tanh())
    assert len(layers) == 5 and isinstance(layers[:2], nn.ModuleList) and len(layers[:2]) == 2
    assert len(list(layers.parameters())) == 6
    with pytest.raises(NotImplementedError, match="ModuleList does not define forward"):
        layers(1)
    table = nn.ModuleDict({"a": nn.Linear(2, 2)})
    table["b"] = nn.ReLU()
    assert "b" in table and list(table) == ["a", "b"] == list(table.keys()) and len(table) == 2
    assert list(table.values()) == [table["a"], table["b"]] and next(iter(table.items()))[0] == "a"
    del table["a"]
    assert len(table) == 1


# --- text -------------------------------------------------------------------------------------------------------------

REPRS = [
    lambda nn: nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
    lambda nn: nn.Conv2d(4, 8, (3, 1), padding="same", dilation=2, groups=2),
    lambda nn: nn.BatchNorm2d(3, momentum=None, affine=False, track_running_stats=False),
    lambda nn: nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.1)), nn.Flatten()),
    lambda nn: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((1, 1)), nn.Softmax(dim=1)),
    lambda nn: nn.ModuleDict({"a": nn.Identity(), "b": nn.CrossEntropyLoss()}),
    lambda nn: nn.ModuleList([nn.Linear(2, 2), nn.Tanh()]),
]


def test_repr():
    text = repr(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Sequential(nn.ReLU(inplace=True))))
    assert text == (
        "Sequential(\n"
        "  (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)\n"
        "  (1): Sequential(\n"
        "    (0): ReLU(inplace=True)\n"
        "  )\n"
        ")"
    )


@pytest.mark.peers
@pytest.mark.parametrize("make", REPRS)
def test_repr_equals_pytorch(make):
    import torch

    assert repr(make(nn)) == repr(make(torch.nn))


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Conv2d(0, 3, 3), "in_channels=0 must be an int of at least 1"),
        (lambda: nn.Conv2d(3, 2.5, 3), "out_channels=2.5 must be"),
        (lambda: nn.Conv2d(3, 4, 3, groups=2), "groups=2 must divide in_channels=3 and out_channels=4"),
        (lambda: nn.Conv2d(3, 4, 0), "kernel_size=0 must be"),
        (lambda: nn.Conv2d(3, 4, 3, stride=0), "stride=0 must be"),
        (lambda: nn.Conv2d(3, 4, 3, padding=-1), "padding=-1 must be"),
        (lambda: nn.Conv2d(3, 4, 3, padding="full"), "padding='full' must be"),
        (lambda: nn.Conv2d(3, 4, 3, 2, padding="same"), "padding='same' needs stride 1"),
        (lambda: nn.Conv2d(3, 4, 3, padding_mode="reflect"), "padding_mode='reflect' must be 'zeros'"),
        (lambda: nn.Linear(3, -1), "out_features=-1 must be"),
        (lambda: nn.BatchNorm2d(0), "num_features=0 must be"),
        (lambda: nn.BatchNorm2d(2, eps=-1), "eps=-1 must be"),
        (lambda: nn.BatchNorm2d(2)(_tensor(2, 3, 4, 4)), r"BatchNorm2d\(2\): input has shape \(2, 3, 4, 4\)"),
        (lambda: nn.BatchNorm2d(2)(_tensor(2, 2)), r"not \(N, C, H, W\)"),
        (lambda: nn.BatchNorm1d(2)(_tensor(2, 2, 3, 3)), r"not \(N, C\) or \(N, C, L\)"),
        (lambda: nn.Dropout(1.5), "p=1.5 must be a probability"),
        (lambda: nn.Softmax("rows"), "dim='rows' must be an int"),
        (lambda: nn.MSELoss("avg"), "reduction='avg' must be"),
        (lambda: nn.CrossEntropyLoss(label_smoothing=2), "label_smoothing=2 must be in"),
        (lambda: F.one_hot(Tensor(np.array([0, 5])), 3), "numbers from 0 to 5 do not fit 3 classes"),
    ],
)
def test_errors_of_layers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_hot():
    hot = F.one_hot(Tensor(np.array([[0, 2], [1, 0]])))
    assert hot.dtype == np.int64 and hot.array.tolist() == [[[1, 0, 0], [0, 0, 1]], [[0, 1, 0], [1, 0, 0]]]
    assert F.one_hot(Tensor(np.array([1])), 4).array.tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("with_add", [True, False])
def test_fused_batch_norm_is_its_readable_line(training, affine, with_add):
    x, skip, dy = (_tensor(4, 3, 5, 5, requires_grad=i < 2) for i in range(3))
    fused = nn.BatchNorm2d(3, affine=affine, dtype=np.float64)
    if affine:
        fused.weight.data.copy_(RNG.uniform(0.5, 2, 3))
        fused.bias.data.copy_(RNG.standard_normal(3))
    fused.running_mean.copy_(RNG.standard_normal(3))
    fused.running_var.copy_(RNG.uniform(0.5, 2, 3))
    plain = copy.deepcopy(fused).train(training)
    fused.train(training)
    y = fused(x, add=skip, relu=True) if with_add else fused(x, relu=True)
    y.backward(dy)
    got = {"x": x.grad, "skip": skip.grad, **{n: p.grad for n, p in fused.named_parameters()}}
    x.grad = skip.grad = None
    expected = F.relu(plain(x) + skip if with_add else plain(x))
    expected.backward(dy)
    want = {"x": x.grad, "skip": skip.grad, **{n: p.grad for n, p in plain.named_parameters()}}
    np.testing.assert_allclose(y.array, expected.array, rtol=1e-12, atol=1e-13)
    for name, grad in want.items():
        assert (got[name] is None) == (grad is None) == (name == "skip" and not with_add)
        if grad is not None:
            np.testing.assert_allclose(got[name].array, grad.array, rtol=1e-10, atol=1e-12)
    for name, buffer in plain.named_buffers():
        np.testing.assert_allclose(fused.get_buffer(name).array, buffer.array, rtol=1e-13)
    unfused_add = plain.eval()(x, add=skip)
    np.testing.assert_array_equal(unfused_add.array, (plain(x) + skip).array)


def test_cumulative_running_statistics():
    bn, batches = nn.BatchNorm2d(2, momentum=None, dtype=np.float64), [_tensor(3, 2, 4, 4) for _ in range(3)]
    for x in batches:
        bn(x)
    means = np.mean([x.array.mean((0, 2, 3)) for x in batches], 0)
    variances = np.mean([x.array.var((0, 2, 3), ddof=1) for x in batches], 0)
    np.testing.assert_allclose(bn.running_mean.array, means, rtol=1e-12)
    np.testing.assert_allclose(bn.running_var.array, variances, rtol=1e-12)
    assert int(bn.num_batches_tracked.array) == 3
    bn.eval()(batches[0])
    assert int(bn.num_batches_tracked.array) == 3
    bn.reset_running_stats()
    assert int(bn.num_batches_tracked.array) == 0 and bn.running_var.array.tolist() == [1, 1]


def test_without_running_statistics_evaluation_uses_the_batch():
    bn = nn.BatchNorm2d(2, track_running_stats=False, dtype=np.float64)
    assert list(bn.state_dict()) == ["weight", "bias"]
    x = _tensor(3, 2, 4, 4)
    np.testing.assert_array_equal(bn.eval()(x).array, bn.train()(x).array)
    np.testing.assert_allclose(bn(x).array.mean((0, 2, 3)), 0, atol=1e-14)


def test_dropout_only_in_training():
    layer, x = nn.Dropout(0.5), _tensor(1000)
    zeros = (layer(x).array == 0).mean()
    assert 0.4 < zeros < 0.6
    np.testing.assert_array_equal(layer.eval()(x).array, x.array)


def test_identity_takes_anything():
    x = object()
    assert nn.Identity(3, bad=True)(x) is x


# --- PyTorch ----------------------------------------------------------------------------------------------------------

LAYERS = {
    "conv": (lambda nn, **k: nn.Conv2d(4, 6, 3, stride=2, padding=1, **k), (2, 4, 7, 8)),
    "conv_groups": (lambda nn, **k: nn.Conv2d(4, 6, (3, 2), dilation=2, groups=2, bias=False, **k), (2, 4, 7, 8)),
    "conv_same": (lambda nn, **k: nn.Conv2d(4, 6, (3, 2), padding="same", **k), (2, 4, 7, 8)),
    "linear": (lambda nn, **k: nn.Linear(4, 6, **k), (2, 3, 4)),
    "bn2d": (lambda nn, **k: nn.BatchNorm2d(4, eps=1e-3, momentum=0.3, **k), (3, 4, 5, 5)),
    "bn2d_cumulative": (lambda nn, **k: nn.BatchNorm2d(4, momentum=None, **k), (3, 4, 5, 5)),
    "bn2d_plain": (lambda nn, **k: nn.BatchNorm2d(4, affine=False, track_running_stats=False, **k), (3, 4, 5, 5)),
    "bn2d_without_bias": (lambda nn, **k: nn.BatchNorm2d(4, bias=False, **k), (3, 4, 5, 5)),
    "bn1d": (lambda nn, **k: nn.BatchNorm1d(4, **k), (6, 4)),
    "bn1d_long": (lambda nn, **k: nn.BatchNorm1d(4, **k), (6, 4, 3)),
    "relu": (lambda nn, **k: nn.ReLU(), (3, 4)),
    "sigmoid": (lambda nn, **k: nn.Sigmoid(), (3, 4)),
    "tanh": (lambda nn, **k: nn.Tanh(), (3, 4)),
    "max_pool": (lambda nn, **k: nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True), (2, 3, 8, 7)),
    "avg_pool": (lambda nn, **k: nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False), (2, 3, 8, 7)),
    "adaptive": (lambda nn, **k: nn.AdaptiveAvgPool2d((3, 2)), (2, 3, 8, 7)),
    "flatten": (lambda nn, **k: nn.Flatten(), (2, 3, 2, 2)),
    "softmax": (lambda nn, **k: nn.Softmax(dim=1), (3, 5)),
    "log_softmax": (lambda nn, **k: nn.LogSoftmax(dim=-1), (3, 5)),
}


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:Using padding='same'")  # PyTorch, of an even kernel
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_pytorch(name, training):
    import torch

    make, shape = LAYERS[name]
    peer = make(torch.nn, dtype=torch.float64)
    ours = make(nn, dtype=np.float64)
    with torch.no_grad():
        for tensor in (*peer.parameters(), *(b for b in peer.buffers() if b.is_floating_point())):
            tensor.uniform_(0.5, 1.5)
    ours.load_state_dict({k: v.numpy() for k, v in peer.state_dict().items()})
    assert list(ours.state_dict()) == list(peer.state_dict())
    ours.train(training)
    peer.train(training)
    for _ in range(2):  # twice: running statistics
        x = _tensor(*shape, requires_grad=True)
        y = ours(x)
        dy = _tensor(*y.shape)
        y.backward(dy)
        their_x = torch.from_numpy(x.array.copy()).requires_grad_()
        their_y = peer(their_x)
        their_y.backward(torch.from_numpy(dy.array))
        np.testing.assert_allclose(y.array, their_y.detach().numpy(), rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(x.grad.array, their_x.grad.numpy(), rtol=1e-10, atol=1e-12)
    for p, q in zip(ours.parameters(), peer.parameters(), strict=True):
        np.testing.assert_allclose(p.grad.array, q.grad.numpy(), rtol=1e-10, atol=1e-12)
    for (key, mine), want in zip(ours.state_dict().items(), peer.state_dict().values(), strict=True):
        np.testing.assert_allclose(mine.array, want.numpy(), rtol=1e-12, err_msg=key)
        assert mine.dtype.name == str(want.dtype).removeprefix("torch.")


@pytest.mark.peers
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.2},
        {"ignore_index": 2},
        {"weighted": True},
    ],
)
def test_losses_equal_pytorch(settings):
    import torch

    logits, target = _tensor(6, 4, requires_grad=True), np.array([0, 3, 2, 1, 2, 0])
    weights = RNG.uniform(0.5, 2, 4)
    weighted = settings.pop("weighted", False) if (settings := dict(settings)) else False
    mine = nn.CrossEntropyLoss(Tensor(weights) if weighted else None, **settings)
    peer = torch.nn.CrossEntropyLoss(torch.from_numpy(weights) if weighted else None, **settings)
    assert list(mine.state_dict()) == list(peer.state_dict())
    loss = mine(logits, Tensor(target))
    dy = _tensor(*loss.shape)
    loss.backward(dy)
    theirs = torch.from_numpy(logits.array.copy()).requires_grad_()
    their_loss = peer(theirs, torch.from_numpy(target))
    their_loss.backward(torch.from_numpy(np.asarray(dy.array)))
    np.testing.assert_allclose(loss.array, their_loss.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(logits.grad.array, theirs.grad.numpy(), rtol=1e-11, atol=1e-14)
    if "label_smoothing" not in settings:
        log_probs = _tensor(6, 4)
        mine, peer = nn.NLLLoss(**settings), torch.nn.NLLLoss(**settings)
        want = peer(torch.from_numpy(log_probs.array), torch.from_numpy(target)).numpy()
        np.testing.assert_allclose(mine(log_probs, Tensor(target)).array, want, rtol=1e-12)
    if not set(settings) - {"reduction"}:
        a, b = _tensor(3, 2), _tensor(3, 2)
        want = torch.nn.MSELoss(**settings)(torch.from_numpy(a.array), torch.from_numpy(b.array)).numpy()
        np.testing.assert_allclose(nn.MSELoss(**settings)(a, b).array, want, rtol=1e-12)
