"""Compiled functions that ran, to be run again without what Python does around them: on the CPU, what a CUDA graph is.

    launches = Launches(compute, [x], Pool(1 << 28))  # runs compute(launches), which returns arrays
    y, = launches.run([another])                      # the same calls, on another input

A call knows its arrays by where they lie. What is made during the computation lies in memory of its own, where an array
takes the place of one that is gone, the last one first, as it is in the cache. (A ResNet-50's forward pass in bfloat16
took 51 ms with a place for every array and 44 with these.) Parts of the inputs are looked up in the new ones; all other
arrays are taken to be constants. So nothing is repeated that Python or NumPy computes in between: whoever records must
compare (`minires.jit`).
"""

from __future__ import annotations

import threading
from bisect import bisect
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from .. import memory
from .jit import get_num_threads, noted
from .pools import Plan, Pool


class Part(NamedTuple):
    """An array within an input: of which, at what byte, and what `np.ndarray` asks for."""

    number: int
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...]

    def of(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """It, within other inputs, as bytes."""
        return np.ndarray(self.shape, self.dtype, inputs[self.number], self.offset, self.strides)


class Launches:
    """See the head of this page. Where the memory did not suffice (`pool.exceeded`) it runs nothing.

    pool: what `empty` takes arrays from during compute(launches), which may take some itself, and call `mark` where a
    repetition may halt.
    """

    def __init__(self, compute: Callable[[Launches], Sequence[Any]], inputs: Sequence[np.ndarray], pool: Pool | Plan):
        self.layouts, self.threads = [layout(x) for x in inputs], get_num_threads()
        self.pool, self.marks = pool, [0]
        self.calls: list[tuple[Any, list[Any], list[tuple[int, Part]]]] = []
        self._running, flat = threading.Lock(), [_bytes(x) for x in inputs]

        def note(function: Any, arguments: tuple) -> None:
            if self.pool.exceeded:  # what is noted stays alive
                return self.calls.clear()
            found = [self._placed(a, flat) for a in arguments]
            self.calls.append((function, found, [(i, a) for i, a in enumerate(found) if isinstance(a, Part)]))

        with noted(note), memory.taken_from(self.pool):
            results = compute(self)
        self.mark()
        self.results = [self._placed(y, flat) for y in results]

    def mark(self) -> None:
        """The end of a part of the computation."""
        self.marks.append(len(self.calls))

    def takes(self, inputs: Sequence[np.ndarray]) -> bool:
        """Whether these lie like those that it was made with."""
        return self.threads == get_num_threads() and self.layouts == [layout(x) for x in inputs]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray] | None:
        """What the computation returns for these, copied; None while another thread runs it, or without memory."""
        if self.pool.exceeded or not self._running.acquire(blocking=False):
            return None
        try:
            self.repeat(range(len(self.marks) - 1), inputs)
            flat = [_bytes(x) for x in inputs]
            return [(y.of(flat) if isinstance(y, Part) else y).copy("K") for y in self.results]
        finally:
            self._running.release()

    def repeat(self, parts: Sequence[int], inputs: Sequence[np.ndarray]) -> None:
        """The calls between marks again. Results lie where they were made, in `results`."""
        flat = [_bytes(x) for x in inputs]
        for function, arguments, places in self.calls[self.marks[parts[0]] : self.marks[parts[-1] + 1]]:
            if places:
                arguments = arguments.copy()
                for i, place in places:
                    arguments[i] = place.of(flat)
            function(*arguments)

    def apart(self, a: np.ndarray) -> np.ndarray:
        """It, or a copy where it lies in memory that the calls write into."""
        return a if not a.size or self.pool.block_of(memory.address(a)) is None else a.copy("K")

    def move(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Call with the second of each pair where it was the first, or a part of it, that lies in the same order."""
        starts = sorted(((memory.address(a), a.nbytes, _bytes(b)) for a, b in pairs if a.size), key=itemgetter(0))
        firsts = [start for start, *_ in starts]
        for _, arguments, _ in self.calls:
            for i, a in enumerate(arguments):
                if type(a) is np.ndarray and a.size and (k := bisect(firsts, memory.address(a)) - 1) >= 0:
                    start, nbytes, other = starts[k]
                    if (at := memory.address(a) - start) < nbytes:
                        arguments[i] = np.ndarray(a.shape, a.dtype, other, at, a.strides)

    def _placed(self, a: Any, inputs: list[np.ndarray]) -> Any:
        """An array as it will be found again."""
        if type(a) is not np.ndarray or a.size == 0:
            return a
        at = memory.address(a)
        for number, x in enumerate(inputs):
            if 0 <= at - memory.address(x) < x.nbytes:
                return Part(number, at - memory.address(x), a.shape, a.dtype, a.strides)
        if (found := self.pool.block_of(at)) is None:
            return a
        again = np.ndarray(a.shape, a.dtype, found[0], found[1], a.strides)
        again.flags.writeable = a.flags.writeable
        return again


def layout(x: np.ndarray) -> tuple:
    """What must be the same of two inputs."""
    return x.shape, x.dtype, x.strides, x.flags.writeable


def _bytes(x: np.ndarray) -> np.ndarray:
    """Its memory, which must be one run."""
    return x.transpose(memory.order_of(x)).reshape(-1).view(np.uint8)
