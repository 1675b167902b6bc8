"""Data sets, transforms and the loader that makes batches of them."""

from . import datasets, transforms
from .dataset import ArrayDataset, Dataset, Subset, TensorDataset
from .loader import DataLoader, default_collate

__all__ = [
    "ArrayDataset",
    "DataLoader",
    "Dataset",
    "Subset",
    "TensorDataset",
    "datasets",
    "default_collate",
    "transforms",
]
