"""Published weights: what is known of them, how they are fetched, and that they do what their publishers say."""

import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from test_data_sets import server as server  # the fixture

import minires
from minires import models
from minires.data import open_dataset
from minires.interop import weights as into_models
from minires.interop import write_torch_checkpoint
from minires.models import weights as published

DATA = os.environ.get("MINIRES_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="needs MINIRES_DATA")


def test_facts_are_whole():
    names = models.list_weights()
    assert len(names) == len({models.get_weights(n).url for n in names}) == 22
    assert models.list_weights("resnet50*") == ["resnet50-imagenet-v1", "resnet50-imagenet-v2"]
    for name in names:
        facts = models.get_weights(name)
        assert facts.model in models.list_models() and facts.sha256[:8] in facts.filename
        assert facts.url.startswith("https://") and facts.licence.startswith("BSD-")
        assert len(facts.mean) == len(facts.std) == 3 and 60 < facts.top1 < 96
        assert facts.top5 is None or facts.top1 < facts.top5 < 100
        assert len(facts.classes) in (0, facts.num_classes)
    with pytest.raises(ValueError, match=r"'resnet50-imagenet'.*did you mean.*resnet50-imagenet-v[12]"):
        models.get_weights("resnet50-imagenet")


@pytest.fixture
def small(tmp_path, server, monkeypatch):
    """(address, published facts) of small weights, served on this machine."""
    url, site, asked = server
    minires.manual_seed(0)
    write_torch_checkpoint(site / "resnet20-x.pth", models.create_model("resnet20", num_classes=7).state_dict())
    digits = sha256((site / "resnet20-x.pth").read_bytes()).hexdigest()
    facts = replace(models.get_weights("resnet20-cifar10"), name="x", url=f"{url}/resnet20-x.pth", sha256=digits[:8])
    monkeypatch.setenv("MINIRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(published._WEIGHTS, "x", facts)
    monkeypatch.setitem(into_models.PUBLISHED, "x", facts.fetch)
    return facts, asked


def test_weights_are_fetched_once(tmp_path, small):
    _, asked = small
    for _ in range(2):
        model = models.create_model("resnet20", weights="x")
        assert model.fc.weight.shape == (7, 64) and len(asked) == 1
    assert [p.name for p in (tmp_path / "cache" / "weights").iterdir()] == ["resnet20-x.pth"]


@pytest.mark.parametrize("digits", ["0" * 8, "0" * 64])
def test_other_content_is_refused(tmp_path, small, digits):
    facts, _ = small
    with pytest.raises(ValueError, match="its SHA-256 differs") as caught:
        replace(facts, sha256=digits).fetch(tmp_path / "here")
    assert "yourself" in str(caught.value) and not list((tmp_path / "here").iterdir())
    with pytest.raises(RuntimeError, match="8 digits"):
        replace(facts, sha256="0").fetch(tmp_path / "here")


@pytest.mark.parametrize(
    "name, options",
    [
        ("resnet20", {"num_classes": 3}),
        ("resnet20", {"shortcut": "B", "in_channels": 1}),
        ("resnet18", {"stem": "cifar", "num_classes": 10}),
        ("preact_resnet20", {}),
        ("plain20", {}),
    ],
)
def test_shapes_say_the_options(name, options):
    state = models.create_model(name, **options).state_dict()
    model = models.create_model(name, weights=state)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert models.guess_model(state) == name.replace("plain", "resnet")
    np.testing.assert_array_equal(model.fc.weight.array, state["fc.weight"].array)


def test_shapes_of_other_networks_are_no_models():
    assert models.guess_model({"features.0.weight": minires.ones(1)}) is None
    assert models.guess_model({}) is None
    with pytest.raises(ValueError, match="the state dict is for 10 classes, the model has 3"):
        models.create_model("resnet20", 3, weights=models.create_model("resnet20").state_dict())


@needs_data
@pytest.mark.parametrize("name, right", [("resnet20", 8103), ("resnet32", 8256)])
def test_as_many_test_images_are_right_as_with_pytorch(name, right, monkeypatch, tmp_path):
    """PyTorch 2.13 gets as many of the 10,000 JPEG images right (the figures of the data's own README)."""
    facts = models.get_weights(f"{name}-cifar10")
    path = Path(DATA) / facts.filename
    assert sha256(path.read_bytes()).hexdigest() == facts.sha256
    model = models.create_model(name, weights=path).eval()
    data = open_dataset("folder", Path(DATA) / "cifar10-jpg.tar.xz", train=False)
    assert tuple(data.classes) == facts.classes and len(data.images) == 10_000
    correct = 0
    with minires.no_grad():
        for i in range(0, 10_000, 500):
            x = (data.images[i : i + 500].astype(np.float32) / 255 - np.float32(facts.mean)) / np.float32(facts.std)
            y = model(minires.from_numpy(x.transpose(0, 3, 1, 2))).array
            correct += int((y.argmax(1) == data.labels[i : i + 500]).sum())
    assert correct == right
