"""Folders of images without a split: which of them are test images."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from minires.data import open_dataset
from minires.data.decode import open_image
from minires.train import load_recipe
from minires.train.images import open_images, open_test


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MINIRES_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def photos(tmp_path):
    """Classes of 20, 3 and 1 images; every image has a colour of its own."""
    number = 0
    for name, count in (("cat", 20), ("dog", 3), ("owl", 1)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(count):
            number += 1
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def parts(folder, share):
    return [open_dataset("folder", folder, train, hold_out=share) for train in (True, False)]


def test_a_share_of_each_class_is_held_out(photos):
    train, test = parts(photos, 0.2)
    assert train.classes == test.classes == ["cat", "dog", "owl"]
    assert np.bincount(train.labels).tolist() == [16, 2, 1]
    assert np.bincount(test.labels, minlength=3).tolist() == [4, 1, 0]
    colours = [set(data.images[:, 0, 0, 0].tolist()) for data in (train, test)]
    assert colours[0] | colours[1] == set(range(1, 25)) and not colours[0] & colours[1]
    for data in (train, test):
        for path, image in zip(data.paths or [], data.images, strict=True):
            with Image.open(photos / path) as file:
                assert file.getpixel((0, 0)) == (int(image[0, 0, 0]), 0, 0)


def test_which_ones_does_not_change_with_other_files(photos):
    """Names decide: an image that comes later moves few others."""
    before = set(parts(photos, 0.2)[1].paths or [])
    Image.new("RGB", (8, 8)).save(photos / "cat" / "new.png")
    after = set(parts(photos, 0.2)[1].paths or [])
    assert len(before - after) <= 1


def test_without_a_share_and_with_all_of_it(photos):
    assert len(open_dataset("folder", photos)) == 24
    with pytest.raises(ValueError, match="has no test/CLASS/"):
        open_dataset("folder", photos, train=False)
    assert len(open_dataset("folder", photos, train=False, hold_out=1.0)) == 24


def test_a_split_stays_as_it_is(photos, tmp_path):
    with tarfile.open(tmp_path / "split.tar", "w") as tar:
        for path in [*sorted(photos.glob("cat/*.png")), *sorted(photos.glob("dog/*.png"))]:
            tar.add(path, f"{'test' if path.stem == '0' else 'train'}/{path.parent.name}/{path.name}")
    for share in (0.0, 0.2, 1.0):
        assert [len(data) for data in parts(tmp_path / "split.tar", share)] == [21, 2]


def test_training_and_evaluation_take_them(photos):
    scale = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    recipe = load_recipe("digits", {"dataset": str(photos), "image_size": 8, **scale})
    images = open_images(recipe)
    assert (len(images.train), len(images.test)) == (19, 5)
    assert len(open_test(recipe)) == 24
    batch, _ = open_test(recipe, 12).batch([0])  # resized to 12, the middle 8 of it
    assert batch.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("array", [np.full((8, 8), 40_000, np.uint16), np.full((8, 8), 0.5, np.float32)])
def test_more_than_8_bits_are_refused(tmp_path, array):
    """Pillow would cut off what is above 255: a photo of 16 bits would be white."""
    Image.fromarray(array).save(tmp_path / "deep.tiff")
    with pytest.raises(ValueError, match=r"deep\.tiff.* more than 8 bits per channel; save it with 8"):
        open_image(tmp_path / "deep.tiff")
