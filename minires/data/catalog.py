"""`open_dataset`: every data set that minires knows, by its name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .cache import cache_folder
from .cifar import CIFAR10, CIFAR100, Cifar, open_cifar
from .datasets import digits
from .download import download as fetch
from .folder import open_tree
from .idx import FASHION_MNIST, MNIST, Idx, open_idx
from .images import ImageDataset

DATASETS = ("digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "folder")
_CIFAR = {kind.name: kind for kind in (CIFAR10, CIFAR100)}
_IDX = {kind.name: kind for kind in (MNIST, FASHION_MNIST)}


def open_dataset(
    name: str,
    data_dir: str | Path | None = None,
    train: bool = True,
    *,
    image_size: int | None = None,
    download: bool = False,
    mode: str = "RGB",
    hold_out: float = 0.0,
    transform: Callable[[np.ndarray], Any] | None = None,
) -> ImageDataset:
    """The training (or test) images of a data set: an `ImageDataset` with images, labels, classes, mean and std.

    name: "digits" (bundled with scikit-learn), "cifar10", "cifar100", "mnist", "fashion_mnist", or "folder": any images
    as train/CLASS/*.jpg and test/CLASS/*.jpg (or val/). data_dir: where the files are: the folder that holds them, or
    the archive itself ("folder": .tar, .tar.gz, .tar.xz, .tar.bz2 or .zip); by default minires' own folder of
    downloads. download: fetch what is missing into data_dir. image_size: height and width that images are resized to
    (shorter side, then the middle); None: as they are (digits: 8). mode: "RGB" or "L", of a folder. hold_out: the share
    of images that are test images in a folder without a split (CLASS/*.jpg). transform: as `ImageDataset` takes it.

    Images are decoded once, into a memory-mapped cache ($MINIRES_CACHE/data, else in the user's cache folder).
    Raises ValueError, FileNotFoundError, RuntimeError or OSError in one line: what is wrong and what to do.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(str(name).lower().replace("-", "_"), DATASETS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(DATASETS)}"
        raise ValueError(f"unknown data set {name!r}; {hint}")
    if image_size is not None and not 1 <= image_size <= 4096:
        raise ValueError(f"image_size={image_size} must be from 1 to 4096")
    if mode not in ("RGB", "L"):
        raise ValueError(f"mode={mode!r} must be 'RGB' or 'L'")
    where = None if data_dir is None else Path(data_dir).expanduser()
    if name == "digits":
        return _digits(train, image_size or 8, transform)
    if name == "folder":
        return _folder(where, train, image_size, mode, hold_out, transform)
    split = "train" if train else "test"
    if kind := _CIFAR.get(name):
        entry = open_cifar(kind, _find_cifar(kind, where, download), image_size)
    else:
        kind = _IDX[name]
        entry = open_idx(kind, _find_idx(kind, where, download), image_size)
    return ImageDataset.from_cache(entry, split, name=name, mean=kind.mean, std=kind.std, transform=transform)


def _digits(train: bool, size: int, transform: Any) -> ImageDataset:
    images, labels = digits(size)[0 if train else 1].arrays
    pixels = np.round(images * 255).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return ImageDataset(pixels, labels, tuple("0123456789"), name="digits", transform=transform)


def _folder(
    where: Path | None, train: bool, size: int | None, mode: str, hold_out: float, transform: Any
) -> ImageDataset:
    if where is None:
        raise ValueError("the data set 'folder' needs data_dir (--data-dir): a folder or an archive of images")
    if not where.exists():
        raise FileNotFoundError(f"there is no folder or archive {str(where)!r}; give another data_dir (--data-dir)")
    entry = open_tree(where, size, mode, hold_out)
    split = "train" if train else "test" if "test" in entry.splits else "val"
    if split not in entry.splits:
        wanted = "train/CLASS/" if train else "test/CLASS/ or val/CLASS/"
        raise ValueError(f"{str(where)!r} has no {wanted}; it has {', '.join(f'{s}/' for s in entry.splits)} only")
    return ImageDataset.from_cache(entry, split, name=where.name, transform=transform)


def _find_cifar(kind: Cifar, where: Path | None, download: bool) -> Path:
    """The archive, or the folder that it was unpacked to."""
    folder = where or cache_folder("downloads")
    if folder.is_file():
        return folder
    for candidate in (folder / kind.archive, folder / kind.folder, folder):
        if candidate.is_file() or (candidate / kind.names).is_file():
            return candidate
    if download:
        return fetch(kind.url, kind.sha256, folder / kind.archive)
    pickled = kind.archive.replace("binary", "python")
    other = f" ({pickled!r} is there, but it is a pickle)" if (folder / pickled).exists() else ""
    raise _missing(kind.name, folder, f"{kind.archive!r}", other)


def _find_idx(kind: Idx, where: Path | None, download: bool) -> dict[tuple[str, str], Path]:
    folder = where or cache_folder("downloads") / kind.name
    found = {}
    for key, (name, sha256) in kind.files.items():
        plain = name.removesuffix(".gz")
        names = (name, plain, plain.replace("-idx", ".idx"))  # the last as some mirrors have it
        paths = [base / n for base in (folder, folder / kind.name, folder / "raw") for n in names]
        path = next((p for p in paths if p.is_file()), None)
        if path is None and download:
            path = fetch(kind.url + name, sha256, folder / name)
        if path is None:
            raise _missing(kind.name, folder, f"{name!r}")
        found[key] = path
    return found


def _missing(name: str, folder: Path, what: str, other: str = "") -> FileNotFoundError:
    state = "has no" if folder.is_dir() else "does not exist; it should hold"
    return FileNotFoundError(
        f"{name}: {str(folder)!r} {state} {what}{other}; give the folder that has it (--data-dir), or download it "
        "(download=True, --download)"
    )
