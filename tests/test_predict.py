"""`minires predict`: images found, read, judged; what cannot be read is named, and the others go on."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import minires
from minires.cli import main
from minires.data.transforms import Compose, Normalize, Resize, ToTensor
from minires.engine import Tensor
from minires.models import create_model
from minires.train.prediction import draw_overlay, find_images, predict
from minires.train.pretrained import Network

MEAN, STD = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights of 6 classes whose answers depend on the image."""
    minires.manual_seed(1)
    model = create_model("resnet20", 6)
    model(minires.randn(16, 3, 16, 16))
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    minires.save(model.state_dict(), path)
    return path


@pytest.fixture
def network(weights):
    model = create_model("resnet20", weights=weights).eval()
    return Network(model, tuple("uvwxyz"), MEAN, STD, 16, 3, "w", 16, True)


def picture(path, mode="RGB", size=(20, 16), seed=0):
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        picture(tmp_path / f"{'ab'[i % 2]}{i}.png", seed=i)
    picture(tmp_path / "deep" / "c.jpg", seed=9)
    (tmp_path / "deep" / "notes.txt").write_text("no image")
    picture(tmp_path / ".hidden" / "h.png")
    return tmp_path


# --- which images -------------------------------------------------------------------------------------------------


def test_files_folders_and_patterns(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def names(*given):
        return [str(path) for path in find_images(given)]

    assert names("b1.png", "a0.png") == ["b1.png", "a0.png"]
    assert names("a*.png") == ["a0.png", "a2.png", "a4.png"] and names("[b]?.png") == ["b1.png", "b3.png"]
    assert names("deep", "a0.png", "deep/c.jpg") == ["deep/c.jpg", "a0.png"]  # once each
    assert names(".") == ["a0.png", "a2.png", "a4.png", "b1.png", "b3.png", "deep/c.jpg"]
    assert names("**/*.jpg") == ["deep/c.jpg"]
    assert names("missing.png") == ["missing.png"]  # predict says that it is not there
    picture(folder / "odd[1].png")
    assert names("odd[1].png") == ["odd[1].png"]


@pytest.mark.parametrize(("name", "says"), [("empty", "no images in the folder"), ("x*.png", "nothing matches")])
def test_nothing_found(tmp_path, monkeypatch, name, says):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says):
        find_images([name])


# --- what the network says of them --------------------------------------------------------------------------------


def test_probabilities_are_the_networks(network, folder):
    """By the transforms of single images, one at a time."""
    prepare = Compose([Resize((16, 16)), ToTensor(), Normalize(MEAN, STD)])
    for i in range(3):
        path = picture(folder / f"square{i}.png", size=(32, 32), seed=20 + i)
        with minires.no_grad(), Image.open(path) as image:
            y = network.model(Tensor(prepare(image).array[None])).array[0].astype(np.float64)
        wanted = np.exp(y) / np.exp(y).sum()
        (found,) = predict(network, [path], top=6)
        assert [name for name, _ in found.top] == ["uvwxyz"[c] for c in np.argsort(-wanted)]
        np.testing.assert_allclose([share for _, share in found.top], np.sort(wanted)[::-1], rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batches_change_nothing(network, folder, batch_size):
    files = find_images([str(folder)])
    whole = list(predict(network, files))
    parts = list(predict(network, files, batch_size=batch_size))
    assert [p.file for p in parts] == [p.file for p in whole] == [str(f) for f in files]
    for a, b in zip(whole, parts, strict=True):
        assert [n for n, _ in a.top] == [n for n, _ in b.top] and len(a.top) == 5
        np.testing.assert_allclose([s for _, s in a.top], [s for _, s in b.top], rtol=1e-5)


def test_the_middle_is_cropped_after_resizing(network, tmp_path):
    """Weights of ImageNet: shorter side to 256, then the middle 224."""
    image = np.zeros((40, 40, 3), np.uint8)
    image[10:30, 10:30] = np.random.default_rng(0).integers(0, 256, (20, 20, 3))
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image[12:28, 12:28]).save(tmp_path / "b.png")
    cropped = Network(network.model, network.classes, MEAN, STD, 16, 3, "w", 40, True)
    (a,), (b,) = (list(predict(net, [tmp_path / f])) for net, f in ((cropped, "a.png"), (network, "b.png")))
    assert a.top == b.top


def bomb(path):
    """A PNG of a few bytes that says it is 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def test_bad_images_are_named_and_the_others_go_on(network, folder):
    (folder / "cut.png").write_bytes((folder / "a0.png").read_bytes()[:200])
    (folder / "text.png").write_text("no image")
    (folder / "empty.jpg").write_bytes(b"")
    bomb(folder / "bomb.png")
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 256).save(folder / "deep.png")
    Image.fromarray(np.ones((16, 16), np.float32)).save(folder / "float.tiff")
    picture(folder / "thin.png", size=(200_001, 1))
    bad = ["cut.png", "text.png", "empty.jpg", "bomb.png", "deep.png", "float.tiff", "thin.png", "gone.png"]
    files = [folder / name for pair in zip(bad, ["a0.png", "b1.png"] * 4, strict=True) for name in pair]
    found = list(predict(network, files, batch_size=3))
    assert [bool(p.error) for p in found] == [True, False] * 8 and all(bool(p.top) != bool(p.error) for p in found)
    for name, prediction in zip(bad, found[::2], strict=True):
        assert name in prediction.error and "\n" not in prediction.error
    says = [p.error for p in found[::2]]
    assert "pixels" in says[3] and "more than 8 bits per channel" in says[4] and "more than 8 bits" in says[5]
    assert "too narrow" in says[6] and "there is no file" in says[7]
    assert found[1].top == found[5].top


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA"])
def test_other_channels_become_the_networks(network, tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    source = picture(tmp_path / "source.png", size=(16, 16))
    with Image.open(source) as image:
        image.convert(mode).save(tmp_path / f"odd.{suffix}")
    with Image.open(tmp_path / f"odd.{suffix}") as image:
        image.convert("RGB").save(tmp_path / "plain.png")
    odd, plain = predict(network, [tmp_path / f"odd.{suffix}", tmp_path / "plain.png"])
    assert odd.top == plain.top


def test_a_network_for_grey_images(tmp_path):
    network = Network(create_model("resnet20", 2, 1).eval(), ("x", "y"), (0.5,), (0.5,), 8, 1, "w", 8, True)
    (found,) = predict(network, [picture(tmp_path / "a.png")], overlays=tmp_path / "cam")
    assert len(found.top) == 2
    odd = Network(create_model("resnet20", 2, 4).eval(), ("x", "y"), (0.5,) * 4, (0.5,) * 4, 8, 4, "w", 8, True)
    with pytest.raises(ValueError, match="w take images of 4 channels; files have 1 or 3"):
        list(predict(odd, [tmp_path / "a.png"]))


def test_damaged_weights_give_no_answer(network, folder):
    network.model.fc.bias.array[0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite: they are damaged"):
        list(predict(network, [folder / "a0.png"]))


# --- where it looked ----------------------------------------------------------------------------------------------


def test_overlays(network, folder):
    files = [folder / "a0.png", folder / "gone.png", folder / "deep" / "c.jpg", picture(folder / "deep" / "a0.png")]
    found = list(predict(network, files, overlays=folder / "cam", batch_size=2))
    assert [p.overlay.rpartition("/")[2] for p in found] == ["a0.png", "", "c.png", "a0-2.png"]
    with Image.open(found[0].overlay) as image:
        assert image.mode == "RGB" and image.size[0] > 2 * 224 - 1 and image.size[1] >= 224


def test_an_overlay_is_lighter_where_the_map_is_high():
    image, heat = np.full((8, 8, 3), 100, np.uint8), np.zeros((2, 2), np.float32)
    heat[0, 1] = 1
    drawn = np.asarray(draw_overlay(image, heat, "cat")).astype(int)
    right = drawn[:224, 232:].sum(2)
    assert (drawn[:224, :224] == 100).all()
    assert right[20, 200] > right[112, 112] > right[200, 20]


# --- the command --------------------------------------------------------------------------------------------------


def flags(weights):
    words = "--model resnet20 --image-size 16 --threads 1 --mean 0.2 0.3 0.4 --std 0.5 0.6 0.7"
    return ["--weights", str(weights), *words.split()]


def test_command(weights, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["predict", "a*.png", "b1.png", *flags(weights), "--top", "2"]) == 0
    out, error = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows] == ["a0.png", "a2.png", "a4.png", "b1.png"] and not error
    assert all(len(row) == 7 and row[1] == "class" and row[3].endswith("%") for row in rows)

    (folder / "text.png").write_text("no image")
    assert main(["predict", "a0.png", "text.png", "gone.png", *flags(weights), "--json", "--grad-cam", "cam"]) == 1
    out, error = capsys.readouterr()
    found = json.loads(out)
    assert [image["file"] for image in found["images"]] == ["a0.png", "text.png", "gone.png"]
    best = found["images"][0]
    assert len(best["top"]) == 5 and best["top"][0]["probability"] >= best["top"][1]["probability"]
    assert best["grad_cam"] == "cam/a0.png" and (folder / "cam" / "a0.png").is_file()
    assert "text.png" in found["images"][1]["error"]
    lines = error.splitlines()
    assert len(lines) == 3 and all(line.startswith("minires: ") for line in lines)
    assert "'text.png'" in lines[0] and "'gone.png'" in lines[1] and "2 of 3 images could not be read" in lines[2]

    assert main(["predict", "gone.png", *flags(weights)]) == 2
    assert capsys.readouterr().err == "minires: error: there is no file 'gone.png'\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a0.png", "--weights", "nowhere"], "there is no file 'nowhere'"),
        (["a0.png", "--weights", "{w}", "--model", "resnet18"], "do not fit resnet18"),
        (["nothing*", "--weights", "{w}", "--model", "resnet20"], "nothing matches 'nothing*'"),
        (["--weights", "{w}", "--model", "resnet20"], "IMAGES"),
        (["a0.png"], "--weights"),
        (["a0.png", "--weights", "{w}", "--model", "resnet20", "--top", "0"], "top=0 must be at least 1"),
        (["a0.png", "--weights", "{w}", "--model", "resnet20", "--std", "1"], "mean and std go together"),
        (["a0.png", "--weights", "{w}", "--model", "resnet20", "--device", "tpu"], "unknown device 'tpu'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_line(weights, folder, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(folder)
    assert main(["predict", *(word.format(w=weights) for word in arguments)]) == 2
    out, error = capsys.readouterr()
    assert says in error.splitlines()[-1] and error.splitlines()[-1].startswith("minires: error: ") and not out
