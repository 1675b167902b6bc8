"""Bad data sets, a row of a table each: one line that names what is wrong, and nothing of it is read into the cache."""

import gzip
import io
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("minires.data.catalog")
from minires.data.catalog import open_dataset  # pyright: ignore[reportMissingImports]


def jpeg(size=(9, 9), **how):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(file, "JPEG", **how)
    return file.getvalue()


def huge_png():
    """An image of 60,000 x 60,000 pixels in some hundred bytes."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")


GOOD = {f"{part}/{name}/{i}.jpg": jpeg() for part in ("train", "test") for name in ("cat", "dog") for i in range(2)}


def tar(name="data.tar", extra=(), files=GOOD, change=lambda content: content):
    """An archive of good images, and members of other kinds: (name, content or what to set of its header)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w" + name.removeprefix("data.tar").replace(".", ":")) as archive:
        for member, content in [*files.items(), *extra]:
            info = tarfile.TarInfo(member)
            if isinstance(content, dict):
                for key, value in content.items():
                    setattr(info, key, value)
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    Path(name).write_bytes(change(file.getvalue()))


def archive_of(*extra, **how):
    return lambda: tar(extra=extra, **how)


def zipped(*extra):
    with zipfile.ZipFile("data.zip", "w") as archive:
        for name, content in [*GOOD.items(), *extra]:
            archive.writestr(name, content)


def zip_link():
    info = zipfile.ZipInfo("train/cat/link.jpg")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    zipped((info, "/etc/passwd"))


def folder(**files):
    for name, content in {**GOOD, **files}.items():
        path = Path("data") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def mnist(images=(4, 28, 28), labels=4, **files):
    """The four files, gzipped, of zeros."""
    for part in ("train", "t10k"):
        head = b"\0\0\x08\x03" + struct.pack(">III", *images)
        content = {
            f"{part}-images-idx3-ubyte.gz": head + bytes(int(np.prod(images))),
            f"{part}-labels-idx1-ubyte.gz": b"\0\0\x08\x01" + struct.pack(">I", labels) + bytes(labels),
        }
        for name, data in content.items():
            Path("data").mkdir(exist_ok=True)
            Path("data", name).write_bytes(gzip.compress(data))
    for name, data in files.items():
        Path("data", name).write_bytes(data)


def nothing():
    pass


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
_TRAIN_IMAGES = "train-images-idx3-ubyte.gz"

# (what is wrong, what is made, data set, where it lies, what the message says)
ROWS = [
    ("unknown data set", nothing, "cifar-11", None, ["'cifar-11'", "cifar1"]),
    ("folder without a place", nothing, "folder", None, ["'folder'", "data_dir"]),
    ("missing archive", nothing, "folder", "data.tar", ["'data.tar'", "data_dir"]),
    ("missing CIFAR", lambda: Path("data").mkdir(), "cifar10", "data", ["cifar10", "cifar-10-binary.tar.gz"]),
    (
        "file of no known kind",
        lambda: Path("data.rar").write_bytes(b"Rar!"),
        "folder",
        "data.rar",
        ["'data.rar'", ".tar.xz"],
    ),
    # archives that would do harm
    (
        "member that leads out",
        archive_of(("train/cat/../../../out.jpg", jpeg())),
        "folder",
        "data.tar",
        ["..", "refused"],
    ),
    ("member above", archive_of(("../out.jpg", jpeg())), "folder", "data.tar", ["'../out.jpg'", "refused"]),
    ("absolute path", archive_of(("/tmp/out.jpg", jpeg())), "folder", "data.tar", ["'/tmp/out.jpg'", "refused"]),
    ("path of Windows", archive_of(("train\\..\\..\\out.jpg", jpeg())), "folder", "data.tar", ["out of", "refused"]),
    ("drive of Windows", archive_of(("C:\\out.jpg", jpeg())), "folder", "data.tar", ["absolute", "refused"]),
    ("symbolic link", archive_of(("train/cat/l.jpg", LINK)), "folder", "data.tar", ["'train/cat/l.jpg'", "link"]),
    (
        "hard link",
        archive_of(("train/cat/l.jpg", {**LINK, "type": tarfile.LNKTYPE})),
        "folder",
        "data.tar",
        ["'train/cat/l.jpg'", "link"],
    ),
    (
        "device",
        archive_of(("train/cat/zero.jpg", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5})),
        "folder",
        "data.tar",
        ["'train/cat/zero.jpg'", "device"],
    ),
    (
        "member of a terabyte",
        archive_of(("train/cat/t.jpg", {"size": 2**40})),
        "folder",
        "data.tar",
        [str(2**40), "refused"],
    ),
    ("zip with a way out", lambda: zipped(("../out.jpg", jpeg())), "folder", "data.zip", ["'../out.jpg'", "refused"]),
    ("zip with a link", zip_link, "folder", "data.zip", ["'train/cat/link.jpg'", "link"]),
    (
        "zip bomb",
        lambda: zipped(("train/cat/b.jpg", bytes(2**26 + 1))),
        "folder",
        "data.zip",
        [str(2**26 + 1), "refused"],
    ),
    # archives that are damaged
    ("empty archive", lambda: Path("data.tar").write_bytes(b""), "folder", "data.tar", ["'data.tar'"]),
    (
        "archive of noise",
        lambda: Path("data.tar").write_bytes(bytes(range(256)) * 9),
        "folder",
        "data.tar",
        ["'data.tar'"],
    ),
    ("archive cut off", archive_of(change=lambda b: b[: len(b) // 3]), "folder", "data.tar", ["'data.tar'", "damaged"]),
    (
        "packed archive cut off",
        archive_of(name="data.tar.xz", change=lambda b: b[:-30]),
        "folder",
        "data.tar.xz",
        ["'data.tar.xz'", "damaged"],
    ),
    (
        "packed archive with a flipped bit",
        archive_of(name="data.tar.gz", change=lambda b: b[:-6] + bytes([b[-6] ^ 1]) + b[-5:]),
        "folder",
        "data.tar.gz",
        ["'data.tar.gz'", "damaged"],
    ),
    ("zip cut off", lambda: (zipped(), _cut("data.zip")), "folder", "data.zip", ["'data.zip'", "damaged"]),
    # what is in them
    ("image of no class", archive_of(("odd.jpg", jpeg())), "folder", "data.tar", ["'odd.jpg'", "CLASS/"]),
    ("file twice", archive_of(("train/cat/0.jpg", jpeg())), "folder", "data.tar", ["'train/cat/0.jpg'", "twice"]),
    ("class of one part only", archive_of(("test/emu/0.jpg", jpeg())), "folder", "data.tar", ["'emu'"]),
    ("no image", archive_of(("train/cat/notes.txt", b"text")), "folder", "data.tar", ["notes.txt", ".jpg"]),
    ("text as an image", archive_of(("train/cat/9.jpg", b"text")), "folder", "data.tar", ["train/cat/9.jpg", "image"]),
    ("image cut off", archive_of(("train/cat/9.jpg", jpeg()[:-300])), "folder", "data.tar", ["train/cat/9.jpg"]),
    (
        "huge image",
        archive_of(("train/cat/9.jpg", huge_png())),
        "folder",
        "data.tar",
        ["train/cat/9.jpg", "pixels"],
    ),
    ("images of two sizes", archive_of(("train/dog/9.jpg", jpeg((7, 8)))), "folder", "data.tar", ["7x8", "image_size"]),
    ("empty folder", lambda: Path("data").mkdir(), "folder", "data", ["'data'", "train/CLASS/"]),
    ("damaged file in a folder", lambda: folder(**{"train/cat/9.jpg": b""}), "folder", "data", ["train/cat/9.jpg"]),
    # CIFAR and MNIST
    (
        "another archive for CIFAR",
        lambda: (tar(), Path("data.tar").rename("cifar-10-binary.tar")),
        "cifar10",
        "cifar-10-binary.tar",
        ["cifar-10-binary.tar", "data_batch_1.bin"],
    ),
    (
        "CIFAR with a batch of another size",
        lambda: tar(files={"cifar-10-batches-bin/data_batch_1.bin": bytes(99)}),
        "cifar10",
        "data.tar",
        ["data_batch_1.bin", "99 bytes", "30730000"],
    ),
    ("pickles of CIFAR", lambda: folder(**{"cifar-10-python.tar.gz": b""}), "cifar10", "data", ["pickle"]),
    ("no MNIST", lambda: Path("data").mkdir(), "mnist", "data", ["mnist", "train-images-idx3-ubyte.gz"]),
    (
        "MNIST cut off",
        lambda: mnist(**{_TRAIN_IMAGES: gzip.compress(bytes(99))[:-9]}),
        "mnist",
        "data",
        [_TRAIN_IMAGES],
    ),
    ("MNIST that is no IDX", lambda: mnist(**{_TRAIN_IMAGES: gzip.compress(b"x" * 99)}), "mnist", "data", ["IDX"]),
    (
        "IDX that claims terabytes",
        lambda: mnist(**{_TRAIN_IMAGES: gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12)}),
        "mnist",
        "data",
        [_TRAIN_IMAGES, "4294967295"],
    ),
    ("fewer labels than images", lambda: mnist(labels=3), "mnist", "data", ["4 images", "3 labels"]),
]


def _cut(name):
    content = Path(name).read_bytes()
    Path(name).write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(("make", "name", "where", "says"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_data_sets(make, name, where, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIRES_CACHE", str(tmp_path / "cache"))
    make()
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError)) as caught:
        open_dataset(name, where)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400 and all(part in text for part in says), text
    left = [p for p in tmp_path.rglob("*") if p not in before and not p.is_dir()]
    assert not left, left
    assert not (tmp_path.parent / "out.jpg").exists()


def test_the_table_is_long_enough():
    assert len({row[0] for row in ROWS}) == len(ROWS) >= 40
