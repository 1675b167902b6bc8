"""Data sets, transforms and the loader that makes batches of them."""

from . import datasets, transforms
from .collate import default_collate
from .dataset import ArrayDataset, Dataset, Subset, TensorDataset
from .images import ImageDataset
from .loader import DataLoader

__all__ = [
    "ArrayDataset",
    "DataLoader",
    "Dataset",
    "ImageDataset",
    "Subset",
    "TensorDataset",
    "datasets",
    "default_collate",
    "transforms",
]
