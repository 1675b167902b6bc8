"""Where random transforms draw from: `generator()`.

Inside a `DataLoader` it is a generator of the sample's (or batch's) own, made from (seed, epoch, index). What a sample
looks like then depends on nothing else: not on the number of workers, nor on what was drawn before.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np

from ..random import default_generator


class _Keyed(threading.local):
    key: tuple[int, ...] | None = None
    made: np.random.Generator | None = None


_state = _Keyed()


def generator() -> np.random.Generator:
    """The generator of the sample that is being made; outside of a loader the default one, `minires.manual_seed`'s."""
    if _state.key is None:
        return default_generator
    if _state.made is None:  # made on demand: most samples draw nothing
        _state.made = np.random.default_rng(_state.key)
    return _state.made


@contextlib.contextmanager
def keyed(*key: int) -> Iterator[None]:
    """Within it, in this thread, `generator()` is one made from `key` (integers of at least 0) alone."""
    saved, _state.key, _state.made = (_state.key, _state.made), key, None
    try:
        yield
    finally:
        _state.key, _state.made = saved
