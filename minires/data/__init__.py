"""Data sets, transforms and the loader that makes batches of them."""

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
