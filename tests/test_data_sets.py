"""Data sets by name: CIFAR and IDX files, downloads, the cache, the catalogue."""

import functools
import gc
import gzip
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from test_data_archives import png, write_tar

from minires.data import DATASETS, DataLoader, ImageDataset, catalog, open_dataset
from minires.data import cache as cache_module
from minires.data import transforms as T
from minires.data.cache import Contents, cached
from minires.data.cifar import CIFAR10, CIFAR100
from minires.data.download import download
from minires.data.idx import FASHION_MNIST, MNIST, read_idx


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIRES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


# --- CIFAR --------------------------------------------------------------------------------------------------------


def test_cifar_sizes_are_those_of_the_published_files():
    assert CIFAR10.size("train") == CIFAR10.size("test") == 30_730_000
    assert (CIFAR100.size("train"), CIFAR100.size("test")) == (153_700_000, 30_740_000)


@pytest.fixture(params=[CIFAR10, CIFAR100], ids=lambda kind: kind.name)
def small(request, monkeypatch):
    """The format with a few images per file, and such files."""
    kind = replace(request.param, rows={"train": 4, "test": 3})
    monkeypatch.setitem(catalog._CIFAR, kind.name, kind)
    rng = np.random.default_rng(0)
    files, images, labels = {}, {}, {}
    for split, names in kind.files.items():
        images[split], labels[split] = [], []
        for name in names:
            n = kind.rows[split]
            x = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
            y = rng.integers(0, kind.classes, n, dtype=np.uint8)
            coarse = [rng.integers(0, 20, (n, 1), dtype=np.uint8)] * (kind.label_bytes - 1)
            files[name] = np.concatenate([*coarse, y[:, None], x.reshape(n, -1)], 1).tobytes()
            images[split].append(x.transpose(0, 2, 3, 1))
            labels[split].append(y)
    files[kind.names] = "\n".join(f"class{i}" for i in range(kind.classes)).encode() + b"\n\n"
    return kind, files, images, labels


def packed(tmp_path, kind, files):
    return write_tar(tmp_path / kind.archive, {f"{kind.folder}/{name}": content for name, content in files.items()})


def test_cifar_is_read_from_the_archive_or_the_folder(tmp_path, small):
    kind, files, images, labels = small
    archive = packed(tmp_path, kind, {"readme.html": b"<p>", **dict(reversed(files.items()))})
    (tmp_path / "unpacked" / kind.folder).mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / "unpacked" / kind.folder / name).write_bytes(content)
    for place in (archive, tmp_path, tmp_path / "unpacked", tmp_path / "unpacked" / kind.folder):
        for train, split in ((True, "train"), (False, "test")):
            data = open_dataset(kind.name, place, train)
            np.testing.assert_array_equal(data.images, np.concatenate(images[split]))
            np.testing.assert_array_equal(data.labels, np.concatenate(labels[split]))
            assert data.classes == [f"class{i}" for i in range(kind.classes)]
            assert (data.mean, data.std, data.name) == (kind.mean, kind.std, kind.name)
    small_images = open_dataset(kind.name, archive, image_size=16).images
    assert small_images.shape[1:] == (16, 16, 3)


def test_wrong_cifar_archives_are_refused(tmp_path, small, cache):
    kind, files, _, _ = small
    first = kind.files["train"][0]
    bad_label = bytearray(files[first])
    bad_label[kind.label_bytes - 1] = kind.classes
    for change, message in (
        ({first: files[first] + b"x"}, f"{first!r} has .* bytes in place of {kind.size('train')}|more than"),
        ({first: files[first][:-1]}, f"{first!r} has .* bytes in place of {kind.size('train')}"),
        ({first: None}, f"is not the binary {kind.name} archive: {first!r} is missing"),
        ({kind.names: b"a\nb\n"}, f"should name {kind.classes} classes; found 2"),
        ({kind.names: None}, "found no file"),
        ({kind.names: b"x" * 70_000}, "has 70000 bytes|more than"),
        ({first: bytes(bad_label)}, f"label {kind.classes} in a data set of {kind.classes} classes"),
    ):
        changed = {name: content for name, content in {**files, **change}.items() if content is not None}
        with pytest.raises(ValueError, match=message) as caught:
            open_dataset(kind.name, packed(tmp_path, kind, changed))
        assert "\n" not in str(caught.value) and not list(cache.iterdir())


def test_a_member_twice_is_refused(tmp_path, small):
    kind, files, _, _ = small
    with tarfile.open(tmp_path / kind.archive, "w:gz") as tar:
        for name, content in [*files.items(), *files.items()]:
            info = tarfile.TarInfo(f"{kind.folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match="is there twice"):
        open_dataset(kind.name, tmp_path)


def test_missing_cifar_says_what_was_looked_for(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no 'cifar-10-binary.tar.gz'; give the folder.*--data-dir.*download"
    ):
        open_dataset("cifar10", tmp_path)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"'cifar-10-python.tar.gz' is there, but it is a pickle"):
        open_dataset("cifar10", tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist; it should hold"):
        open_dataset("cifar100", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="downloads"):
        open_dataset("cifar100")


# --- IDX ----------------------------------------------------------------------------------------------------------


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def mnist_files(folder, pack=True):
    rng = np.random.default_rng(0)
    arrays = {}
    folder.mkdir(parents=True, exist_ok=True)
    for (split, what), (name, _) in MNIST.files.items():
        n = 7 if split == "train" else 4
        arrays[split, what] = rng.integers(0, 10, (n, 28, 28) if what == "images" else (n,), dtype=np.uint8)
        content = idx(arrays[split, what])
        (folder / (name if pack else name.removesuffix(".gz"))).write_bytes(gzip.compress(content) if pack else content)
    return arrays


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist(tmp_path, name, pack):
    arrays = mnist_files(tmp_path / name, pack)
    for place in (tmp_path, tmp_path / name):
        for train, split in ((True, "train"), (False, "test")):
            data = open_dataset(name, place, train)
            np.testing.assert_array_equal(data.images[..., 0], arrays[split, "images"])
            np.testing.assert_array_equal(data.labels, arrays[split, "labels"])
    assert len(data.classes) == 10 and data.mean == {"mnist": MNIST, "fashion_mnist": FASHION_MNIST}[name].mean
    assert open_dataset(name, tmp_path, image_size=32).images.shape == (7, 32, 32, 1)


def test_wrong_idx_files_are_refused(tmp_path):
    path = tmp_path / "x"
    good = idx(np.zeros((2, 3, 3), np.uint8))
    for content, message in (
        (b"", "is not an IDX file of uint8 with 3 axes"),
        (b"\0\0\x0d\3" + good[4:], "is not an IDX file of uint8"),
        (good[:10], "is not an IDX file"),
        (good[:-1], r"has fewer than the 18 bytes of its \(2, 3, 3\)"),
        (good + b"x", "has more than the 18 bytes"),
        (good[:4] + b"\xff" * 12, "claims .* more than"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_idx(path, 3)
    packed_path = tmp_path / "x.gz"
    for content in (gzip.compress(good)[:-9], b"hello", gzip.compress(good)[:-8] + bytes(8)):
        packed_path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x.gz' is damaged"):
            read_idx(packed_path, 3)


def test_idx_files_must_fit_each_other(tmp_path):
    mnist_files(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.zeros(6, np.uint8))))
    with pytest.raises(ValueError, match="has 7 images, but 6 labels"):
        open_dataset("mnist", tmp_path)
    labels.write_bytes(gzip.compress(idx(np.full(7, 10, np.uint8))))
    with pytest.raises(ValueError, match="label 10 in a data set of 10"):
        open_dataset("mnist", tmp_path)
    labels.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no 'train-labels-idx1-ubyte.gz'"):
        open_dataset("mnist", tmp_path)


# --- the cache ----------------------------------------------------------------------------------------------------


def make_counting(calls):
    def make(draft):
        calls.append(1)
        draft.images((3, 2, 2, 1))[:] = np.arange(12).reshape(3, 2, 2, 1)
        return Contents(np.array([0, 1, 0]), ["a", "b"], {"train": (0, 2), "test": (2, 3)}, ["x", "y", "z"])

    return make


def test_decoding_happens_once(cache):
    calls = []
    for _ in range(3):
        entry = cached({"of": 1}, make_counting(calls))
        np.testing.assert_array_equal(entry.images[..., 0].ravel(), np.arange(12))
        assert (entry.classes, entry.paths, entry.splits["test"]) == (["a", "b"], ["x", "y", "z"], (2, 3))
    cached({"of": 2}, make_counting(calls))
    assert len(calls) == 2 and len(list(cache.iterdir())) == 2
    with pytest.raises(ValueError, match="read-only"):
        entry.images[0] = 1


@pytest.mark.parametrize("file", ["images.npy", "labels.npy", "paths.json", "entry.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "empty"])
def test_a_damaged_entry_is_made_anew(cache, file, damage):
    calls = []
    held = cached({}, make_counting(calls))  # and mapped by somebody
    before = held.images[:].copy()
    (path,) = cache.glob(f"*/{file}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.unlink()
    if damage != "gone":
        path.write_bytes({"cut": content[:-3], "flip": content, "empty": b""}[damage])
    entry = cached({}, make_counting(calls))
    assert len(calls) == 2 and entry.images.ravel().tolist() == list(range(12)) and entry.paths == ["x", "y", "z"]
    assert len(list(cache.iterdir())) == 1
    np.testing.assert_array_equal(held.images, before)


def test_an_entry_is_whole_or_not_there(cache):
    def make(draft):
        draft.images((10, 2, 2, 1))[:5] = 1
        raise ValueError("image 5 is broken")

    with pytest.raises(ValueError, match="image 5"):
        cached({}, make)
    assert not list(cache.iterdir())


def test_two_who_make_the_same_entry_agree(cache):
    calls = []

    def slow(draft):
        cached({}, make_counting(calls))  # somebody else is faster
        return make_counting(calls)(draft)

    entry = cached({}, slow)
    assert len(calls) == 2 and len(list(cache.iterdir())) == 1 and entry.images.shape == (3, 2, 2, 1)


def test_drafts_of_dead_processes_are_swept(cache):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    cache.mkdir(parents=True)
    dead = cache / f"{cache_module._owner()}{done.pid}-0.tmp"
    mine = cache / f"{cache_module._owner()}{os.getpid()}-0.tmp"
    other = cache / f"elsewhere-{done.pid}-0.tmp"
    for draft in (dead, mine, other):
        draft.mkdir()
    cached({}, make_counting([]))
    assert not dead.exists() and mine.exists() and other.exists()


def test_no_room_and_no_permission_are_said(tmp_path, monkeypatch, cache):
    code = """
import resource
from minires.data.cache import Contents, cached
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    cached({}, lambda draft: draft.images((100, 64, 64, 3)))
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        "cannot keep decoded images in" in done.stdout
        and "File too large; make room, or set MINIRES_CACHE" in done.stdout
    )
    assert not list(cache.iterdir())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIRES_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="Not a directory; make room, or set MINIRES_CACHE"):
        cached({}, make_counting([]))


def test_mapped_images_are_pickled_by_their_place(tmp_path):
    path = write_tar(tmp_path / "x.tar", {f"train/a/{i}.png": png(i, (64, 64)) for i in range(20)})
    data = open_dataset("folder", path)
    content = pickle.dumps(data)
    assert len(content) < 5000 < data.images.nbytes
    again = pickle.loads(content)
    np.testing.assert_array_equal(again.images, data.images)
    assert again.classes == data.classes and type(again.images) is np.ndarray
    inside = ImageDataset(data.images[:2], [0, 0], ["a"])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(inside)).images, data.images[:2])
    batches = [
        [f.array for batch in DataLoader(data, 8, num_workers=n, workers="process") for f in batch] for n in (0, 1)
    ]
    for a, b in zip(*batches, strict=True):
        np.testing.assert_array_equal(a, b)


# --- downloads ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves tmp_path/site on this machine alone."""
    pytest.importorskip("pooch", reason="needs pooch")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            asked.append(self.path)

        def do_GET(self):
            if self.path == "/short":  # says more than it sends
                asked.append(self.path)
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"x" * 10)
            else:
                super().do_GET()

    (tmp_path / "site").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_address[1]}", tmp_path / "site", asked
        http_server.shutdown()
        thread.join(5)


def test_downloads_are_checked(tmp_path, server, capsys):
    url, site, asked = server
    (site / "file").write_bytes(b"content")
    target = tmp_path / "deep" / "file"
    good = sha256(b"content").hexdigest()
    assert download(f"{url}/file", good, target) == target and target.read_bytes() == b"content"
    assert target.stat().st_mode & 0o777 == 0o644
    asked.clear()
    download(f"{url}/file", good, target)
    assert not asked  # it is there
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # requests leaves a failed connection to the collector
@pytest.mark.parametrize("path", ["file", "none", "short"])
def test_failed_downloads_leave_nothing(tmp_path, server, path):
    url, site, _ = server
    (site / "file").write_bytes(b"content")
    error, message = (
        (ValueError, "its SHA-256 differs") if path == "file" else (OSError, f"cannot download {url}/{path}: ")
    )
    with pytest.raises(error, match=message) as caught:
        download(f"{url}/{path}", "0" * 64, tmp_path / "target" / "x")
    assert "\n" not in str(caught.value) and "yourself" in str(caught.value)
    assert not list((tmp_path / "target").iterdir())
    del caught
    gc.collect()


def test_no_network_is_said(tmp_path, server):
    with pytest.raises(OSError, match=r"cannot download http://127.0.0.1:9/x: .*refused"):
        download("http://127.0.0.1:9/x", "0" * 64, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_data_sets_are_downloaded(tmp_path, server, monkeypatch, small):
    url, site, asked = server
    kind, files, images, _ = small
    archive = packed(site, kind, files)
    monkeypatch.setitem(
        catalog._CIFAR,
        kind.name,
        replace(kind, url=f"{url}/{kind.archive}", sha256=sha256(archive.read_bytes()).hexdigest()),
    )
    for _ in range(2):
        data = open_dataset(kind.name, tmp_path / "mine", download=True)
        np.testing.assert_array_equal(data.images, np.concatenate(images["train"]))
    assert (tmp_path / "mine" / kind.archive).exists() and len(asked) == 1
    assert open_dataset(kind.name, download=True).labels.size  # into the folder of downloads
    assert (tmp_path / "cache" / "downloads" / kind.archive).exists()


def test_mnist_is_downloaded(tmp_path, server, monkeypatch):
    url, site, asked = server
    arrays = mnist_files(site)
    hashes = {k: (n, sha256((site / n).read_bytes()).hexdigest()) for k, (n, _) in MNIST.files.items()}
    monkeypatch.setitem(catalog._IDX, "mnist", replace(MNIST, url=f"{url}/", files=hashes))
    data = open_dataset("mnist", tmp_path / "mine", train=False, download=True)
    np.testing.assert_array_equal(data.images[..., 0], arrays["test", "images"])
    assert len(asked) == 4


def test_pooch_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(RuntimeError, match=r"pip install 'minires\[data\]'"):
        download("http://127.0.0.1:9/x", "0" * 64, tmp_path / "x")


# --- the catalogue ------------------------------------------------------------------------------------------------


def test_digits_by_name():
    train, test = open_dataset("digits"), open_dataset("digits", train=False, image_size=16)
    assert train.images.shape == (1437, 8, 8, 1) and test.images.shape == (360, 16, 16, 1)
    assert train.classes == list("0123456789")
    from minires.data.datasets import digits

    images, labels = digits()[0].arrays
    np.testing.assert_allclose(train.images.transpose(0, 3, 1, 2) / 255, images, atol=0.5 / 255 + 1e-6)
    np.testing.assert_array_equal(train.labels, labels)


def test_unknown_names_get_a_hint():
    with pytest.raises(ValueError, match=r"unknown data set 'CIFAR-10'; did you mean 'cifar10'\?"):
        open_dataset("CIFAR-10")
    with pytest.raises(ValueError, match=r"'xyz'; known: digits, cifar10"):
        open_dataset("xyz")
    for bad in ({"image_size": 0}, {"image_size": 10**6}, {"mode": "CMYK"}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}=.* must be"):
            open_dataset("digits", **bad)
    assert set(DATASETS) == {"digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "folder"}


def test_image_dataset_checks_and_indexes():
    x = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    data = ImageDataset(x, np.array([0, 1, 2, 1, 0]), ["a", "b", "c"])
    image, label = data[-2]
    np.testing.assert_allclose(image, x[3].transpose(2, 0, 1) / 255, rtol=2e-7)
    assert label == 1 and len(list(data)) == 5
    other = data.with_transform(T.Augment(0.5, 0.5))
    assert other[0][0].min() < 0 <= data[0][0].min()
    with pytest.raises(IndexError):
        data[5]
    for images, labels, classes, message in (
        (x.astype(float), [0] * 5, ["a"], "uint8 images"),
        (x[0], [0] * 4, ["a"], "uint8 images"),
        (x, [0] * 4, ["a"], "one length"),
        (x, [0, 1, 2, 3, 0], ["a"], "labels from 0 to 3 do not fit 1 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageDataset(images, labels, classes)
    with pytest.raises(ValueError, match="nothing to learn from"):
        ImageDataset(np.zeros((2, 3, 3, 1), np.uint8), [0, 0], ["a"]).statistics()


# --- real data ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif("MINIRES_DATA" not in os.environ, reason="MINIRES_DATA names no folder of real data")
def test_the_cifar10_of_jpeg_files():
    path = Path(os.environ["MINIRES_DATA"]) / "cifar10-jpg.tar.xz"
    if not path.exists():
        pytest.skip(f"no {path.name} in MINIRES_DATA")
    train, test = open_dataset("folder", path), open_dataset("folder", path, train=False)
    assert train.images.shape == (50_000, 32, 32, 3) and test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(train.labels).tolist() == [5000] * 10 and np.bincount(test.labels).tolist() == [1000] * 10
    assert (
        train.classes[0] == "airplane" and train.classes[9] == "truck" and train.paths[0] == "train/airplane/0000.jpg"
    )
    mean, std = train.statistics()
    np.testing.assert_allclose(mean, CIFAR10.mean, atol=0.005)  # JPEG changes little of these
    np.testing.assert_allclose(std, CIFAR10.std, atol=0.005)
    meta = json.loads((train._part[0].folder / "entry.json").read_text())
    assert meta["key"]["files"] == sha256(path.read_bytes()).hexdigest()
