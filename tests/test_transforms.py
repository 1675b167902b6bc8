"""Augmentation: of whole batches against one image at a time, and the random transforms of PIL images."""

import colorsys

import numpy as np
import pytest
from PIL import Image

from minires.data import transforms as T
from minires.data.randomness import keyed, keyed_batch, uniforms
from minires.engine import Tensor

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def images(n, h, w, c=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, c), dtype=np.uint8)


def picture(h, w, seed=0):
    return Image.fromarray(images(1, h, w, seed=seed)[0])


# --- whole batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_augment_without_arguments_is_to_tensor(channels):
    x = images(5, 6, 7, channels)
    y = T.Augment()(x)
    assert y.dtype == np.float32 and y.shape == (5, channels, 6, 7)
    assert y.transpose(0, 2, 3, 1).flags.c_contiguous
    np.testing.assert_allclose(y, x.transpose(0, 3, 1, 2) / 255, rtol=2e-7)
    np.testing.assert_array_equal(T.Augment(np.zeros(channels))(x), y)


def test_augment_normalises_as_normalize():
    x = images(4, 6, 7)
    expected = T.Normalize(MEAN, STD)(x.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    np.testing.assert_allclose(T.Augment(MEAN, STD)(x), expected, rtol=1e-5, atol=1e-6)
    per_pixel = np.random.default_rng(1).random((6, 7, 3))
    expected = ((x / 255 - per_pixel) / STD).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(T.Augment(per_pixel, STD)(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fill", ["black", "mean"])
@pytest.mark.parametrize("size", [(6, 7), (5, 5)])
def test_augment_is_what_it_says_image_by_image(fill, size):
    (h, w), n = size, 600
    x = images(n, h, w)
    with keyed_batch(3, 1, 0, np.arange(n)):
        y = T.Augment(MEAN, STD, padding=2, fill=fill, flip=True, cutout=3)(x)
    with keyed_batch(3, 1, 0, np.arange(n)):
        u = uniforms(n, 5)
    normal = (x / 255 - MEAN) / STD
    border = -np.array(MEAN) / STD if fill == "black" else np.zeros(3)
    seen = set()
    for i in range(n):
        padded = np.broadcast_to(border, (h + 4, w + 4, 3)).copy()
        padded[2:-2, 2:-2] = normal[i]
        top, left, flip = int(u[i, 0] * 5), int(u[i, 1] * 5), u[i, 2] < 0.5
        expected = padded[top : top + h, left : left + w]
        expected = expected[:, ::-1].copy() if flip else expected.copy()
        row, column = int(u[i, 3] * h), int(u[i, 4] * w)
        expected[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = 0
        np.testing.assert_allclose(y[i], expected.transpose(2, 0, 1), rtol=1e-5, atol=2e-6)
        seen |= {("place", top, left), ("flip", bool(flip)), ("cut", row, column)}
    assert len(seen) == 25 + 2 + h * w  # all places, both ways, all centres


def test_augment_leaves_its_input_alone():
    x = images(3, 5, 5)
    before = x.copy()
    x.flags.writeable = False  # as the cache's are
    T.Augment(MEAN, STD, padding=1, flip=True, cutout=2)(x)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize(
    "bad",
    [
        {"std": 0.0},
        {"mean": np.zeros((2, 2))},
        {"padding": -1},
        {"cutout": -1},
        {"fill": "white"},
        {"mean": np.zeros((4, 4, 3)), "padding": 2},
    ],
    ids=str,
)
def test_augment_refuses(bad):
    with pytest.raises(ValueError, match="Augment: "):
        T.Augment(**bad)


def test_augment_refuses_images():
    with pytest.raises(TypeError, match="uint8 images"):
        T.Augment()(np.zeros((1, 2, 2, 3), np.float32))
    with pytest.raises(ValueError, match="do not fit images"):
        T.Augment(MEAN, STD)(images(1, 4, 4, 1))
    with pytest.raises(ValueError, match="do not fit images"):
        T.Augment(np.zeros((5, 4, 3)))(images(1, 4, 4))


# --- mixing -------------------------------------------------------------------------------------------------------


def mixed(mix, n=8, k=5, key=0):
    x = np.random.default_rng(0).random((n, 6, 7, 3)).astype(np.float32).transpose(0, 3, 1, 2)
    labels = np.arange(n) % k
    with keyed(key):
        y, targets = mix(Tensor(x), Tensor(labels))
    return x, labels, y.array, targets.array


def test_mixup():
    shares = []
    for key in range(20):
        x, labels, y, targets = mixed(T.MixUp(5, alpha=1.0), key=key)
        assert y.dtype == targets.dtype == np.float32 and targets.shape == (8, 5)
        assert y.transpose(0, 2, 3, 1).flags.c_contiguous
        found = []
        for i in range(8):
            if np.allclose(y[i], x[i], atol=1e-6):  # its own partner
                np.testing.assert_allclose(targets[i], np.eye(5)[labels[i]], atol=1e-5)
                continue
            for j in set(range(8)) - {i}:
                d = (x[i] - x[j]).ravel()
                share = float(d @ (y[i] - x[j]).ravel() / (d @ d))  # the best for this pair, by least squares
                if np.allclose(y[i], share * x[i] + (1 - share) * x[j], atol=1e-6):
                    expected = share * np.eye(5)[labels[i]] + (1 - share) * np.eye(5)[labels[j]]
                    np.testing.assert_allclose(targets[i], expected, atol=1e-5)
                    found.append(share)
                    break
            else:
                raise AssertionError(f"image {i} is no mixture")
        np.testing.assert_allclose(found, found[0], atol=1e-4)  # one share for the whole batch
        shares.append(found[0])
    assert min(shares) < 0.3 and max(shares) > 0.7


def test_cutmix():
    areas = set()
    for key in range(20):
        x, labels, y, targets = mixed(T.CutMix(5), key=key)
        same = (y == x).all(1)  # (N, H, W)
        for i in range(8):
            partners = [j for j in range(8) if (y[i][:, ~same[i]] == x[j][:, ~same[i]]).all()]
            area = (~same[i]).mean()
            if i in partners:  # nothing changed: its own partner, or an empty box
                np.testing.assert_allclose(targets[i], np.eye(5)[labels[i]], atol=1e-6)
                continue
            (j,) = partners
            expected = np.zeros(5)
            expected[labels[i]] += 1 - area
            expected[labels[j]] += area
            np.testing.assert_allclose(targets[i], expected, atol=1e-6)
            rows, columns = np.nonzero(~same[i])
            assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # a full box
            areas.add(round(float(area), 4))
    assert len(areas) > 8


def test_mixing_sometimes():
    unchanged = 0
    for key in range(100):
        x, labels, y, targets = mixed(T.MixUp(5, p=0.3), key=key)
        if np.array_equal(x, y):
            unchanged += 1
            np.testing.assert_array_equal(targets, np.eye(5)[labels])
    assert 52 < unchanged < 88  # 70 expected, standard deviation 4.6


def test_mixing_refuses():
    for bad in ({"num_classes": 1}, {"num_classes": 2, "alpha": 0.0}, {"num_classes": 2, "p": 1.5}):
        with pytest.raises(ValueError, match="MixUp: "):
            T.MixUp(**bad)
    x = Tensor(np.zeros((2, 1, 4, 4), np.float32))
    with pytest.raises(ValueError, match="do not fit num_classes=2"):
        T.MixUp(2)(x, Tensor(np.array([0, 2])))
    with pytest.raises(ValueError, match="int labels"):
        T.CutMix(2)(x, Tensor(np.array([0.0, 1.0])))


# --- PIL images ---------------------------------------------------------------------------------------------------


def test_random_resized_crop_stays_in_its_ranges():
    image = picture(40, 60)
    crop = T.RandomResizedCrop((7, 9), scale=(0.2, 0.5), ratio=(0.5, 2.0))
    shares, ratios = [], []
    for key in range(300):
        with keyed(key):
            left, top, w, h = crop._part(60, 40)
        assert 0 <= left <= left + w <= 60 and 0 <= top <= top + h <= 40
        shares.append(w * h / 2400)
        ratios.append(w / h)
    assert 0.18 < min(shares) < 0.25 and 0.45 < max(shares) < 0.52
    assert 0.47 < min(ratios) < 0.6 and 1.7 < max(ratios) < 2.1
    with keyed(3):
        left, top, w, h = crop._part(60, 40)
    with keyed(3):
        result = crop(image)
    assert result.size == (9, 7)
    by_hand = image.crop((left, top, left + w, top + h)).resize((9, 7), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(np.asarray(result), np.asarray(by_hand))


@pytest.mark.parametrize(("width", "height", "part"), [(100, 4, (47, 0, 5, 4)), (4, 100, (0, 47, 4, 5))])
def test_random_resized_crop_falls_back_to_the_middle(width, height, part):
    with keyed(0):
        assert T.RandomResizedCrop(8, scale=(1.0, 1.0))._part(width, height) == part


@pytest.mark.parametrize(("name", "kind"), [("brightness", 0), ("contrast", 1), ("saturation", 2)])
def test_colour_jitter_blends_with_its_degenerate(name, kind):
    image = picture(6, 7)
    pixels = np.asarray(image).astype(float)
    grey = np.asarray(image.convert("L")).astype(float)
    with keyed(2):
        result = np.asarray(T.ColorJitter(**{name: (0.5, 0.5)})(image)).astype(float)
    base = [np.zeros_like(pixels), np.full_like(pixels, int(grey.mean() + 0.5)), grey[..., None]][kind]
    assert np.abs(result - (pixels + base) / 2).max() <= 1


def test_hue_turns_the_colour_circle():
    image = Image.fromarray(np.array([[[200, 40, 40], [40, 180, 90], [128, 128, 128]]], np.uint8))
    with keyed(0):
        result = np.asarray(T.ColorJitter(hue=(0.25, 0.25))(image))
    for before, after in zip(np.asarray(image)[0], result[0], strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before / 255)
        np.testing.assert_allclose(after / 255, colorsys.hsv_to_rgb((h + 0.25) % 1, s, v), atol=0.04)
    grey = image.convert("L")
    assert T.ColorJitter(hue=0.5)(grey) is grey and T.ColorJitter()(image) is image


def test_random_erasing_and_cutout():
    x = np.ones((3, 20, 30), np.float32)
    erased = 0
    for key in range(200):
        with keyed(key):
            y = T.RandomErasing(0.5, (0.1, 0.2), (0.5, 2.0), value=-1.0)(x)
        if y is x:
            continue
        erased += 1
        rows, columns = np.nonzero(y[0] == -1)
        h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert (y == -1).sum() == 3 * h * w and 0.08 < h * w / 600 < 0.22 and 0.45 < h / w < 2.2
        assert (x == 1).all()
    assert 70 < erased < 130  # 100 expected, standard deviation 7
    assert T.RandomErasing(1.0, (1.0, 1.0))(x) is x  # does not fit

    sizes = set()
    for key in range(200):
        with keyed(key):
            z = T.Cutout(6)(Tensor(x.transpose(1, 2, 0).copy().transpose(2, 0, 1)))
        assert z.array.transpose(1, 2, 0).flags.c_contiguous
        sizes.add(int((z.array[0] == 0).sum()))
    assert max(sizes) == 36 and min(sizes) in (9, 12, 15) and len(sizes) > 5  # clipped at the border


@pytest.mark.parametrize(
    "make",
    [
        lambda: T.RandomResizedCrop(8, scale=(0.0, 1.0)),
        lambda: T.RandomResizedCrop(8, ratio=(2.0, 1.0)),
        lambda: T.RandomResizedCrop(8, interpolation="best"),
        lambda: T.ColorJitter(brightness=-0.1),
        lambda: T.ColorJitter(hue=0.6),
        lambda: T.ColorJitter(contrast=(0.5, 0.1)),
        lambda: T.RandomErasing(2.0),
        lambda: T.Cutout(0),
    ],
)
def test_transforms_refuse(make):
    with pytest.raises(ValueError, match="must be"):
        make()


@pytest.mark.parametrize("transform", [T.RandomErasing(1.0), T.Cutout(2)])
def test_transforms_of_tensors_refuse_pictures(transform):
    with pytest.raises(TypeError, match="put it after ToTensor"):
        transform(picture(4, 4))
