"""From samples to a batch: how samples are stacked, and how a batch is made, in whichever thread or process.

A batch is a function of (data set, seed, epoch, step, indices) and of nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine import Tensor
from .randomness import BATCH, SAMPLE, keyed, keyed_batch


@dataclass
class BatchMaker:
    """What a worker needs to make batches of `dataset`; a worker process gets a pickled copy of it.

    collate_fn and batch_transform: as `DataLoader` takes them.
    """

    dataset: Any
    seed: int
    collate_fn: Callable[[list[Any]], Any] | None = None
    batch_transform: Callable[..., Any] | None = None

    def make(self, epoch: int, step: int, indices: np.ndarray) -> Any:
        """The batch of the samples at `indices`. An error is passed on with a note that says which batch it was."""
        try:
            batch = self._collected(epoch, step, indices)
            if self.batch_transform is not None:
                with keyed(self.seed, epoch, step, BATCH):
                    batch = as_tensors(self.batch_transform(*batch))
            return batch
        except Exception as error:
            error.add_note(f"(while making batch {step} of epoch {epoch})")
            raise

    def _collected(self, epoch: int, step: int, indices: np.ndarray) -> Any:
        if self.collate_fn is None and hasattr(self.dataset, "batch"):
            with keyed_batch(self.seed, epoch, step, indices):
                return as_tensors(self.dataset.batch(indices))
        samples = []
        for index in indices.tolist():
            with keyed(self.seed, epoch, index, SAMPLE):
                samples.append(self.dataset[index])
        return (self.collate_fn or default_collate)(samples)


def default_collate(samples: Sequence[Any]) -> Any:
    """Stack samples into a batch, field by field.

    Arrays and tensors are stacked along a new first axis (images (C, H, W) so that the batch lies channels-last in
    memory, as the kernels read it), ints become an int64 tensor and floats a float64 one as in PyTorch, strings a
    list; tuples and lists become a list of fields, dicts a dict of them. Raises TypeError for anything else and
    ValueError for unequal shapes.
    """
    first = samples[0]
    if isinstance(first, (Tensor, np.ndarray)):
        return Tensor(stack([s.array if isinstance(s, Tensor) else s for s in samples]))
    if isinstance(first, (bool, int, float, np.generic)) and (numbers := np.array(samples)).dtype != object:
        return Tensor(numbers)
    if isinstance(first, str):
        return list(samples)
    if isinstance(first, dict):
        return {key: default_collate([s[key] for s in samples]) for key in first}
    if isinstance(first, (tuple, list)):
        if len({len(s) for s in samples}) > 1:
            raise ValueError(f"a batch needs samples of as many fields each, not {sorted({len(s) for s in samples})}")
        return [default_collate(field) for field in zip(*samples, strict=True)]
    raise TypeError(
        f"DataLoader cannot stack a {type(first).__name__}; make it an array (images: transforms.ToTensor()) "
        "or pass collate_fn"
    )


def stack(arrays: Sequence[Any]) -> Any:
    """Arrays of one shape, stacked along a new first axis; images (C, H, W) so that the result lies channels-last."""
    shapes = {a.shape for a in arrays}
    if len(shapes) > 1:
        raise ValueError(f"a batch needs samples of one shape, not {sorted(shapes)}; add Resize or a crop")
    if isinstance(arrays[0], np.ndarray):
        if arrays[0].ndim == 3:  # (C, H, W) -> memory (N, H, W, C)
            return np.stack([a.transpose(1, 2, 0) for a in arrays]).transpose(0, 3, 1, 2)
        return np.stack(arrays)
    batch = arrays[0][None].repeat(len(arrays), 0)  # CuPy, by the methods that its arrays share with NumPy's
    for i, a in enumerate(arrays):
        batch[i] = a
    return batch


def as_tensors(batch: Any) -> Any:
    """The arrays of a batch as tensors; tuples of them as lists."""
    if isinstance(batch, (tuple, list)):
        return [as_tensors(field) for field in batch]
    return batch if isinstance(batch, Tensor) else Tensor(batch)
