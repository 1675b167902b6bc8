"""Data sets, transforms, and the loader: what a batch holds depends on (seed, epoch, index) and nothing else."""

import pickle
import threading

import numpy as np
import pytest
from PIL import Image

from minires.data import ArrayDataset, DataLoader, Dataset, Subset, TensorDataset, datasets, default_collate
from minires.data import transforms as T
from minires.data.randomness import generator, keyed
from minires.engine import Tensor


def picture(height: int, width: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Three classes of 4 images each, written in an order that is not the sorted one."""
    for c, name in enumerate(("dog", "cat", "ant")):
        (tmp_path / name / "deep").mkdir(parents=True)
        for i in (3, 1, 2):
            picture(9 + i, 12, seed=10 * c + i).save(tmp_path / name / f"{i}.png")
        picture(9, 9, seed=10 * c).save(tmp_path / name / "deep" / "0.PNG")
        (tmp_path / name / "notes.txt").write_text("not an image")
    return tmp_path


# --- digits -------------------------------------------------------------------------------------------------------


def test_digits_split_is_fixed_stratified_and_whole():
    train, test = datasets.digits()
    assert (len(train), len(test)) == (1437, 360)
    assert train.arrays[0].shape == (1437, 1, 8, 8) and train.arrays[0].dtype == np.float32
    assert train.arrays[1].dtype == np.int64
    everywhere = np.bincount(train.arrays[1]) + np.bincount(test.arrays[1])
    assert np.abs(np.bincount(test.arrays[1]) - everywhere / 5).max() < 1

    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.concatenate([train.arrays[0], test.arrays[0]])[:, 0] * 16
    labels = np.concatenate([train.arrays[1], test.arrays[1]])
    ours = sorted((y, x.tobytes()) for x, y in zip(pixels.astype(np.uint8), labels, strict=True))
    theirs = sorted((y, x.tobytes()) for x, y in zip(bunch.images.astype(np.uint8), bunch.target, strict=True))
    assert ours == theirs  # every image is in exactly one part
    first_zeros = bunch.images[bunch.target == 0][::5]
    np.testing.assert_array_equal(test.arrays[0][:36, 0] * 16, first_zeros)


def test_digits_are_resized():
    train, _ = datasets.digits(16)
    assert train.arrays[0].shape == (1437, 1, 16, 16)
    small, _ = datasets.digits(8)
    np.testing.assert_allclose(train.arrays[0].mean((1, 2, 3)), small.arrays[0].mean((1, 2, 3)), atol=0.02)
    with pytest.raises(ValueError, match="image_size=0"):
        datasets.digits(0)


# --- data sets ----------------------------------------------------------------------------------------------------


def test_array_dataset_item_is_row_of_batch():
    images, labels = np.random.default_rng(0).normal(size=(5, 2, 3, 3)), np.arange(5)
    data = ArrayDataset(images, labels, transform=lambda x: 2 * x)
    batch = data.batch([3, 1])
    np.testing.assert_array_equal(batch[0], 2 * images[[3, 1]])
    np.testing.assert_array_equal(batch[1], [3, 1])
    np.testing.assert_array_equal(data[-2][0], 2 * images[3])
    assert len(list(data)) == len(data) == 5
    with pytest.raises(IndexError, match="index 5"):
        data[5]


@pytest.mark.parametrize("kind", [ArrayDataset, lambda *a: TensorDataset(*map(Tensor, a))])
def test_arrays_of_different_lengths_are_refused(kind):
    with pytest.raises(ValueError, match="one length"):
        kind(np.zeros((3, 2)), np.zeros(4))


def test_tensor_dataset_and_subset():
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    data = Subset(TensorDataset(Tensor(x), Tensor(y)), [5, 0, 3])
    assert len(data) == 3
    assert data[0][0].array.tolist() == [10, 11] and data[0][1].array == 5
    (images, labels), *rest = DataLoader(data, batch_size=2)
    np.testing.assert_array_equal(images.array, x[[5, 0]])
    np.testing.assert_array_equal(labels.array, [5, 0])
    assert len(rest) == 1
    with pytest.raises(ValueError, match="do not fit"):
        Subset(data, [3])
    assert not hasattr(Subset(Plain(), [0]), "batch")
    copy = pickle.loads(pickle.dumps(data))  # as a worker process gets it
    np.testing.assert_array_equal(copy.batch([1, 0])[1].array, [0, 5])


class Plain(Dataset):
    """Samples that show the random numbers which they were made with."""

    def __init__(self, n=10):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return np.array([index, generator().random()]), index


def test_dataset_must_be_defined():
    with pytest.raises(NotImplementedError, match="__getitem__"):
        Dataset()[0]
    with pytest.raises(NotImplementedError, match="__len__"):
        len(Dataset())


def test_image_folder(folder):
    data = datasets.ImageFolder(folder)
    assert data.classes == ["ant", "cat", "dog"] and data.class_to_idx == {"ant": 0, "cat": 1, "dog": 2}
    assert [(path.removeprefix(str(folder)), i) for path, i in data.samples[:5]] == [
        ("/ant/1.png", 0),
        ("/ant/2.png", 0),
        ("/ant/3.png", 0),
        ("/ant/deep/0.PNG", 0),
        ("/cat/1.png", 1),
    ]
    assert len(data) == 12 and data.targets == [0] * 4 + [1] * 4 + [2] * 4
    image, label = data[4]
    assert label == 1
    np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(10, 12, seed=11)))
    data = datasets.ImageFolder(folder, transform=T.Compose([T.Resize((6, 6)), T.ToTensor()]))
    images, labels = next(iter(DataLoader(data, batch_size=12)))
    assert images.shape == (12, 3, 6, 6) and labels.array.tolist() == data.targets


def test_image_folder_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder '.*nowhere'"):
        datasets.ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no folders"):
        datasets.ImageFolder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in '.*empty'"):
        datasets.ImageFolder(tmp_path)
    picture(8, 8).save(tmp_path / "whole.png")
    (tmp_path / "empty" / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot read the image '.*cut\.png'"):
        datasets.ImageFolder(tmp_path)[0]


# --- loader -------------------------------------------------------------------------------------------------------


def everything(loader):
    return [[field.array for field in batch] for batch in loader]


def test_batches_hold_every_sample_once():
    data = Plain(10)
    for drop_last, sizes in ((False, [4, 4, 2]), (True, [4, 4])):
        loader = DataLoader(data, 4, shuffle=True, drop_last=drop_last, generator=0)
        batches = everything(loader)
        assert [len(labels) for _, labels in batches] == sizes and len(loader) == len(sizes)
        seen = np.concatenate([labels for _, labels in batches])
        assert len(set(seen.tolist())) == len(seen)
    assert [labels.tolist() for _, labels in everything(DataLoader(data, 4))] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("make", [Plain, lambda: ArrayDataset(np.zeros((50, 1, 4, 4)), np.arange(50), transform=noisy)])
def test_content_depends_on_seed_and_epoch_alone(make):
    def epochs(seed, workers):
        loader = DataLoader(make(), 4, shuffle=True, num_workers=workers, generator=seed)
        return [np.concatenate([f.ravel() for batch in everything(loader) for f in batch]) for _ in range(2)]

    first, second = epochs(1, 0)
    for workers in (1, 3):
        np.testing.assert_array_equal(epochs(1, workers), [first, second])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, epochs(2, 0)[0])


def noisy(images):
    return images + generator().random(images.shape)


def test_epoch_can_be_set_to_repeat():
    loader = DataLoader(Plain(), 3, shuffle=True, generator=np.random.default_rng(3))
    first = everything(loader)
    everything(loader)
    loader.set_epoch(0)
    for a, b in zip(first, everything(loader), strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def test_default_seed_follows_manual_seed():
    from minires.random import manual_seed

    orders = []
    for seed in (1, 1, 2):
        manual_seed(seed)
        orders.append(DataLoader(Plain(100), shuffle=True).order(0).tolist())
    assert orders[0] == orders[1] != orders[2]


def test_worker_threads_end_when_the_loop_is_left():
    before = threading.active_count()
    for _ in DataLoader(Plain(100), 2, num_workers=3):
        break
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_a_data_set_reach_the_loop(workers):
    class Broken(Plain):
        def __getitem__(self, index):
            raise KeyError("sample 0 is broken")

    with pytest.raises(KeyError, match="broken"):
        list(DataLoader(Broken(), num_workers=workers))


@pytest.mark.parametrize(
    "arguments",
    [{"batch_size": 0}, {"num_workers": -1}, {"dataset": Plain(0), "shuffle": True}],
    ids=["batch_size", "num_workers", "nothing to shuffle"],
)
def test_loader_refuses(arguments):
    with pytest.raises(ValueError, match="DataLoader: "):
        DataLoader(**{"dataset": Plain(), **arguments})


def test_collate():
    batch = default_collate([{"x": (1, 2.5, "a"), "m": np.zeros(2)}, {"x": (3, 4.5, "b"), "m": np.ones(2)}])
    integers, floats, texts = batch["x"]
    assert integers.array.tolist() == [1, 3] and integers.dtype == np.int64
    assert floats.array.tolist() == [2.5, 4.5] and floats.dtype == np.float64
    assert texts == ["a", "b"] and batch["m"].array.tolist() == [[0, 0], [1, 1]]
    images = [T.ToTensor()(picture(5, 6, seed)) for seed in range(3)]
    stacked = default_collate(images).array
    np.testing.assert_array_equal(stacked, np.stack([image.array for image in images]))
    assert stacked.transpose(0, 2, 3, 1).flags.c_contiguous  # as the kernels read it: no copy
    with pytest.raises(ValueError, match="add Resize or a crop"):
        default_collate([np.zeros((3, 4, 4)), np.zeros((3, 4, 5))])
    with pytest.raises(TypeError, match=r"transforms\.ToTensor"):
        default_collate([picture(4, 4)])
    with pytest.raises(ValueError, match="as many fields"):
        default_collate([(1, 2), (1,)])
    assert DataLoader(Plain(4), 2, collate_fn=len).__iter__().__next__() == 2


# --- transforms ---------------------------------------------------------------------------------------------------


def test_to_tensor():
    image = picture(4, 5)
    y = T.ToTensor()(image)
    assert y.shape == (3, 4, 5) and y.dtype == np.float32
    np.testing.assert_array_equal(y.array, np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 255)
    assert T.ToTensor()(image.convert("L")).shape == (1, 4, 5)
    assert set(np.unique(T.ToTensor()(image.convert("1")).array)) <= {0, 1}
    assert T.ToTensor()(image.convert("P")).shape == (3, 4, 5)
    np.testing.assert_array_equal(T.ToTensor()(np.full((2, 2), 7.5)).array, np.full((1, 2, 2), 7.5))
    with pytest.raises(ValueError, match="ToTensor takes"):
        T.ToTensor()(np.zeros((1, 2, 3, 4)))


@pytest.mark.parametrize(("size", "expected"), [(6, (6, 8)), ((5, 7), (5, 7)), ([4], (4, 5)), (20, (20, 28))], ids=str)
def test_resize(size, expected):  # sizes as torchvision's: the longer side is cut off to a whole number
    image = picture(10, 14)
    assert T.Resize(size)(image).size == expected[::-1]
    assert T.Resize(size)(image.transpose(Image.Transpose.TRANSPOSE)).size == (
        expected if not isinstance(size, tuple) else size[::-1]
    )
    flat = Image.fromarray(np.full((10, 14), 77, np.uint8))
    assert np.unique(np.asarray(T.Resize(size)(flat))).tolist() == [77]


def test_center_crop():
    pixels = np.asarray(image := picture(9, 12))
    np.testing.assert_array_equal(np.asarray(T.CenterCrop((5, 4))(image)), pixels[2:7, 4:8])
    padded = np.asarray(T.CenterCrop(12)(image))
    np.testing.assert_array_equal(padded, np.pad(pixels, ((1, 2), (0, 0), (0, 0))))


def test_random_crop_takes_every_place_and_no_other():
    pixels = np.asarray(image := picture(5, 6))
    padded = np.pad(pixels, ((1, 1), (2, 2), (0, 0)))
    windows = {padded[i : i + 4, j : j + 4].tobytes(): (i, j) for i in range(4) for j in range(7)}
    crop, seen = T.RandomCrop(4, padding=(2, 1)), set()
    for i in range(400):
        with keyed(i):
            seen.add(windows[np.asarray(crop(image)).tobytes()])
    assert len(seen) == 28  # a place is missed with probability 28 * (27/28)**400 < 2e-5
    with pytest.raises(ValueError, match="crop of 8x8 does not fit an image of 5x6"):
        T.RandomCrop(8)(image)


def test_random_flip():
    pixels = np.asarray(image := picture(3, 4))
    kinds = {pixels.tobytes(): 0, pixels[:, ::-1].tobytes(): 1}
    with keyed(5):
        flips = [kinds[np.asarray(T.RandomHorizontalFlip(0.25)(image)).tobytes()] for _ in range(400)]
    assert 60 < sum(flips) < 140  # 100 expected, standard deviation 8.7
    assert T.RandomHorizontalFlip(0.0)(image) is image


def test_normalize():
    x = np.random.default_rng(0).random((2, 3, 4, 4)).astype(np.float32)
    normalize = T.Normalize((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    expected = np.stack([(x[:, c] - m) / s for c, (m, s) in enumerate(((0.1, 0.5), (0.2, 1.0), (0.3, 2.0)))], 1)
    np.testing.assert_allclose(normalize(x), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(normalize(Tensor(x[0])).array, normalize(x)[0])
    with pytest.raises(ValueError, match="3 means do not fit"):
        normalize(x[:, :2])
    with pytest.raises(ValueError, match="std="):
        T.Normalize(0.5, 0.0)


def test_random_shift_is_padding_and_cropping():
    x = np.random.default_rng(0).random((200, 2, 5, 4)).astype(np.float32)
    with keyed(1):
        y = T.RandomShift(2)(x)
    assert y.shape == x.shape and y.dtype == x.dtype and y.transpose(0, 2, 3, 1).flags.c_contiguous
    padded = np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2)))
    places = []
    for n in range(len(x)):
        fits = [(i, j) for i in range(5) for j in range(5) if np.array_equal(y[n], padded[n, :, i : i + 5, j : j + 4])]
        assert len(fits) == 1
        places += fits
    assert len(set(places)) == 25
    np.testing.assert_array_equal(T.RandomShift(0)(x), x)


def test_compose_and_lambda():
    transform = T.Compose([T.Lambda(lambda x: x + 1), T.Lambda(lambda x: 2 * x)])
    assert transform(3) == 8


@pytest.mark.parametrize("transform", [T.Resize(4), T.CenterCrop(4), T.RandomCrop(4), T.RandomHorizontalFlip()])
def test_transforms_of_pictures_refuse_tensors(transform):
    with pytest.raises(TypeError, match="put it before ToTensor"):
        transform(Tensor(np.zeros((3, 8, 8))))


@pytest.mark.parametrize(
    "make",
    [
        lambda: T.Resize(0),
        lambda: T.Resize(4, "best"),
        lambda: T.CenterCrop((1, 2, 3)),
        lambda: T.RandomCrop(4, padding=-1),
        lambda: T.RandomHorizontalFlip(2),
        lambda: T.RandomShift(-1),
    ],
)
def test_transforms_refuse(make):
    with pytest.raises(ValueError, match="must be"):
        make()
