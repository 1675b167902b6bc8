"""Archives from anywhere: what is in them is given, or they are refused in one line; nothing is ever extracted."""

import bz2
import gzip
import io
import lzma
import stat
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from minires.data import decode, open_dataset
from minires.data.archive import is_archive, members
from minires.data.datasets import ImageFolder
from minires.data.decode import open_image


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIRES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def png(seed=0, size=(6, 5)):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def tar_bytes(files, **changes):
    """A tar archive of {name: content}; a content that is a TarInfo is added as it is."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(content, tarfile.TarInfo):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                tar.addfile(info)
    return stream.getvalue()


PACKERS = {".tar": bytes, ".tar.gz": gzip.compress, ".tar.xz": lzma.compress, ".tbz2": bz2.compress}
GOOD = {
    f"{split}/{label}/{i}.png": png(10 * j + i)
    for j, (split, label) in enumerate((s, c) for s in ("train", "test") for c in ("cat", "ant"))
    for i in (2, 0, 1)
}


def write_tar(path, files):
    path.write_bytes(PACKERS["".join(path.suffixes)](tar_bytes(files)))
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


# --- members ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*PACKERS, ".zip"])
def test_members_are_read_in_order(tmp_path, kind):
    files = {"b/1": b"x" * 1024, "a": b"", "./c/2": bytes(range(256))}  # 1024: whole blocks
    path = (write_zip if kind == ".zip" else write_tar)(tmp_path / f"files{kind}", files)
    assert is_archive(path) and not is_archive(tmp_path / "files.rar")
    assert [(m.name, m.size, m.read()) for m in members(path)] == [
        (name.removeprefix("./"), len(content), content) for name, content in files.items()
    ]
    assert [m.name for m in members(path)] == ["b/1", "a", "c/2"]  # without reading them


def entry(name, **about):
    info = tarfile.TarInfo(name)
    for key, value in about.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (entry("/etc/passwd"), "'/etc/passwd' has an absolute path"),
        (entry("C:/windows"), "has an absolute path"),
        (entry("train/../../x.png"), "leads out of the archive"),
        (entry("a\\..\\x.png"), "leads out of the archive"),
        (entry("../up", type=tarfile.DIRTYPE), "leads out of the archive"),
        (entry("l.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "'l.png' is a link"),
        (entry("l.png", type=tarfile.LNKTYPE, linkname="train/cat/0.png"), "'l.png' is a link"),
        (entry("d.png", type=tarfile.CHRTYPE), "'d.png' is a device"),
        (entry("p.png", type=tarfile.FIFOTYPE), "is a device"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_hostile_tars_are_refused(tmp_path, cache, bad, message):
    path = write_tar(tmp_path / "hostile.tar.gz", {**GOOD, "bad": bad})
    with pytest.raises(ValueError, match=message) as caught:
        list(members(path))
    assert "\n" not in str(caught.value) and "hostile.tar.gz" in str(caught.value)
    with pytest.raises(ValueError, match=message):
        open_dataset("folder", path)
    assert not list(cache.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "hostile.tar.gz"]


def test_hostile_zips_are_refused(tmp_path):
    link = zipfile.ZipInfo("train/cat/l.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    for name, content, message in ((link, b"/etc/passwd", "is a link"), ("../x.png", b"", "leads out")):
        path = tmp_path / "hostile.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, content)
        with pytest.raises(ValueError, match=message):
            list(members(path))


@pytest.mark.parametrize("kind", [".tar.xz", ".zip"])
def test_huge_members_are_refused_unread(tmp_path, kind):
    path = (write_zip if kind == ".zip" else write_tar)(tmp_path / f"huge{kind}", {"a.png": bytes(1001)})
    assert [m.size for m in members(path, largest=1001)] == [1001]
    with pytest.raises(ValueError, match=r"'a.png' has 1001 bytes, more than 1000"):
        list(members(path, largest=1000))


@pytest.mark.parametrize("kind", [*PACKERS, ".zip"])
def test_damaged_archives_are_refused(tmp_path, kind):
    path = (write_zip if kind == ".zip" else write_tar)(tmp_path / f"good{kind}", {"a": png(0, (40, 40)), **GOOD})
    whole = path.read_bytes()
    used = len(tar_bytes({"a": png(0, (40, 40)), **GOOD}).rstrip(b"\0")) if kind == ".tar" else len(whole)
    for content in (whole[: used // 2], whole[: used - 600], b"", b"hello world" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or not an archive of its kind"):
            for member in members(path):
                member.read()


def test_a_tar_with_a_broken_header_in_the_middle_is_not_taken_for_a_short_one(tmp_path):
    path = write_tar(tmp_path / "good.tar", GOOD)
    content = bytearray(path.read_bytes())
    where = content.index(b"test/cat/2.png")
    content[where] ^= 1  # its checksum is wrong now
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read, after"):
        list(members(path))


def test_what_is_no_archive_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no archive"):
        list(members(tmp_path / "none.tar"))
    (tmp_path / "x.rar").write_bytes(b"x")
    with pytest.raises(ValueError, match="is not an archive; known are"):
        list(members(tmp_path / "x.rar"))
    with pytest.raises(ValueError, match="is neither a folder nor an archive"):
        open_dataset("folder", tmp_path / "x.rar")
    write_tar(tmp_path / "x.tar", GOOD)
    with pytest.raises(ValueError, match="open_dataset"):
        ImageFolder(tmp_path / "x.tar")


# --- trees of images ----------------------------------------------------------------------------------------------


def decoded(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize("kind", [".tar.xz", ".zip", "folder"])
@pytest.mark.parametrize("around", ["", "images/"])
def test_trees_are_sorted_and_split(tmp_path, kind, around):
    files = {around + name: content for name, content in GOOD.items()}
    extra = {around + "README.md": b"about", around + "train/cat/._0.png": b"?", "__MACOSX/train/cat/0.png": b"?"}
    if kind == "folder":
        source = tmp_path / "tree"
        for name, content in {**files, **extra, around + "train/cat/notes.txt": b"mine"}.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
    else:
        source = (write_zip if kind == ".zip" else write_tar)(tmp_path / f"tree{kind}", {**extra, **files})
    for train, split in ((True, "train"), (False, "test")):
        data = open_dataset("folder", source, train)
        names = sorted(name for name in files if f"{split}/" in name)
        assert data.paths == names and data.classes == ["ant", "cat"] and data.labels.tolist() == [0] * 3 + [1] * 3
        np.testing.assert_array_equal(data.images, [decoded(files[name]) for name in names])
        images, labels = data.batch([4, 1])
        np.testing.assert_allclose(images, data.images[[4, 1]].transpose(0, 3, 1, 2) / 255, rtol=2e-7)
        assert labels.tolist() == [1, 0]
    assert data.mean is None
    mean, std = data.statistics()
    np.testing.assert_allclose(mean, (data.images / 255).mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(std, (data.images / 255).std((0, 1, 2)), atol=1e-6)


def test_trees_without_a_split_are_for_training(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"cat/deep/0.png": png(0), "ant/0.png": png(1)})
    assert open_dataset("folder", path).classes == ["ant", "cat"]
    with pytest.raises(ValueError, match="has no test/CLASS/ or val/CLASS/; it has train/ only"):
        open_dataset("folder", path, train=False)


def test_val_stands_in_for_test(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"Train/cat/0.png": png(0), "validation/cat/1.png": png(1)})
    assert open_dataset("folder", path, train=False).paths == ["validation/cat/1.png"]


def test_images_are_resized_when_asked(tmp_path):
    path = write_tar(
        tmp_path / "x.tar", {"a/0.png": png(0, (12, 8)), "b/1.png": png(1, (8, 10)), "b/2.png": png(2, (4, 4))}
    )
    with pytest.raises(ValueError, match=r"'b/1.png' is 8x10, but 'a/0.png' is 12x8; give image_size"):
        open_dataset("folder", path)
    data = open_dataset("folder", path, image_size=4)
    assert data.images.shape == (3, 4, 4, 3)
    by_hand = Image.fromarray(decoded(png(0, (12, 8)))).resize((4, 6), Image.Resampling.BILINEAR).crop((0, 1, 4, 5))
    np.testing.assert_array_equal(data.images[0], np.asarray(by_hand))
    np.testing.assert_array_equal(data.images[2], decoded(png(2, (4, 4))))
    assert open_dataset("folder", path, image_size=4, mode="L").images.shape == (3, 4, 4, 1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "damaged or not|has no images in class folders"),
        ({"README": b"x"}, "has no images in class folders"),
        ({"0.png": png()}, "the image '0.png' is in no class folder"),
        ({"train/0.png": png(), "train/a/0.png": png()}, "'train/0.png' is in no class folder"),
        ({"a/0.png": png(), "a/b.csv": b"x"}, "'a/b.csv' is not an image"),
        ({"a/0.png": b"not a png", "b/0.png": png()}, r"cannot read the image '.*a/0.png': it is not in a known"),
        ({"a/0.png": png()[:60], "b/0.png": png()}, r"cannot read the image '.*a/0.png'"),
        ({"train/a/0.png": png(), "test/b/0.png": png()}, r"'b' is a class of test/ only \('test/b/0.png'\)"),
    ],
)
def test_wrong_trees_are_refused(tmp_path, cache, files, message):
    path = write_tar(tmp_path / "x.tar", files)
    with pytest.raises(ValueError, match=message) as caught:
        open_dataset("folder", path)
    assert "\n" not in str(caught.value)
    assert not list(cache.iterdir())  # nothing half-made


def test_a_file_twice_in_an_archive_is_refused(tmp_path):
    twice = tar_bytes({"a/0.png": png(0)}).rstrip(b"\0")
    twice += bytes(-len(twice) % 512)
    (tmp_path / "x.tar").write_bytes(twice + tar_bytes({"a/0.png": png(1)}))
    with pytest.raises(ValueError, match=r"'a/0.png' is in the archive twice"):
        open_dataset("folder", tmp_path / "x.tar")


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder or archive"):
        open_dataset("folder", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="needs data_dir"):
        open_dataset("folder")
    for name in ("train/a", "train/b"):
        (tmp_path / "x" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="has no images in class folders"):
        open_dataset("folder", tmp_path / "x")
    (tmp_path / "x/train/a/0.png").write_bytes(png())
    with pytest.raises(ValueError, match=r"no images in the class folder '.*x/train/b'"):
        open_dataset("folder", tmp_path / "x")


def test_a_changed_folder_is_decoded_anew(tmp_path, cache):
    (tmp_path / "x" / "a").mkdir(parents=True)
    file = tmp_path / "x/a/0.bmp"
    before, after = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 9, np.uint8)
    Image.fromarray(before).save(file)
    np.testing.assert_array_equal(open_dataset("folder", tmp_path / "x").images[0], before)
    Image.fromarray(after).save(file)  # of the same size
    np.testing.assert_array_equal(open_dataset("folder", tmp_path / "x").images[0], after)
    open_dataset("folder", tmp_path / "x")
    assert len(list(cache.iterdir())) == 2


# --- single images ------------------------------------------------------------------------------------------------


def test_images_have_a_limit_of_pixels(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (9000, 9000)).save(path)  # 81 million pixels in a few kilobytes, below Pillow's own limit
    assert path.stat().st_size < 50_000
    with pytest.raises(ValueError, match=r"bomb.png': 9000x9000 pixels are more than 50000000"):
        open_image(path)
    Image.new("1", (10_000, 10_000)).save(path)  # of these Pillow warns
    with pytest.raises(ValueError, match=r"cannot read the image '.*bomb.png'"):
        open_image(path)
    monkeypatch.setattr(decode, "LARGEST_IMAGE", 30)
    with pytest.raises(ValueError, match="'x': 5x7 pixels are more than 30"):
        open_image(png(0, (7, 5)), "x")
    assert open_image(png(0, (6, 5)), "x").size == (5, 6)


def test_narrow_images_are_not_blown_up(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a/0.png": png(0, (1, 40_000))})
    with pytest.raises(ValueError, match=r"'a/0.png': an image of 40000x1 is too narrow to be resized to 64x64"):
        open_dataset("folder", path, image_size=64)


def test_only_formats_of_pictures_are_opened(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "EPS")  # Pillow would hand it to another program
    with pytest.raises(ValueError, match="it is not in a known image format"):
        open_image(stream.getvalue(), "x.jpg")
    for suffix, kind in (("jpg", "JPEG"), ("webp", "WEBP"), ("tif", "TIFF"), ("ppm", "PPM"), ("bmp", "BMP")):
        Image.new("RGB", (8, 7), (9, 9, 9)).save(tmp_path / f"x.{suffix}", kind)
        assert open_image(tmp_path / f"x.{suffix}").size == (8, 7)
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "none.png")


def test_jpeg_cut_anywhere_is_refused():
    stream = io.BytesIO()
    Image.fromarray(decoded(png(0, (32, 32)))).save(stream, "JPEG")
    content = stream.getvalue()
    for end in range(0, len(content) - 2, 37):  # without the last two, the end marker, decoders see a whole image
        with pytest.raises(ValueError, match=r"cannot read the image 'x.jpg'"):
            open_image(content[:end], "x.jpg")
