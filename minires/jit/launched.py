"""A recording's compiled functions, called again without its ops: what is noted, and whether it computes the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..dispatch import Launches, Pool, dense_order
from .parts import about, divide, run_divided

if TYPE_CHECKING:
    from .recording import Recording

_MOST_BYTES = 1 << 28  # that launches may keep
_TRIAL = 0.25  # seconds in which two ways are compared


def launched(recording: Recording, inputs: list[Any]) -> Any:
    """A recording's launches, for inputs like these; False where the ops do more than run compiled functions, or where
    they take more memory than Python's time is worth. What they do is compared on other inputs than they were noted
    with. Of the ways to divide a batch (parts.py) it is the one that was fastest."""
    if not inputs or not all(type(x) is np.ndarray and x.dtype.kind in "fV" and dense_order(x) for x in inputs):
        return False
    if sum(x.nbytes for x in inputs) > _MOST_BYTES // 4:  # copies are made of them, and a pass takes more
        return False
    first, second = random_like(inputs, 1), random_like(inputs, 2)
    arrays = {k: about(x) for k, x in enumerate(inputs)}
    with np.errstate(all="ignore"):
        try:
            recording.run(first, lambda k, y: arrays.update({k: about(y)}))
            wanted = _bytes([*recording.run(second), *second])
        except Exception:
            # Whatever an op says of numbers that nobody gave it. With the user's it goes on as before.
            return False

        def noted(compute: Callable[[Any], Any]) -> Any:
            launches, again = Launches(compute, first, Pool(_MOST_BYTES)), random_like(inputs, 2)
            results = launches.run(again)
            return launches if results is not None and _bytes([*results, *again]) == wanted else False

        best = noted(lambda noting: recording.run(first))
        for stretches in divide(recording, arrays, inputs[0].shape[0], best.threads) if best else ():
            other = noted(lambda noting, ways=stretches: run_divided(recording, first, ways, arrays, noting.pool))
            best = other if other and _is_faster(other, best, second) else best
    return best


def _is_faster(a: Any, b: Any, inputs: list[Any]) -> bool:
    """Which one takes less time, at best, in turns."""
    times: dict[Any, list[float]] = {a: [], b: []}
    while len(times[b]) < 2 or (sum(times[a]) + sum(times[b]) < _TRIAL and len(times[b]) < 20):
        for launches, taken in times.items():
            start = time.perf_counter()
            launches.run(inputs)
            taken.append(time.perf_counter() - start)
    return min(times[a]) < min(times[b])


def random_like(inputs: list[Any], seed: int) -> list[Any]:
    """Random numbers that lie like the inputs, each of which is one run of memory; among them zeros and large ones."""
    numbers, made = np.random.default_rng(seed), dict[int, Any]()
    for x in inputs:
        if id(x) not in made:  # the same may be given twice
            made[id(x)] = other = np.ndarray(x.shape, x.dtype, np.empty(x.nbytes, np.uint8), strides=x.strides)
            kinds = np.digitize(numbers.random(x.shape), (1 / 8, 1 / 8 + 1 / 64))  # 0, large, or neither
            other[...] = (numbers.standard_normal(x.shape) * np.array((0, 100, 1))[kinds]).astype(x.dtype)
            other.flags.writeable = x.flags.writeable
    return [made[id(x)] for x in inputs]


def _bytes(arrays: Sequence[Any]) -> list[bytes]:
    return [a.tobytes() for a in arrays]
