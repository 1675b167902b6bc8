"""Bad input to the Python interface, a row of a table each: one line that names the value and says what to do.

What goes through the command line stands in test_errors.py.
"""

from pathlib import Path

import numpy as np
import pytest

import minires
from minires import data, nn, optim
from minires.engine import Tensor
from minires.models import create_model
from minires.nn import functional as F
from minires.train import Recipe
from minires.train.ema import EMA
from minires.train.recalibrate import recalibrate
from minires.train.writers import open_writers


def _conv(x=(2, 3, 8, 8), w=(4, 3, 3, 3), dtype=np.float32, **how):
    F.conv2d(Tensor(np.ones(x, np.float32)), Tensor(np.ones(w, dtype)), **how)


def _entropy(logits=(4, 3), target=(0, 1, 2, 0), dtype=np.int64, **how):
    F.cross_entropy(Tensor(np.ones(logits, np.float32)), Tensor(np.array(target, dtype)), **how)


def _loaded(content):
    Path("weights.safetensors").write_bytes(content)
    minires.load("weights.safetensors")


def _twice():
    x = Tensor(np.ones(3), True)
    y = (x * x).sum()
    y.backward()
    y.backward()


def _ones(*shape):
    return Tensor(np.ones(shape, np.float32))


# (what is wrong, call, error, what the message says)
CALLS = [
    # shapes
    ("channels that do not fit", lambda: _conv(x=(2, 5, 8, 8)), ValueError, ["5 channels", "(4, 3, 3, 3)"]),
    ("filter larger than the image", lambda: _conv(x=(2, 3, 2, 2)), ValueError, ["3 taps", "2 pixels"]),
    ("image without a batch axis", lambda: _conv(x=(8, 8)), ValueError, ["(8, 8)", "(N, C, H, W)"]),
    ("stride of 0", lambda: _conv(stride=0), ValueError, ["stride=0", "at least 1"]),
    ("negative padding", lambda: _conv(padding=-1), ValueError, ["padding=-1", "at least 0"]),
    ("padding 'same' with a stride", lambda: _conv(padding="same", stride=2), ValueError, ["'same'", "stride 1"]),
    ("matrices that do not fit", lambda: _ones(2, 3) @ _ones(2, 3), ValueError, ["(2, 3)", "rows of 3"]),
    ("sum that does not broadcast", lambda: _ones(2, 3) + _ones(4), ValueError, ["(2,3)", "(4,)"]),
    ("view of another size", lambda: _ones(2, 3).view(4, 2), ValueError, ["size 6", "(4,2)"]),
    ("axis that is not there", lambda: _ones(2, 3).sum(5), (ValueError, IndexError), ["5"]),
    (
        "network for other images",
        lambda: create_model("resnet20")(_ones(1, 1, 8, 8)),
        ValueError,
        ["1 channels", "(16, 3"],
    ),
    ("negative size", lambda: minires.zeros(2, -3), ValueError, ["-3"]),
    (
        "one value per channel",
        lambda: nn.BatchNorm2d(3)(_ones(1, 3, 1, 1)),
        ValueError,
        ["more than 1 value", "(1, 3, 1, 1)"],
    ),
    ("backward without a gradient", lambda: Tensor(np.ones(3), True).backward(), ValueError, ["(3,)", "`gradient`"]),
    ("backward twice", _twice, RuntimeError, ["retain_graph=True"]),
    # dtypes
    ("filter of another dtype", lambda: _conv(dtype=np.float64), TypeError, ["float32", "float64", ".to(dtype)"]),
    ("mean of whole numbers", lambda: Tensor(np.arange(3)).mean(), TypeError, ["int64", ".float()"]),
    ("gradient of whole numbers", lambda: Tensor(np.arange(3), True), ValueError, ["int64", "floating"]),
    ("module of whole numbers", lambda: nn.Linear(2, 2).to(np.int64), TypeError, ["int64", "floating"]),
    ("labels that are no classes", lambda: _entropy(target=(0, 1, 2, 3)), ValueError, ["target 3", "3"]),
    ("too few labels", lambda: _entropy(target=(0, 1)), ValueError, ["(4, 3)", "(2,)"]),
    ("smoothing of 2", lambda: _entropy(label_smoothing=2.0), ValueError, ["label_smoothing=2.0", "between 0 and 1"]),
    ("unknown reduction", lambda: _entropy(reduction="max"), ValueError, ["'max'", "'mean'"]),
    # devices
    ("unknown device", lambda: _ones(2).to("tpu"), ValueError, ["'tpu'", "'cpu'"]),
    # models and training
    ("no classes", lambda: create_model("resnet20", num_classes=0), ValueError, ["num_classes=0", "at least 1"]),
    ("unknown option", lambda: create_model("resnet20", stemm="cifar"), ValueError, ["'stemm'", "did you mean stem"]),
    ("unknown block", lambda: create_model("resnet20", drop_skip="layer9.0"), ValueError, ["'layer9.0'", "layer1.0"]),
    ("negative learning rate", lambda: optim.SGD([nn.Parameter(_ones(2))], lr=-1.0), ValueError, ["-1.0"]),
    ("nothing to learn", lambda: optim.SGD([], lr=0.1), ValueError, ["empty"]),
    ("average forever", lambda: EMA(nn.Linear(1, 1), 1.0), ValueError, ["decay=1.0", "below 1"]),
    ("no batches", lambda: recalibrate(nn.BatchNorm2d(1), []), ValueError, ["no batches", "at least one"]),
    ("recipe of a text", lambda: Recipe(epochs="3"), TypeError, ["epochs='3'", "a whole number"]),
    ("row without a step", lambda: open_writers(".").add({"loss": 1}), ValueError, ["step", "None"]),
    # data
    ("no batch", lambda: data.DataLoader([1], batch_size=0), ValueError, ["batch_size=0", "at least 1"]),
    ("negative workers", lambda: data.DataLoader([1], num_workers=-1), ValueError, ["num_workers=-1", "at least 0"]),
    ("arrays of two lengths", lambda: data.ArrayDataset(np.ones(3), np.ones(2)), ValueError, ["(3,)", "(2,)"]),
    # files
    ("load nothing", lambda: minires.load("nothing"), OSError, ["nothing"]),
    ("load an empty file", lambda: _loaded(b""), ValueError, ["weights.safetensors", "not a safetensors file"]),
    (
        "load a text",
        lambda: _loaded(b"not weights at all"),
        ValueError,
        ["weights.safetensors", "not a safetensors file"],
    ),
    ("load a head that claims terabytes", lambda: _loaded(b"\xff" * 8), ValueError, ["not a safetensors file"]),
    ("load a pickle", lambda: _loaded(b"PK\x03\x04" + bytes(60)), ValueError, ["weights.safetensors", "byte 64"]),
    ("save what is no tensor", lambda: minires.save({"x": [1]}, "x"), TypeError, ["'x'", "list", "tensors"]),
]


@pytest.mark.parametrize(("call", "error", "says"), [row[1:] for row in CALLS], ids=[row[0] for row in CALLS])
def test_calls(call, error, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in says), text
    assert not {p.name for p in tmp_path.iterdir()} - {"weights.safetensors"}


def test_the_table_is_long_enough():
    assert len({row[0] for row in CALLS}) == len(CALLS) >= 40
