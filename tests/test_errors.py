"""Bad input, a row of a table each: one line that names the value and says what to do, exit code 2, nothing lost.

All go through the command line, within this process; calls of the Python interface stand in test_errors_calls.py. What
a disk that fills up and a damaged checkpoint do to a run stands below the table.
"""

import os
import re
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

import minires
from minires import nn
from minires.cli import main
from minires.models import create_model
from minires.train import load_recipe, train

SMALL = ["--image-size", "8", "--batch-size", "128", "--epochs", "2", "--threads", "1"]


def images(root, parts=("train", "test"), classes=("cat", "dog"), n=4):
    """A folder of images as `--dataset` takes it: noise."""
    rng = np.random.default_rng(0)
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                picture = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
                picture.save(root / part / name / f"{i}.jpg")
    return root


def replace(path, content):
    path.write_bytes(content(path.read_bytes()) if callable(content) else content)


def huge_png():
    """An image of 60,000 x 60,000 pixels in some hundred bytes."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that is complete."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    flags = {"image_size": 8, "batch_size": 128, "epochs": 2, "threads": 1, "out": str(folder)}
    train(load_recipe("digits", flags))
    return folder


class World:
    """A folder of its own for every row, which is the current one."""

    def __init__(self, path, finished):
        self.path, self.finished = path, finished

    def file(self, name, content=b"mine"):
        replace(self.path / name, content)

    def images(self, change=lambda root: None, **how):
        images(self.path / "images", **how)
        change(self.path / "images")

    def run(self, change=lambda run: None, complete=False):
        """A run that was stopped after its last checkpoint, or is complete."""
        shutil.copytree(self.finished, self.path / "run")
        if not complete:
            (self.path / "run" / "summary.json").unlink()
        change(self.path / "run")

    def contents(self):
        """All that lies there, by name. Damaged checkpoints may be put aside, under another name."""
        names = {p: str(p.relative_to(self.path)).replace(".damaged", ".safetensors") for p in self.path.rglob("*")}
        return {name: p.read_bytes() if p.is_file() else None for p, name in names.items()}


@pytest.fixture
def world(tmp_path, monkeypatch, finished):
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, finished)


def _no_setup(world):
    pass


def _all_checkpoints(change):
    return lambda run: [replace(p, change) for p in (run / "checkpoints").iterdir()]


_TRAIN_ON_IMAGES = ["train", "--dataset", "images", "--image-size", "8", "--batch-size", "4", "--epochs", "1"]

# (what is wrong, what lies there, command, what the message says: the value, and the remedy or the values there are)
COMMANDS = [
    # numbers and words that cannot be
    ("negative lr", _no_setup, ["train", "--lr", "-1"], ["lr=-1.0", "above 0"]),
    ("lr is NaN", _no_setup, ["train", "--lr", "nan"], ["lr=nan", "finite"]),
    ("lr is a word", _no_setup, ["train", "--lr", "fast"], ["--lr", "fast", "float"]),
    ("lr without a value", _no_setup, ["train", "--lr"], ["--lr"]),
    ("no epochs", _no_setup, ["train", "--epochs", "0"], ["epochs=0", "at least 1"]),
    ("half an epoch", _no_setup, ["train", "--epochs", "2.5"], ["--epochs", "2.5", "whole number"]),
    ("negative batch size", _no_setup, ["train", "--batch-size", "-3"], ["batch_size=-3", "at least 1"]),
    ("batch of too many", _no_setup, ["train", "--batch-size", "9999"], ["batch_size=9999", "1437 training images"]),
    ("negative image size", _no_setup, ["train", "--image-size", "-8"], ["image_size=-8", "at least 1"]),
    ("momentum of 1", _no_setup, ["train", "--momentum", "1"], ["momentum=1.0", "below 1"]),
    ("Nesterov alone", _no_setup, ["train", "--momentum", "0"], ["nesterov=True", "momentum above 0"]),
    ("average forever", _no_setup, ["train", "--ema", "1"], ["ema=1.0", "below 1"]),
    ("negative seed", _no_setup, ["train", "--seed", "-1"], ["seed=-1", "negative"]),
    ("falling milestones", _no_setup, ["train", "--milestones", ".9", ".5"], ["(0.9, 0.5)", "rising"]),
    ("parts that do not fit", _no_setup, ["train", "--accumulate", "7"], ["accumulate=7", "batch_size=64"]),
    ("everything held out", _no_setup, ["train", "--val", "5000"], ["val=5000", "1437 training images"]),
    ("too many threads", _no_setup, ["train", "--threads", "10000"], ["10000"]),
    ("negative threads", _no_setup, ["train", "--threads", "-1"], ["threads=-1", "negative"]),
    ("mirrored digits", _no_setup, ["train", "--flip"], ["flip=True", "digits"]),
    ("unknown schedule", _no_setup, ["train", "--schedule", "steps"], ["steps", "one_cycle", "multistep"]),
    ("unknown optimizer", _no_setup, ["train", "--optimizer", "sdg"], ["sdg", "adamw"]),
    ("unknown model", _no_setup, ["train", "--model", "resnet21"], ["'resnet21'", "did you mean", "resnet20"]),
    ("unknown device", _no_setup, ["train", "--device", "tpu"], ["'tpu'", "'cpu'"]),
    ("unknown flag", _no_setup, ["train", "--epocs", "3"], ["--epocs"]),
    ("one word too many", _no_setup, ["train", "surprise"], ["surprise"]),
    ("unknown command", _no_setup, ["fly"], ["fly"]),
    # recipes
    ("unknown recipe", _no_setup, ["train", "--recipe", "digit"], ["'digit'", "digits", "TOML file"]),
    (
        "recipe that is no TOML",
        lambda w: w.file("r.toml", b"lr = "),
        ["train", "--recipe", "r.toml"],
        ["r.toml", "not a TOML file", "Invalid value"],
    ),
    (
        "recipe that is no text",
        lambda w: w.file("r.toml", b"\xff\xfe\x00"),
        ["train", "--recipe", "r.toml"],
        ["r.toml", "not a TOML file"],
    ),
    (
        "recipe with an unknown key",
        lambda w: w.file("r.toml", b"epoch = 3"),
        ["train", "--recipe", "r.toml"],
        ["r.toml", "'epoch'", "did you mean 'epochs'"],
    ),
    (
        "recipe with a text for a number",
        lambda w: w.file("r.toml", b"lr = 'big'"),
        ["train", "--recipe", "r.toml"],
        ["r.toml", "lr='big'", "a number"],
    ),
    ("recipe that is a folder", lambda w: (w.path / "r").mkdir(), ["train", "--recipe", "r"], ["'r'", "TOML file"]),
    # images
    ("missing data", _no_setup, _TRAIN_ON_IMAGES, ["'images'", "folder"]),
    ("data in a file", lambda w: w.file("images"), _TRAIN_ON_IMAGES, ["images", "folder"]),
    ("empty folder", lambda w: (w.path / "images").mkdir(), _TRAIN_ON_IMAGES, ["images", "train"]),
    ("no classes", lambda w: _mkdirs(w, "images/train", "images/test"), _TRAIN_ON_IMAGES, ["train", "class"]),
    (
        "class without images",
        lambda w: w.images(lambda root: (root / "train" / "emu").mkdir()),
        _TRAIN_ON_IMAGES,
        ["emu", ".jpg"],
    ),
    (
        "class of one part only",
        lambda w: w.images(lambda root: shutil.copytree(root / "test" / "cat", root / "test" / "emu")),
        _TRAIN_ON_IMAGES,
        ["'emu'", "train"],
    ),
    (
        "text that claims to be an image",
        lambda w: w.images(lambda root: replace(root / "train" / "cat" / "0.jpg", b"GIF this is not")),
        _TRAIN_ON_IMAGES,
        ["train/cat/0.jpg", "image"],
    ),
    (
        "empty image",
        lambda w: w.images(lambda root: replace(root / "train" / "cat" / "0.jpg", b"")),
        _TRAIN_ON_IMAGES,
        ["train/cat/0.jpg", "image"],
    ),
    (
        "truncated image",
        lambda w: w.images(lambda root: replace(root / "train" / "dog" / "3.jpg", lambda b: b[: len(b) * 2 // 3])),
        _TRAIN_ON_IMAGES,
        ["train/dog/3.jpg", "cannot read"],
    ),
    (
        "huge image",
        lambda w: w.images(lambda root: replace(root / "train" / "dog" / "0.jpg", huge_png())),
        _TRAIN_ON_IMAGES,
        ["train/dog/0.jpg", "pixels"],
    ),
    (
        "images of one colour",
        lambda w: w.images(
            lambda root: [Image.new("RGB", (9, 9)).save(p) for p in (root / "train").rglob("*.jpg")],
        ),
        _TRAIN_ON_IMAGES,
        ["the same"],
    ),
    # run folders
    (
        "run folder is a file",
        lambda w: w.file("run"),
        ["train", "--out", "run"],
        ["out='run'", "File exists", "give another"],
    ),
    (
        "run folder below a file",
        lambda w: w.file("run"),
        ["train", "--out", "run/1"],
        ["out='run/1'", "Not a directory", "give another"],
    ),
    (
        "run folder in use",
        lambda w: _mkdirs(w, "run", "run/x"),
        ["train", "--out", "run"],
        ["'run'", "new or an empty"],
    ),
    (
        "run folder where none can be",
        _no_setup,
        ["train", "--out", "/proc/minires/run"],
        ["out='/proc/minires/run'", "give another"],
    ),
    # resuming
    ("resume nothing", _no_setup, ["train", "--resume", "run"], ["'run'", "is no folder"]),
    ("resume an empty folder", lambda w: _mkdirs(w, "run"), ["train", "--resume", "run"], ["'run'", "recipe.toml"]),
    ("resume a file", lambda w: w.file("run"), ["train", "--resume", "run"], ["'run'"]),
    (
        "resume a complete run",
        lambda w: w.run(complete=True),
        ["train", "--resume", "run"],
        ["'run'", "complete", "--extend"],
    ),
    (
        "resume with another lr",
        lambda w: w.run(),
        ["train", "--resume", "run", "--lr", "0.5"],
        ["lr=0.5", "differs from the run's 0.1"],
    ),
    (
        "resume for longer, unasked",
        lambda w: w.run(complete=True),
        ["train", "--resume", "run", "--epochs", "9"],
        ["epochs=9", "--extend"],
    ),
    (
        "resume for less",
        lambda w: w.run(),
        ["train", "--resume", "run", "--epochs", "1", "--extend"],
        ["step 22", "11"],
    ),
    ("extend nothing", _no_setup, ["train", "--extend"], ["--extend", "--resume RUN"]),
    (
        "resume with a recipe",
        lambda w: w.run(),
        ["train", "--resume", "run", "--recipe", "digits"],
        ["--recipe digits", "--resume"],
    ),
    (
        "all checkpoints cut off",
        lambda w: w.run(_all_checkpoints(lambda b: b[: len(b) // 2])),
        ["train", "--resume", "run"],
        ["step-000000", "damaged"],
    ),
    (
        "all checkpoints with a flipped bit",
        lambda w: w.run(_all_checkpoints(lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:])),
        ["train", "--resume", "run"],
        ["step-000000", "checksum"],
    ),
    (
        "all checkpoints empty",
        lambda w: w.run(_all_checkpoints(b"")),
        ["train", "--resume", "run"],
        ["step-000000", "damaged"],
    ),
    (
        "run with a damaged recipe",
        lambda w: w.run(lambda run: replace(run / "recipe.toml", b"lr = [")),
        ["train", "--resume", "run"],
        ["recipe.toml", "not a TOML file"],
    ),
    # evaluation
    ("evaluate nothing", _no_setup, ["evaluate", "run"], ["'run'", "is no folder"]),
    ("evaluate without a run", _no_setup, ["evaluate"], ["RUN"]),
    ("evaluate no run", lambda w: _mkdirs(w, "run"), ["evaluate", "run"], ["'run'", "no run folder"]),
    (
        "evaluate damaged weights",
        lambda w: w.run(lambda run: replace(run / "model.safetensors", lambda b: b[:-1])),
        ["evaluate", "run"],
        ["model.safetensors", "damaged", "--weights last"],
    ),
    (
        "evaluate the weights of another model",
        lambda w: w.run(lambda run: minires.save(create_model("resnet32").state_dict(), run / "model.safetensors")),
        ["evaluate", "run"],
        ["model.safetensors", "does not fit"],
    ),
    (
        "evaluate unknown weights",
        lambda w: w.run(),
        ["evaluate", "run", "--weights", "worst"],
        ["worst", "best", "ema"],
    ),
    (
        "evaluate an average that is not",
        lambda w: w.run(),
        ["evaluate", "run", "--weights", "ema"],
        ["ema = 0", "last"],
    ),
    # the other commands
    ("info of an unknown model", _no_setup, ["info", "resnet21"], ["'resnet21'", "resnet20"]),
    ("info of no pixels", _no_setup, ["info", "resnet20", "--image-size", "0"], ["0", "at least 1"]),
    ("info of a negative batch", _no_setup, ["info", "resnet20", "--batch", "-1"], ["-1", "at least 1"]),
    ("kernels of an unknown problem", _no_setup, ["kernels", "list", "conv3d"], ["'conv3d'", "conv2d_fprop"]),
    ("kernels of an unknown device", _no_setup, ["kernels", "list", "--device", "tpu"], ["'tpu'", "cpu"]),
    ("kernels in a file that is not", _no_setup, ["kernels", "check", "mine.py"], ["mine.py"]),
    ("kernels in a file of none", lambda w: w.file("mine.py", b"x = 1"), ["kernels", "check", "mine.py"], ["mine.py"]),
    ("kernels in a broken file", lambda w: w.file("mine.py", b"x = ("), ["kernels", "check", "mine.py"], ["mine.py"]),
]


def _mkdirs(world, *names):
    for name in names:
        (world.path / name).mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize(
    ("setup", "arguments", "says"), [row[1:] for row in COMMANDS], ids=[row[0] for row in COMMANDS]
)
def test_commands(world, capsys, setup, arguments, says):
    setup(world)
    before = world.contents()
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert re.fullmatch(r"minires: error: [^\n]+\n", error), error
    assert all(part in error for part in says), error
    assert len(error) < 700 and "Traceback" not in out
    after = world.contents()
    assert after == before, sorted(after.keys() ^ before.keys())


def test_the_table_is_long_enough():
    assert len({row[0] for row in COMMANDS}) == len(COMMANDS) >= 60


# --- devices and packages that are not there --------------------------------------------------------------------------


def test_no_gpu(world, capsys):
    if minires.cuda.is_available():
        pytest.skip("there is one")
    for arguments in (["train", "--device", "cuda", "--out", "run"], ["train", "--device", "cuda:1", "--out", "run"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"minires: error: device cuda:\d needs [^\n]+\n", error), error
    assert not list(world.path.iterdir())
    with pytest.raises(RuntimeError, match="device cuda:0 needs"):
        nn.Linear(2, 2).cuda()


def test_no_tensorboard(world, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert main(["train", "--tensorboard", "--out", "run", *SMALL]) == 2
    assert "pip install 'minires[tensorboard]'" in capsys.readouterr().err
    assert not list(world.path.iterdir())


# --- a disk that is full ----------------------------------------------------------------------------------------------


class FullDisk:
    """Within it, no file can grow beyond so many bytes, as when the disk fills up."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.resource = pytest.importorskip("resource")
        self.before = self.resource.getrlimit(self.resource.RLIMIT_FSIZE)
        self.resource.setrlimit(self.resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *exception):
        self.resource.setrlimit(self.resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("size", [0, 100, 5_000, 500_000])
def test_a_full_disk_stops_a_new_run(world, capsys, size):
    """It ends before recipe.toml, before the weights, or before the checkpoint, is written."""
    with FullDisk(size):
        code = main(["train", "--out", "run", *SMALL])
    error = capsys.readouterr().err
    assert code == 2 and re.fullmatch(r"minires: error: [^\n]*(File too large|fitted)[^\n]*\n", error), error
    assert not [p for p in world.path.rglob("*") if ".tmp-" in p.name]
    left = {p.name for p in world.path.rglob("*") if p.is_file()}
    assert left <= {"recipe.toml", "metrics.jsonl", "metrics.csv"}
    assert (world.path / "run").exists() == bool(left), "an empty folder was left behind"


def test_a_full_disk_loses_no_checkpoint(world, capsys, finished):
    """A run that goes on until the disk is full can go on from there, to the same end."""
    arguments = ["train", "--resume", "run"]

    def stopped_after_one_epoch(run):
        last = sorted((run / "checkpoints").iterdir())[-1]
        assert last.name == "step-00000022.safetensors"
        for path in (last, run / "model.safetensors", run / "curves.png"):
            path.unlink()

    world.run(stopped_after_one_epoch)
    kept = (world.path / "run" / "checkpoints" / "step-00000011.safetensors").read_bytes()
    with FullDisk(500_000):
        assert main(arguments) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"minires: error: [^\n]*File too large[^\n]*\n", error), error
    assert not [p for p in world.path.rglob("*") if ".tmp-" in p.name]
    assert [p.read_bytes() == kept for p in (world.path / "run" / "checkpoints").iterdir()] == [True]
    assert main(arguments) == 0
    ours, whole = (minires.load(folder / "model.safetensors") for folder in (world.path / "run", finished))
    assert all(np.array_equal(ours[name].array, whole[name].array) for name in whole)


# --- a checkpoint that is damaged -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[:-1], lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:], lambda b: os.urandom(len(b))],
    ids=["empty", "cut off", "a flipped bit", "noise"],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(world, capsys, finished, damage):
    world.run(lambda run: replace(run / "checkpoints" / "step-00000022.safetensors", damage))
    assert main(["train", "--resume", "run"]) == 0
    out, error = capsys.readouterr()
    assert "step-00000022.safetensors is damaged" in out + error and "going back to step 11" in out + error
    ours, whole = (minires.load(folder / "model.safetensors") for folder in (world.path / "run", finished))
    assert all(np.array_equal(ours[name].array, whole[name].array) for name in whole)
