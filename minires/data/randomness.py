"""Where random transforms draw from: `generator()`, and `uniforms()` for whole batches.

Inside a `DataLoader` both give numbers of the sample's own, made from (seed, epoch, index). What a sample looks like
then depends on nothing else: not on the workers, nor on what was drawn before, nor (with `uniforms` and `sample`) on
the batch that it is in. What concerns a batch as a whole, such as mixing its images, is keyed by (seed, epoch, step).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np

from ..random import default_generator

SHUFFLE, SAMPLE, BATCH, ROWS = range(4)  # the last word of a key: what its numbers are for
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class _Keyed(threading.local):
    key: tuple[int, ...] | None = None
    made: np.random.Generator | None = None
    rows: tuple[int, int, np.ndarray] | None = None  # seed, epoch and the indices of the batch's samples
    seeds: np.ndarray | None = None  # one per sample of the batch, made on demand
    drawn: int = 0  # numbers that every sample of the batch has drawn


_state = _Keyed()


def generator() -> np.random.Generator:
    """The generator of the sample that is being made; outside of a loader the default one, `minires.manual_seed`'s."""
    if _state.key is None:
        return default_generator
    if _state.made is None:  # made on demand: most samples draw nothing
        _state.made = np.random.default_rng(_state.key)
    return _state.made


def uniforms(n: int, k: int) -> np.ndarray:
    """k numbers from [0, 1) for each of the n samples of a batch, (n, k) float64: functions of (seed, epoch, index).

    Every call gives new ones. They are SplitMix64's (Steele et al. 2014), from a start of each sample's own, so that a
    batch costs microseconds. Outside of a loader they are the default generator's.
    """
    if _state.rows is None:
        return generator().random((n, k))
    seed, epoch, indices = _state.rows
    if len(indices) != n:
        raise ValueError(f"uniforms: {n} samples, but the batch that is being made has {len(indices)}")
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        if _state.seeds is None:
            start = np.random.SeedSequence((seed, epoch, ROWS)).generate_state(1, np.uint64)
            _state.seeds = _mix(start ^ _mix((indices.astype(np.uint64) + np.uint64(1)) * _GAMMA))
        counts = np.arange(_state.drawn + 1, _state.drawn + k + 1, dtype=np.uint64)
        bits = _mix(_state.seeds[:, None] + counts * _GAMMA)
    _state.drawn += k
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the result depends on every bit of z."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@contextlib.contextmanager
def keyed(*key: int) -> Iterator[None]:
    """Within it, in this thread, `generator()` is one made from `key` (integers of at least 0) alone."""
    with _changed(key, None):
        yield


@contextlib.contextmanager
def keyed_batch(seed: int, epoch: int, step: int, indices: np.ndarray) -> Iterator[None]:
    """Within it, `uniforms()` belong to the samples at `indices`, and `generator()` to the batch as a whole."""
    with _changed((seed, epoch, step, SAMPLE), (seed, epoch, indices)):
        yield


@contextlib.contextmanager
def sample(i: int) -> Iterator[None]:
    """Within it, `generator()` is that of the i-th sample of the batch which is being made, as if it were made alone.

    Outside of a loader it changes nothing.
    """
    if _state.rows is None:
        yield
    else:
        seed, epoch, indices = _state.rows
        with _changed((seed, epoch, int(indices[i]), SAMPLE), None):
            yield


@contextlib.contextmanager
def _changed(key: tuple[int, ...], rows: tuple[int, int, np.ndarray] | None) -> Iterator[None]:
    saved = (_state.key, _state.made, _state.rows, _state.seeds, _state.drawn)
    _state.key, _state.made, _state.rows, _state.seeds, _state.drawn = key, None, rows, None, 0
    try:
        yield
    finally:
        _state.key, _state.made, _state.rows, _state.seeds, _state.drawn = saved
