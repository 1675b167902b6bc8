"""Data sets, transforms and the loader that makes batches of them.

train = open_dataset("cifar10", "folder/of/downloads", train=True, download=True)
train = train.with_transform(transforms.Augment(train.mean, train.std, padding=4, flip=True))
loader = DataLoader(train, 128, shuffle=True, drop_last=True, generator=seed, batch_transform=transforms.MixUp(10))
for images, targets in loader.iterate(epoch, start=batch):  # goes on in the middle of an epoch, bit for bit
    ...
"""

from . import datasets, transforms
from .catalog import DATASETS, open_dataset
from .collate import default_collate
from .dataset import ArrayDataset, Dataset, Subset, TensorDataset
from .images import ImageDataset
from .loader import DataLoader

__all__ = [
    "DATASETS",
    "ArrayDataset",
    "DataLoader",
    "Dataset",
    "ImageDataset",
    "Subset",
    "TensorDataset",
    "datasets",
    "default_collate",
    "open_dataset",
    "transforms",
]
