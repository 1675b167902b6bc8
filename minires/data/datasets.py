"""Where images come from: the digits that scikit-learn brings along, and folders of image files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .archive import is_archive
from .dataset import ArrayDataset, Dataset
from .decode import IMAGE_SUFFIXES, open_image


def digits(image_size: int = 8) -> tuple[ArrayDataset, ArrayDataset]:
    """(train, test) of 1,797 handwritten digits: images (1, S, S) float32 in [0, 1], S = image_size; int64 labels.

    The images are 8x8 (ink 0 to 16), resized bilinearly. The split is fixed: sorted by label, in scikit-learn's order
    within a label, every fifth image is held out: 1,437 and 360 images, every label with its share to within one.

    Source: Alpaydin & Kaynak 1998, "Optical Recognition of Handwritten Digits" (UCI), the part that scikit-learn
    bundles. Raises RuntimeError saying what to install where scikit-learn is missing.
    """
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise RuntimeError("the data set 'digits' needs scikit-learn: pip install 'minires[demo]'") from None
    if image_size < 1:
        raise ValueError(f"digits: image_size={image_size} must be at least 1")
    bunch: Any = load_digits()
    labels = bunch.target.astype(np.int64)
    pixels = [Image.fromarray((image / 16).astype(np.float32)) for image in bunch.images]
    size, mode = (image_size, image_size), Image.Resampling.BILINEAR
    images = np.stack([np.asarray(image.resize(size, mode)) for image in pixels])[:, None]
    by_label = np.argsort(labels, kind="stable")
    test = by_label[::5]
    train = np.setdiff1d(by_label, test)
    return ArrayDataset(images[train], labels[train]), ArrayDataset(images[test], labels[test])


class ImageFolder(Dataset):
    """Images in one folder per class: `root/CLASS/.../name.png`. Sample i is (transform(image), class index).

    classes: the folders' names, sorted. class_to_idx: their indices. samples: (path, index) in sorted order. Images are
    opened as RGB, each time anew (`open_dataset("folder", ...)` decodes once, also from archives). Raises
    FileNotFoundError where `root` is missing and ValueError where it has no class folders, or a class has no images
    (they end in one of IMAGE_SUFFIXES).
    """

    def __init__(self, root: str | Path, transform: Callable[[Any], Any] | None = None):
        self.root, self.transform = Path(root), transform
        if self.root.is_file() and is_archive(self.root):
            raise ValueError(
                f"ImageFolder reads folders; open the archive {str(root)!r} with open_dataset('folder', ...)"
            )
        if not self.root.is_dir():
            raise FileNotFoundError(f"ImageFolder: there is no folder {str(root)!r}")
        self.classes = sorted(entry.name for entry in self.root.iterdir() if entry.is_dir() and entry.name[0] != ".")
        if not self.classes:
            raise ValueError(f"ImageFolder: {str(root)!r} has no folders; put the images of each class into one")
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        self.samples = [(str(path), i) for i, name in enumerate(self.classes) for path in _images(self.root / name)]
        self.targets = [index for _, index in self.samples]
        if empty := sorted(set(range(len(self.classes))) - set(self.targets)):
            folder = str(self.root / self.classes[empty[0]])
            raise ValueError(f"ImageFolder: no images in {folder!r}; they must end in {', '.join(IMAGE_SUFFIXES)}")

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        image = open_image(path)
        return (image if self.transform is None else self.transform(image)), label

    def __len__(self) -> int:
        return len(self.samples)


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
