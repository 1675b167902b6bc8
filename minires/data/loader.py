"""Batches of a data set, shuffled, in order, made ahead of time by threads if asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from ..engine import Tensor
from .randomness import generator as current_generator
from .randomness import keyed

_SHUFFLE, _SAMPLE = 0, 1  # the last word of a generator's key: what it is for
_AHEAD = 2  # batches in the making per worker


class DataLoader:
    """Iterate over batches of `dataset`, each collated into tensors: `for images, labels in loader`.

    batch_size: samples per batch; the last one may be smaller unless `drop_last`. shuffle: a new order every epoch, a
    function of (seed, epoch) alone. num_workers: threads that make batches ahead of time; order and content do not
    depend on it (decoding and NumPy release the interpreter, so threads suffice). collate_fn: turns a list of samples
    into a batch (`default_collate`); a data set with a method `batch` is asked for whole batches unless it is given.
    generator: an int seed, or a `numpy.random.Generator` that one is drawn from; None draws one from the default
    generator (`minires.manual_seed`). pin_memory: taken for the sake of scripts written for PyTorch; it changes
    nothing. Raises ValueError for sizes below 1.

    The epoch counts up with every pass; `set_epoch` sets it, to repeat or to resume.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        shuffle: bool = False,
        *,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        generator: int | np.random.Generator | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"DataLoader: batch_size={batch_size} must be at least 1")
        if num_workers < 0:
            raise ValueError(f"DataLoader: num_workers={num_workers} must be at least 0")
        if shuffle and len(dataset) == 0:
            raise ValueError("DataLoader: shuffle=True of an empty data set; give it at least one sample")
        self.dataset, self.batch_size, self.shuffle, self.drop_last = dataset, batch_size, shuffle, drop_last
        self.num_workers, self.collate_fn, self.pin_memory = num_workers, collate_fn, pin_memory
        if isinstance(generator, (int, np.integer)):
            self.seed = int(generator)
        else:
            self.seed = int((current_generator() if generator is None else generator).integers(2**63))
        self.epoch = 0

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next pass is, from 0."""
        self.epoch = epoch

    def order(self, epoch: int) -> np.ndarray:
        """The samples' indices in the order of that epoch, (len(dataset),) int64."""
        n = len(self.dataset)
        if not self.shuffle:
            return np.arange(n)
        return np.random.default_rng((self.seed, epoch, _SHUFFLE)).permutation(n)

    def __iter__(self) -> Iterator[Any]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        order = self.order(epoch)
        chunks = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(len(self))]
        if self.num_workers == 0:
            return (self._make(epoch, step, chunk) for step, chunk in enumerate(chunks))
        return self._prefetched(epoch, chunks)

    def _prefetched(self, epoch: int, chunks: list[np.ndarray]) -> Iterator[Any]:
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="DataLoader")
        pending: deque[Future] = deque()
        try:
            for step, chunk in enumerate(chunks):
                pending.append(pool.submit(self._make, epoch, step, chunk))
                if len(pending) > _AHEAD * self.num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # also where the loop over the loader is left early
            pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, epoch: int, step: int, indices: np.ndarray) -> Any:
        if self.collate_fn is None and hasattr(self.dataset, "batch"):
            with keyed(self.seed, epoch, step, _SAMPLE):
                return _as_tensors(self.dataset.batch(indices))
        samples = []
        for index in indices.tolist():
            with keyed(self.seed, epoch, index, _SAMPLE):
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
        return Tensor(_stack([s.array if isinstance(s, Tensor) else s for s in samples]))
    if isinstance(first, (bool, int, float, np.generic)):
        return Tensor(np.array(samples))
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


def _stack(arrays: list[Any]) -> Any:
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


def _as_tensors(batch: Any) -> Any:
    if isinstance(batch, (tuple, list)):
        return [_as_tensors(field) for field in batch]
    return batch if isinstance(batch, Tensor) else Tensor(batch)
