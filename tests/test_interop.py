"""Weights of other frameworks: PyTorch's files and safetensors read and written, names mapped, what does not fit said.

Files that PyTorch itself has written are in test_interop_peers.py, hostile ones in test_hostile.py.
"""

import json
import struct
from pathlib import Path

import hostile
import hostile_files
import ml_dtypes
import numpy as np
import pytest

import minires
from benchmarks import fuzz
from minires import Tensor, models, nn
from minires.interop import CheckpointError, find_state_dict, load_weights, our_names, write_torch_checkpoint
from minires.nn.module import StateDictError

DTYPES = ("f8", "f4", "f2", ml_dtypes.bfloat16, "i8", "i4", "i2", "i1", "u1", "?")
SHAPES = ((), (3,), (0, 4), (2, 3, 4, 5), (1, 1, 1))


def tensors():
    """Every dtype in every shape, and memory in other orders."""
    rng = np.random.default_rng(0)
    found = {f"{np.dtype(d)}.{s}": Tensor(np.asarray(rng.integers(0, 2, s)).astype(d)) for d in DTYPES for s in SHAPES}
    x = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    views = {"transposed": x.T, "channels last": x.transpose(0, 3, 1, 2), "strided": x[:, ::2], "backwards": x[::-1]}
    found |= {name: Tensor(view) for name, view in views.items()}
    return found | {"one for all": Tensor(np.broadcast_to(x[:1], (5, 3, 4, 5)))}


def written(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("write", [minires.save, lambda state, path: write_torch_checkpoint(path, state)])
def test_round_trip(tmp_path, write):
    state = tensors()
    write(state, tmp_path / "x")
    found = minires.load(tmp_path / "x")
    assert found.keys() == state.keys() and [p.name for p in tmp_path.iterdir()] == ["x"]
    for name, tensor in state.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(found[name].array, tensor.array, err_msg=name)
        assert found[name].array.flags.writeable and found[name].array.flags.aligned


def test_written_storages_are_aligned(tmp_path):
    path = tmp_path / "a name of any length é.pth"
    write_torch_checkpoint(path, tensors())
    data = path.read_bytes()
    for at in range(len(data)):
        if data.startswith(b"PK\3\4", at):
            name, extra = struct.unpack("<HH", data[at + 26 : at + 30])
            assert (at + 30 + name + extra) % 64 == 0


@pytest.mark.parametrize(
    "value, says",
    [(3, "'x' is int"), (Tensor(np.zeros(2, np.uint16)), "'x' is uint16.*known are"), ([1.0], "'x' is list")],
)
def test_what_cannot_be_written(tmp_path, value, says):
    with pytest.raises(TypeError, match=says):
        write_torch_checkpoint(tmp_path / "x", {"x": value})
    assert not list(tmp_path.iterdir())


# --- structures -------------------------------------------------------------------------------------------------------


def test_both_formats_hold_the_same(tmp_path):
    archive, rich, stream, _ = fuzz.seeds()
    found = [minires.load(written(tmp_path / "x", data)) for data in (archive, stream)]
    for name, tensor in found[0].items():
        np.testing.assert_array_equal(tensor.array, found[1][name].array)
    rich = minires.load(written(tmp_path / "x", rich))
    assert {k: v for k, v in rich.items() if k != "state_dict"} == {
        "epoch": 3, "lr": 0.1, "list": [1, (2, "x"), None], "size": (1, 2**31 - 1, 256)
    }  # fmt: skip
    weight = rich["state_dict"]["weight"]
    assert weight.shape == (4, 3) and weight.array.strides == (4, 16)


def test_shared_storages_stay_shared(tmp_path):
    parts = hostile.tensor() + hostile.text("v") + hostile.tensor((2,), (2,), 1)
    data = fuzz.zipped(b"\x80\x02}(" + hostile.text("w") + parts + b"u.", {"0": np.arange(4.0, dtype="f4").tobytes()})
    found = minires.load(written(tmp_path / "x", data))
    assert found["v"].tolist() == [1, 3]
    found["w"].array[3] = 7
    assert found["v"].tolist() == [1, 7]


def test_old_pickles(tmp_path):
    """Python 2's texts, an OrderedDict of pairs, a tensor without hooks, a view of a storage."""
    old = hostile.tensor((2,), where=hostile.storage(view=hostile.items(hostile.text("v"), b"K\x01", b"K\x02")),
                         rest=b"", function="_rebuild_tensor")  # fmt: skip
    pairs = b"](](U\x01w" + old + b"e](U\x01n" + hostile.number(5) + b"ee"
    pickle = b"\x80\x02ccollections\nOrderedDict\n" + hostile.items(pairs) + b"R."
    values = np.arange(4.0, dtype="f4").tobytes()
    for data in (fuzz.zipped(pickle, {"0": values}), fuzz.stream(pickle, {"0": values})):
        found = minires.load(written(tmp_path / "x", data))
        assert found["w"].tolist() == [1, 2] and found["n"] == 5


def test_untyped_storages(tmp_path):
    """How PyTorch writes the dtypes that it got last."""
    where = hostile.storage(8, kind=hostile.name("torch.storage", "UntypedStorage"))
    value = hostile.tensor((2,), (1,), 2, where, b"\x89" + hostile.DICT + b"ctorch\nuint16\nN", "_rebuild_tensor_v3")
    data = fuzz.zipped(hostile.program(value), {"0": np.array([1, 2, 3, 65535], "<u2").tobytes()})
    assert minires.load(written(tmp_path / "x", data))["w"].tolist() == [3, 65535]


def test_unaligned_safetensors_are_read(tmp_path):
    text = json.dumps({"a": hostile_files.entry()}) + "   "[: 1 + len(json.dumps({"a": hostile_files.entry()})) % 2]
    for pad in range(4):
        data = hostile_files.head(text + " " * pad, np.arange(4.0, dtype="f4").tobytes())
        (tensor,) = minires.load(written(tmp_path / "x", data)).values()
        assert tensor.tolist() == [0, 1, 2, 3] and tensor.array.flags.aligned


# --- names ------------------------------------------------------------------------------------------------------------

ONE, TWO = Tensor(np.ones(1)), Tensor(np.ones(2))


@pytest.mark.parametrize(
    "checkpoint, part, names",
    [
        ({"a.weight": ONE}, None, {"a.weight"}),
        ({"state_dict": {"a": ONE}, "epoch": 3}, None, {"a"}),
        ({"model": {"state_dict": {"module.a": ONE, "module.b": TWO}}}, None, {"a", "b"}),
        ({"model_state_dict": {"_orig_mod.module.a": ONE}}, None, {"a"}),
        ({"model": {"a": ONE}, "model_ema": {"b": ONE}}, None, {"a"}),
        ({"model": {"a": ONE}, "model_ema": {"module.b": ONE, "n_averaged": TWO}}, "model_ema", {"b"}),
        ({"state_dict_ema": {"c": ONE}}, None, {"c"}),
        ({"teacher": {"state_dict": {"a": ONE}}, "model": {"b": ONE}}, "teacher", {"a"}),
        ({"module.a": ONE, "b": ONE}, None, {"module.a", "b"}),  # not all have the prefix
        ({"a": ONE, "epoch": 3, "name": "x"}, None, {"a"}),
        ({"model/a": ONE, "ema/a": TWO, "optimizer.0/a": ONE}, None, {"a"}),  # a checkpoint of a run
    ],
)
def test_state_dicts_are_found(checkpoint, part, names):
    assert find_state_dict(checkpoint, part).keys() == names


def test_running_average_of_a_run_is_found():
    checkpoint = {"model/a": ONE, "ema/a": TWO, "ema/ema_updates": ONE}
    assert find_state_dict(checkpoint, "ema") == {"a": TWO}


@pytest.mark.parametrize(
    "checkpoint, part, error, says",
    [
        ({"epoch": 3, "args": "x"}, None, CheckpointError, "no weights by name; there are epoch, args"),
        ({}, None, CheckpointError, "there are none"),
        ({"model": {"a": ONE}}, "ema", KeyError, "no part 'ema'; there are model"),
        ({"state_dict": {str(i): i for i in range(9)}}, None, CheckpointError, "0, 1, 2, 3, 4, 5 and 3 more"),
    ],
)
def test_no_state_dict_is_said(checkpoint, part, error, says):
    with pytest.raises(error, match=says):
        find_state_dict(checkpoint, part)


def test_names_are_mapped_only_where_needed():
    theirs = ["linear.weight", "layer2.0.shortcut.0.weight", "head.fc.bias", "classifier.bias", "conv1.weight"]
    ours = ["fc.weight", "layer2.0.downsample.0.weight", "fc.bias", "fc.bias", "conv1.weight"]
    assert list(our_names(theirs).values()) == ours
    assert our_names(["linear.weight"], {"linear.weight", "fc.weight"}) == {"linear.weight": "linear.weight"}
    assert our_names(["linear.weight"], {"conv1.weight"}) == {"linear.weight": "linear.weight"}


# --- into a model -----------------------------------------------------------------------------------------------------


def theirs(model, prefix="module.", **names):
    """The state dict as a CIFAR repository has it."""
    renamed = {
        name.replace("fc.", "linear.").replace("downsample", "shortcut"): t for name, t in model.state_dict().items()
    }
    return {"state_dict": {prefix + name: tensor for name, tensor in renamed.items()}, "best_prec1": 91.7}


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_weights_are_loaded_under_our_names(tmp_path, shortcut):
    source = models.create_model("resnet20", shortcut=shortcut)
    target = models.create_model("resnet20", shortcut=shortcut)
    report = load_weights(target, theirs(source))
    assert report.renamed["linear.weight"] == "fc.weight" and not report.missing and not report.unexpected
    assert "renamed" in str(report) and len(report.loaded) == len(source.state_dict())
    for name, tensor in source.state_dict().items():
        np.testing.assert_array_equal(target.state_dict()[name].array, tensor.array)
    old = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    minires.save(old, tmp_path / "x")
    load_weights(target, tmp_path / "x")  # written before PyTorch counted batches


@pytest.mark.parametrize("dtype", ["f2", ml_dtypes.bfloat16, "f8"])
def test_dtypes_become_the_models(tmp_path, dtype):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    half = {name: tensor.array.astype(dtype) for name, tensor in source.state_dict().items()}
    write_torch_checkpoint(tmp_path / "x.pth", half)
    load_weights(target, tmp_path / "x.pth")
    assert target.weight.dtype == np.float32
    np.testing.assert_array_equal(target.weight.array, half["weight"].astype(np.float32))


def test_what_does_not_fit_is_said(tmp_path):
    model = models.create_model("resnet20", num_classes=3)
    before = {name: tensor.array.copy() for name, tensor in model.state_dict().items()}
    minires.save(models.create_model("resnet20").state_dict(), tmp_path / "ten.safetensors")
    with pytest.raises(
        StateDictError, match=r"ten\.safetensors is for 10 classes, the model has 3: .*num_classes=10.*minires finetune"
    ):
        load_weights(model, tmp_path / "ten.safetensors")
    state = dict(model.state_dict())
    state["extra.weight"] = state.pop("conv1.weight")
    state["bn1.bias"] = Tensor(np.ones(3, np.float32))
    with pytest.raises(StateDictError) as caught:
        load_weights(model, state)
    headline, *details = str(caught.value).splitlines()
    assert headline == "the state dict does not fit ResNet, 3 differences:"
    assert [line.strip(" ;") for line in details] == [
        "1 of another shape: bn1.bias (3,) not (16,)", "1 missing: conv1.weight", "1 unexpected: extra.weight"
    ]  # fmt: skip
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.array, before[name])
    with pytest.raises(StateDictError, match="and 62 more"):
        load_weights(models.create_model("resnet18"), tmp_path / "ten.safetensors")
    with pytest.raises(ValueError, match=r"ten\.safetensors: there is no part 'ema'"):
        load_weights(model, tmp_path / "ten.safetensors", part="ema")


def test_the_rest_is_loaded_where_not_strict():
    model, source = models.create_model("resnet20", num_classes=3), models.create_model("resnet20")
    head = model.fc.weight.array.copy()
    report = load_weights(model, {**source.state_dict(), "extra": ONE}, strict=False)
    assert report.mismatched == {"fc.weight": ((10, 64), (3, 64)), "fc.bias": ((10,), (3,))}
    assert report.unexpected == ["extra"] and not report.missing
    np.testing.assert_array_equal(model.conv1.weight.array, source.conv1.weight.array)
    np.testing.assert_array_equal(model.fc.weight.array, head)


def test_no_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file 'resnet20-cifa'.*did you mean resnet20-cifar10"):
        load_weights(nn.Linear(1, 1), "resnet20-cifa")
    with pytest.raises(FileNotFoundError, match=r"list_weights"):
        load_weights(nn.Linear(1, 1), Path("zzz.pth"))
