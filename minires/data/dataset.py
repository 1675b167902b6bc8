"""Collections of samples: a map from an index to (image, label).

A data set that can fetch many samples at once has a method `batch(indices)`; `DataLoader` uses it in place of
fetching and collating one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..engine import Tensor


class Dataset:
    """What `DataLoader` reads: subclasses define `__getitem__(index)` and `__len__()`."""

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define __getitem__(index)")

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} must define __len__()")


class ArrayDataset(Dataset):
    """Arrays in memory, as many rows each: sample i is row i of every array.

    transform: applied to a whole batch of the first array, as (B, C, H, W), when it is fetched;
    `transforms.RandomShift` and `transforms.Normalize` are of that kind. Raises ValueError where lengths differ.
    """

    def __init__(self, *arrays: Any, transform: Callable[[Any], Any] | None = None):
        self.arrays, self.transform = arrays, transform
        self.length = common_length(arrays, "ArrayDataset")

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Any, ...]:
        """The samples at `indices` as one array per field, the first one transformed."""
        rows = np.asarray(indices, dtype=np.int64)
        first, *others = (array[rows] for array in self.arrays)
        return (first if self.transform is None else self.transform(first), *others)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return tuple(field[0] for field in self.batch([within(index, self.length)]))

    def __len__(self) -> int:
        return self.length


class TensorDataset(Dataset):
    """Tensors of equal length: sample i is `(t[i] for t in tensors)`. Raises ValueError where the lengths differ."""

    def __init__(self, *tensors: Tensor):
        self.tensors = tensors
        self.length = common_length(tensors, "TensorDataset")

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, ...]:
        """The samples at `indices`, stacked."""
        rows = np.asarray(indices, dtype=np.int64)
        return tuple(Tensor(t.array[rows]) for t in self.tensors)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(Tensor(t.array[within(index, self.length)]) for t in self.tensors)

    def __len__(self) -> int:
        return self.length


class Subset(Dataset):
    """The samples of `dataset` at `indices`, in that order."""

    def __init__(self, dataset: Any, indices: Sequence[int] | np.ndarray):
        self.dataset, self.indices = dataset, np.asarray(indices, dtype=np.int64)
        size = len(dataset)
        if self.indices.size and not -size <= self.indices.min() <= self.indices.max() < size:
            raise ValueError(
                f"Subset: indices from {self.indices.min()} to {self.indices.max()} do not fit a data set of {size}"
            )
        if hasattr(dataset, "batch"):  # pass the short cut on, but only where there is one
            self.batch = self._batch  # a method, not a lambda: worker processes get the data set pickled

    def _batch(self, indices: Any) -> Any:
        return self.dataset.batch(self.indices[np.asarray(indices, dtype=np.int64)])

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    def __len__(self) -> int:
        return len(self.indices)


def common_length(arrays: tuple[Any, ...], who: str) -> int:
    lengths = {array.shape[0] if array.ndim else -1 for array in arrays}
    if len(lengths) != 1 or -1 in lengths:
        raise ValueError(f"{who} needs arrays of one length, not shapes {[tuple(array.shape) for array in arrays]}")
    return lengths.pop()


def within(index: int, length: int) -> int:
    """`index`, which may count from the end, from 0; IndexError also ends `for sample in dataset`."""
    if not -length <= index < length:
        raise IndexError(f"index {index} is outside a data set of {length} samples")
    return index % length
