"""Compiled functions that ran, to be run again without what Python does around them: on the CPU, what a CUDA graph is.

    launches = Launches(compute, [x], 1 << 28)  # runs compute(pool), which returns arrays, notes compiled functions
    y, = launches.run([another])                # the same calls, on another input

A call knows its arrays by where they lie. What is made during the computation lies in memory of its own, where an array
takes the place of one that is gone, the last one first, as it is in the cache. (A ResNet-50's forward pass in bfloat16
took 51 ms with a place for every array and 44 with these.) Parts of the inputs are looked up in the new ones; all other
arrays are taken to be constants. So nothing is repeated that Python or NumPy computes in between: whoever records must
compare (`minires.jit`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import memory
from .jit import get_num_threads, noted


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
    """See the head of this page. It keeps at most so many bytes; where they do not suffice it runs nothing.

    pool: the memory that `empty` takes arrays from during compute(pool), of which that may take some itself.
    """

    def __init__(
        self, compute: Callable[[memory.Pool], Sequence[np.ndarray]], inputs: Sequence[np.ndarray], most_bytes: int
    ):
        self.layouts, self.threads = [_layout(x) for x in inputs], get_num_threads()
        self.pool = memory.Pool(most_bytes)
        self.calls: list[tuple[Any, list[Any], list[tuple[int, Part]]]] = []
        self._running, flat = threading.Lock(), [_bytes(x) for x in inputs]

        def note(function: Any, arguments: tuple) -> None:
            if self.pool.exceeded:  # what is noted stays alive
                return self.calls.clear()
            found = [self._placed(a, flat) for a in arguments]
            self.calls.append((function, found, [(i, a) for i, a in enumerate(found) if isinstance(a, Part)]))

        with noted(note), memory.taken_from(self.pool):
            results = compute(self.pool)
        self.results = [self._placed(y, flat) for y in results]

    def takes(self, inputs: Sequence[np.ndarray]) -> bool:
        """Whether these lie like those that it was made with."""
        return self.threads == get_num_threads() and self.layouts == [_layout(x) for x in inputs]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray] | None:
        """What the computation returns for these, copied; None while another thread runs it, or without memory."""
        if self.pool.exceeded or not self._running.acquire(blocking=False):
            return None
        try:
            flat = [_bytes(x) for x in inputs]
            for function, arguments, parts in self.calls:
                if parts:
                    arguments = arguments.copy()
                    for i, part in parts:
                        arguments[i] = part.of(flat)
                function(*arguments)
            return [(y.of(flat) if isinstance(y, Part) else y).copy("K") for y in self.results]
        finally:
            self._running.release()

    def _placed(self, a: Any, inputs: list[np.ndarray]) -> Any:
        """An array as it will be found again."""
        if type(a) is not np.ndarray or a.size == 0:
            return a
        at = memory.address(a)
        for number, x in enumerate(inputs):
            if 0 <= at - memory.address(x) < x.nbytes:
                return Part(number, at - memory.address(x), a.shape, a.dtype, a.strides)
        for block in self.pool.blocks:
            if 0 <= at - memory.address(block) < block.nbytes:
                again = np.ndarray(a.shape, a.dtype, block, at - memory.address(block), a.strides)
                again.flags.writeable = a.flags.writeable
                return again
        return a


def _layout(x: np.ndarray) -> tuple:
    """What must be the same of two inputs."""
    return x.shape, x.dtype, x.strides, x.flags.writeable


def _bytes(x: np.ndarray) -> np.ndarray:
    """Its memory, which must be one run."""
    return x.transpose(memory.order_of(x)).reshape(-1).view(np.uint8)
