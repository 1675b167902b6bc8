"""Batches of a data set, shuffled, in order, made ahead of time by threads or processes if asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from .collate import BatchMaker
from .randomness import SHUFFLE
from .randomness import generator as current_generator
from .workers import Task, WorkerPool


class DataLoader:
    """Iterate over batches of `dataset`, each collated into tensors: `for images, labels in loader`.

    batch_size: samples per batch; the last one may be smaller unless `drop_last`. shuffle: a new order every epoch, a
    function of (seed, epoch) alone. collate_fn: turns a list of samples into a batch (`default_collate`); a data set
    with a method `batch` is asked for whole batches unless it is given. batch_transform: called with the fields of
    every batch, such as `transforms.MixUp`; what it returns is the batch. generator: an int seed from 0, or a
    `numpy.random.Generator` that one is drawn from; None draws one from the default generator (`minires.manual_seed`).
    pin_memory: taken for the sake of scripts written for PyTorch; it changes nothing.

    num_workers: how many make batches ahead of time, each up to `prefetch_factor` of them; 0: the loop itself does.
    workers: "thread" (decoding and NumPy release the interpreter, so threads mostly suffice) or "process", for
    transforms that are slow in Python: spawned processes, which get a pickled copy of the data set when they start
    (half a second) and of which only `persistent_workers` outlive the epoch. Order and content of the batches depend
    on none of these, to the bit: every random number is keyed by (seed, epoch, index).

    Where a run stands is `loader.state`, the (epoch, batch) that comes next; `loader.iterate(epoch, start=batch)`
    goes on from there with the very batches that the uninterrupted loop would have seen, without making the earlier
    ones. `for batch in loader` counts the epochs itself; `set_epoch` sets the next one, to repeat or to resume.

    Raises ValueError for sizes out of range, and RuntimeError where a worker process dies.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        shuffle: bool = False,
        *,
        num_workers: int = 0,
        workers: Literal["thread", "process"] = "thread",
        prefetch_factor: int = 2,
        persistent_workers: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        batch_transform: Callable[..., Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        generator: int | np.random.Generator | None = None,
    ):
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise ValueError(f"DataLoader: {name}={value} must be at least {least}")
        if prefetch_factor < 1:
            raise ValueError(f"DataLoader: prefetch_factor={prefetch_factor} must be at least 1")
        if workers not in ("thread", "process"):
            raise ValueError(f"DataLoader: workers={workers!r} must be 'thread' or 'process'")
        if shuffle and len(dataset) == 0:
            raise ValueError("DataLoader: shuffle=True of an empty data set; give it at least one sample")
        self.dataset, self.batch_size, self.shuffle, self.drop_last = dataset, batch_size, shuffle, drop_last
        self.num_workers, self.workers, self.prefetch_factor = num_workers, workers, prefetch_factor
        self.persistent_workers, self.pin_memory = persistent_workers, pin_memory
        self.collate_fn, self.batch_transform = collate_fn, batch_transform
        if isinstance(generator, (int, np.integer)):
            self.seed = int(generator)
        else:
            self.seed = int((current_generator() if generator is None else generator).integers(2**63))
        if self.seed < 0:
            raise ValueError(f"DataLoader: generator={self.seed} must be a seed from 0, or a numpy.random.Generator")
        self.epoch = 0
        self._start = 0
        self._state = (0, 0)
        self._idle: WorkerPool | None = None  # processes between two epochs

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    @property
    def state(self) -> tuple[int, int]:
        """(epoch, batch) of the batch that follows the last one given out; (epoch + 1, 0) after the last of an epoch.

        Batches that workers have prepared but the loop has not seen do not count. `set_epoch(*state)` resumes there.
        """
        return self._state

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The epoch that the next `for batch in loader` is, from 0, and the batch that it begins with."""
        self._check(epoch, start)
        self.epoch, self._start = epoch, start
        self._state = (epoch, start)

    def order(self, epoch: int) -> np.ndarray:
        """The samples' indices in the order of that epoch, (len(dataset),) int64."""
        n = len(self.dataset)
        if not self.shuffle:
            return np.arange(n)
        return np.random.default_rng((self.seed, epoch, SHUFFLE)).permutation(n)

    def __iter__(self) -> Iterator[Any]:
        epoch, start = self.epoch, self._start
        self.epoch, self._start = epoch + 1, 0
        return self.iterate(epoch, start)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch (from 0) from number `start` on: the last `len(self) - start` of that epoch.

        They are the same, to the bit, as those that a pass over the whole epoch gives at those places. start may be
        len(self): nothing is left. The count of `for batch in loader` is not touched. Raises ValueError for an epoch or
        start out of range.
        """
        self._check(epoch, start)
        order, size = self.order(epoch), self.batch_size
        tasks = [(epoch, step, order[step * size : (step + 1) * size]) for step in range(start, len(self))]
        self._state = (epoch, start)
        return self._counted(epoch, start, self._batches(tasks))

    def close(self) -> None:
        """End the processes that `persistent_workers` keeps; the next pass starts new ones."""
        pool, self._idle = self._idle, None
        if pool is not None:
            pool.close()

    def _check(self, epoch: int, start: int) -> None:
        if epoch < 0:
            raise ValueError(f"DataLoader: epoch={epoch} must be at least 0")
        if not 0 <= start <= len(self):
            raise ValueError(f"DataLoader: start={start} must be from 0 to {len(self)}, the batches of an epoch")

    def _counted(self, epoch: int, start: int, batches: Iterator[Any]) -> Iterator[Any]:
        for step, batch in enumerate(batches, start + 1):
            self._state = (epoch, step) if step < len(self) else (epoch + 1, 0)
            yield batch

    def _batches(self, tasks: list[Task]) -> Iterator[Any]:
        maker = BatchMaker(self.dataset, self.seed, self.collate_fn, self.batch_transform)
        if self.num_workers == 0:
            return (maker.make(*task) for task in tasks)
        if self.workers == "thread":
            return _by_threads(maker, tasks, self.num_workers, self.prefetch_factor)
        return self._by_processes(maker, tasks)

    def _by_processes(self, maker: BatchMaker, tasks: list[Task]) -> Iterator[Any]:
        pool, self._idle = self._idle, None  # a second loop at the same time gets processes of its own
        whole = False
        try:
            pool = pool or WorkerPool(maker, self.num_workers)
            yield from pool.run(tasks, self.prefetch_factor)
            whole = True
        finally:  # also where the loop over the loader is left early: workers may be in the middle of something
            if whole and self.persistent_workers and self._idle is None:
                self._idle = pool
            elif pool is not None:
                pool.close()


def _by_threads(maker: BatchMaker, tasks: Iterable[Task], count: int, ahead: int) -> Iterator[Any]:
    pool = ThreadPoolExecutor(count, thread_name_prefix="DataLoader")
    pending: deque[Future] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(maker.make, *task))
            if len(pending) > ahead * count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # also where the loop over the loader is left early
        pool.shutdown(wait=True, cancel_futures=True)
