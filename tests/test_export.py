"""`minires export`: files for other programs hold the network that was exported."""

import json
import re

import numpy as np
import pytest

import minires
from minires import models
from minires.cli import main
from minires.interop import load_weights
from minires.models.export import compare_with_onnxruntime, write_onnx

onnx = pytest.importorskip("onnx", reason="needs onnx")
ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime")


def trained(name, **options):
    """A network whose BatchNorms have something to say."""
    minires.manual_seed(0)
    model, rng = models.create_model(name, **options), np.random.default_rng(1)
    for path, module in model.named_modules():
        if "bn" in path.split(".")[-1] or path.endswith("downsample.1"):
            c = module.num_features
            module.running_mean.array[:] = 0.1 * rng.standard_normal(c)
            module.running_var.array[:] = rng.uniform(0.5, 2, c)
            module.weight.array[:] = rng.uniform(0.5, 1.5, c)
            module.bias.array[:] = 0.1 * rng.standard_normal(c)
    return model


@pytest.mark.parametrize("fold_bn", [True, False])
@pytest.mark.parametrize(
    "name, options",
    [
        ("resnet20", {}),
        ("resnet20", {"shortcut": "B", "in_channels": 1, "num_classes": 3}),
        ("plain20", {}),
        ("preact_resnet20", {}),
        ("resnet18", {}),
        ("resnet50", {"num_classes": 10}),
        ("resnet50", {"variant": "v1", "num_classes": 10}),
        ("preact_resnet50", {"num_classes": 10}),
    ],
)
def test_onnxruntime_agrees(tmp_path, name, options, fold_bn):
    model = trained(name, **options)
    write_onnx(model, tmp_path / "x.onnx", image_size=35, fold_bn=fold_bn)
    graph = onnx.load(tmp_path / "x.onnx")
    assert graph.opset_import[0].version >= 17
    kinds = [node.op_type for node in graph.graph.node]
    assert ("BatchNormalization" in kinds) == (not fold_bn or name.startswith("preact"))
    for images in (1, 3):  # however many
        difference, largest = compare_with_onnxruntime(model, tmp_path / "x.onnx", images)
        assert difference < 1e-4 * largest and largest > 0.1


def test_a_wrong_file_would_be_noticed(tmp_path):
    model = trained("resnet20")
    write_onnx(model, tmp_path / "x.onnx")
    model.layer3[2].bn2.running_mean.array[0] += 0.5
    difference, largest = compare_with_onnxruntime(model, tmp_path / "x.onnx")
    assert difference > 1e-3 * largest


def test_export_leaves_the_network_as_it_is(tmp_path):
    model = trained("resnet20").train()
    before = {name: tensor.array.copy() for name, tensor in model.state_dict().items()}
    write_onnx(model, tmp_path / "x.onnx")
    compare_with_onnxruntime(model, tmp_path / "x.onnx")
    assert model.training
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.array, before[name])


def test_command(tmp_path, monkeypatch, capsys):
    """From PyTorch's file to safetensors, back, and to ONNX; each holds the same."""
    monkeypatch.chdir(tmp_path)
    model = trained("resnet20", num_classes=3)
    minires.save({f"module.{name}": tensor for name, tensor in model.state_dict().items()}, "a.safetensors")
    for source, out in (("a.safetensors", "b.pth"), ("b.pth", "c.safetensors"), ("c.safetensors", "d.onnx")):
        assert main(["export", "--weights", source, "--out", out]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"wrote {out}: the resnet20 of {source}") and said.count("\n") == 1
    assert "onnxruntime" in said
    for path in ("b.pth", "c.safetensors"):
        found = minires.load(path)
        assert found.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            np.testing.assert_array_equal(found[name].array, tensor.array)
    assert compare_with_onnxruntime(model.eval(), "d.onnx")[0] < 1e-3
    assert (
        main(["export", "--weights", "b.pth", "--out", "e.bin", "--format", "onnx", "--keep-bn", "--image-size", "48"])
        == 0
    )
    assert "(N, 3, 48, 48)" in capsys.readouterr().out
    kinds = {node.op_type for node in onnx.load("e.bin").graph.node}
    assert "BatchNormalization" in kinds


def test_a_run_is_exported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--image-size", "8", "--batch-size", "128", "--epochs", "1", "--threads", "1"]
    assert main(["train", "--out", "run", *small]) == 0
    capsys.readouterr()
    assert main(["export", "run", "--out", "x.onnx"]) == 0
    assert "images (N, 1, 8, 8) float32 -> logits (N, 10)" in capsys.readouterr().out
    notes = {p.key: p.value for p in onnx.load("x.onnx").metadata_props}
    assert json.loads(notes["classes"]) == [str(i) for i in range(10)] and len(json.loads(notes["mean"])) == 1
    assert main(["export", "run", "--out", "x.safetensors"]) == 0
    model = models.create_model("resnet20", num_classes=10, in_channels=1)
    assert not load_weights(model, "x.safetensors").missing


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--out", "x.onnx"], "give either a run folder or --weights"),
        (["run", "--weights", "a", "--out", "x.onnx"], "give either a run folder or --weights"),
        (["--weights", "a.pth", "--out", "x.onnx"], "there is no file 'a.pth'"),
        (["--weights", "good.pth", "--out", "x"], "--out x ends in none of .onnx"),
        (["--weights", "good.pth", "--out", "no/x.onnx"], "there is no folder 'no'"),
        (["--weights", "good.pth", "--out", "x.onnx", "--model", "resnet18"], "do not fit resnet18"),
        (["--weights", "good.pth", "--out", "x.onnx", "--model", "resnet21"], "did you mean"),
        (["--weights", "good.pth", "--out", "x.onnx", "--image-size", "0"], "image_size=0 must be"),
        (["--weights", "other.pth", "--out", "x.onnx"], "Name the model"),
        (["--weights", "text.pth", "--out", "x.onnx"], "text.pth is not a safetensors file"),
        (["--weights", ".", "--out", "x.onnx"], "has no recipe.toml"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    minires.save(models.create_model("resnet20").state_dict(), "good.pth")
    minires.save({"features.0.weight": minires.ones(1)}, "other.pth")
    (tmp_path / "text.pth").write_text("weights")
    before = sorted(tmp_path.iterdir())
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"minires: error: [^\n]+\n", error) and says in error and len(error) < 700, error
    assert sorted(tmp_path.iterdir()) == before


def test_onnx_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(RuntimeError, match=r"pip install 'minires\[onnx\]'"):
        write_onnx(models.create_model("resnet20"), tmp_path / "x.onnx")
