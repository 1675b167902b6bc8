"""Files between PyTorch and minires: what either writes the other reads, and networks give the same logits."""

import os
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from test_interop import tensors
from test_models_peers import BASIC, BOTTLENECK, NETWORKS, TorchResNet

import minires
from minires import models
from minires.interop import CheckpointError, find_state_dict, load_weights, write_torch_checkpoint

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peers
DATA = os.environ.get("MINIRES_DATA")
WIDTHS = (64, 128, 256, 512)
IMAGENET = {
    "resnet18": (BASIC, (2, 2, 2, 2)),
    "resnet34": (BASIC, (3, 4, 6, 3)),
    "resnet50": (BOTTLENECK, (3, 4, 6, 3)),
    "resnet101": (BOTTLENECK, (3, 4, 23, 3)),
    "resnet152": (BOTTLENECK, (3, 8, 36, 3)),
}


def randomised(network, gain=0.5):
    """PyTorch's network in evaluation mode, with BatchNorms that have something to say. gain: small, because 50 blocks
    would otherwise let activations grow."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.weight, 0.5 * gain, 1.5 * gain)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return network.eval()


def logits(ours, theirs, size):
    x = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
    with minires.no_grad(), torch.no_grad():
        return ours.eval()(minires.from_numpy(x)).array, theirs(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", IMAGENET)
def test_networks_of_pytorch_give_its_logits(tmp_path, name, zipped):
    torch.manual_seed(0)
    theirs = randomised(TorchResNet(*IMAGENET[name], WIDTHS, "B", 1000, True))
    torch.save(theirs.state_dict(), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    ours = models.create_model(name, weights=tmp_path / "x.pth")
    assert models.guess_model(ours.state_dict()) == name
    found, expected = logits(ours, theirs, 64)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_networks_in_other_dtypes(tmp_path, dtype, zipped):
    torch.manual_seed(0)
    theirs = randomised(TorchResNet(*NETWORKS["resnet18"]))
    half = {key: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for key, t in theirs.state_dict().items()}
    torch.save({"state_dict": half}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    found = find_state_dict(minires.load(tmp_path / "x.pth"))
    assert found["conv1.weight"].dtype == getattr(minires, dtype)
    ours = models.create_model("resnet18", weights=tmp_path / "x.pth")
    theirs.load_state_dict(half)  # in float32, the rounded values
    got, expected = logits(ours, theirs, 64)
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("mmap", [False, True])
def test_pytorch_reads_what_we_write(tmp_path, mmap):
    state = tensors()
    write_torch_checkpoint(tmp_path / "x.pth", state)
    found = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mmap)
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert str(found[name].dtype) == f"torch.{tensor.dtype}" and found[name].is_contiguous()
        np.testing.assert_array_equal(found[name].double().numpy(), np.asarray(tensor.array, np.float64))
    network = TorchResNet(*NETWORKS["resnet20"])
    write_torch_checkpoint(tmp_path / "y.pth", models.create_model("resnet20").state_dict())
    network.load_state_dict(torch.load(tmp_path / "y.pth", weights_only=True))


def whole():
    """A checkpoint with all that training scripts put into one."""
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    network(torch.ones(2, 2, 4, 4)).sum().backward()
    optimizer.step()
    x = torch.arange(10.0)
    return {
        "state_dict": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(2, 3).t()),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "views": [x, x[2:6:2], x.view(2, 5).t()],
        "numbers": (1, -5, 2**40, 0.1, True, None, float("inf")),
        "texts": {"name": "ü", "size": torch.Size([1, 2]), "dtype": torch.float32, "device": torch.device("cpu")},
        "empty": OrderedDict(),
        "dtypes": [
            torch.ones(2).to(getattr(torch, d)) for d in ("float64", "bfloat16", "int8", "uint8", "bool", "int16")
        ],
        "scalar": torch.tensor(7),
    }


def same(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        assert ours.shape == tuple(theirs.shape) and f"torch.{ours.dtype}" == str(theirs.dtype)
        np.testing.assert_array_equal(np.asarray(ours.array, np.float64), theirs.detach().double().numpy())
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            same(ours[key], value)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    else:
        assert ours == (str(theirs) if isinstance(theirs, (torch.dtype, torch.device)) else theirs)


@pytest.mark.parametrize(
    "options", [{"pickle_protocol": p} for p in (2, 3, 4, 5)] + [{"_use_new_zipfile_serialization": False}]
)
def test_whole_checkpoints_are_read(tmp_path, options):
    torch.save(whole(), tmp_path / "x.pth", **options)
    theirs = torch.load(tmp_path / "x.pth", weights_only=False)  # True warns of other protocols than 2
    ours = minires.load(tmp_path / "x.pth")
    same(ours, theirs)
    ours["views"][0].array[2] = 77
    assert ours["views"][1].tolist()[0] == 77 and ours["views"][2].tolist()[2][0] == 77  # one storage, as there


def test_what_pytorch_writes_as_objects_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"it asks for 'torch\.nn\.modules\.linear\.Linear'.*state_dict\(\)"):
        minires.load(tmp_path / "x.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # files of it will be about for longer
        torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "y.pth"))
    with pytest.raises(CheckpointError, match=r"TorchScript|asks for|compressed"):
        minires.load(tmp_path / "y.pth")


@pytest.mark.skipif(not DATA, reason="needs MINIRES_DATA")
@pytest.mark.parametrize("name, depths", [("resnet20", (3, 3, 3)), ("resnet32", (5, 5, 5))])
def test_logits_of_published_weights_are_pytorchs(name, depths):
    facts = models.get_weights(f"{name}-cifar10")
    checkpoint = torch.load(Path(DATA) / facts.filename, map_location="cpu", weights_only=True)
    state = {key.removeprefix("module.").replace("linear.", "fc."): t for key, t in checkpoint["state_dict"].items()}
    theirs = TorchResNet(BASIC, depths, (16, 32, 64), "A", 10, False)
    theirs.load_state_dict(state)
    ours = models.create_model(name)
    load_weights(ours, Path(DATA) / facts.filename)
    from minires.data import open_dataset

    data = open_dataset("folder", Path(DATA) / "cifar10-jpg.tar.xz", train=False)
    x = (data.images[::50].astype(np.float32) / 255 - np.float32(facts.mean)) / np.float32(facts.std)
    x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    with minires.no_grad(), torch.no_grad():
        found, expected = ours.eval()(minires.from_numpy(x)).array, theirs.eval()(torch.from_numpy(x)).numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
