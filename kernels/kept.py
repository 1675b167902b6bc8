"""What kernels make of an array that does not change from call to call, kept: in inference filters are packed once.

    with constant(w, version):            an op says that w is one; version[0] counts the writes into it
        run("conv2d_bias_act", x, w, ...)

    @kept                                 and what a kernel makes of it is made at the first call
    def pack(w, turned): ...

It is made again when the count has changed, and forgotten with the array. What a `kept` function made of a constant is
a constant too; kernels only read it. Elsewhere, in training above all, a `kept` function is what it was.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

_MOST_BYTES = 1 << 30  # of all that is kept; beyond it everything is forgotten


class _Entry:
    """What was made of an array: by the array that was asked for (itself, or one made of it), function and settings."""

    def __init__(self, source: weakref.ref, version: list[int]):
        self.source, self.version, self.count = source, version, version[0]
        self.made: dict[tuple, Any] = {}


_entries: dict[int, _Entry] = {}  # by the array's id


class _Now(threading.local):
    """The constants of the op that runs in this thread, by id."""

    def __init__(self) -> None:
        self.entries: dict[int, _Entry] = {}


_now = _Now()


class constant:
    """Within it, in this thread, `array` is taken to be the same as at the last time, unless `version[0]` has changed.

    A context manager; they nest. Arrays of a GPU, whose kernels keep nothing, are left alone.
    """

    def __init__(self, array: Any, version: list[int]):
        self.array, self.version = array, version

    def __enter__(self) -> None:
        self.saved = _now.entries
        if type(self.array) is np.ndarray and id(self.array) not in self.saved:  # `constants` may say so already
            entry = _entry(self.array, self.version)
            _now.entries = self.saved | {id(a): entry for a in (self.array, *entry.made.values())}

    def __exit__(self, *_: object) -> None:
        _now.entries = self.saved


class constants:
    """Arrays that do not change as long as this object is used: for one who sees to that himself (`minires.jit`). What
    is made of them within `held` is kept with this object, which threads may share."""

    def __init__(self, arrays: Iterable[Any]):
        self.arrays: list[np.ndarray] = []
        self.entries: dict[int, _Entry] = {}
        self.add(arrays)

    def add(self, arrays: Iterable[Any]) -> None:
        """More of them; what is not NumPy's is left out."""
        for a in arrays:
            if type(a) is np.ndarray and id(a) not in self.entries:
                self.arrays.append(a)  # alive, so that no other has its id
                self.entries[id(a)] = _Entry(weakref.ref(a), [0])

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within it, in this thread, they are constants."""
        saved, _now.entries = _now.entries, self.entries
        try:
            yield
        finally:
            _now.entries = saved


def _entry(array: np.ndarray, version: list[int]) -> _Entry:
    key = id(array)
    entry = _entries.get(key)
    known = entry is not None and entry.source() is array and entry.version is version and entry.count == version[0]
    if entry is None or not known:
        entry = _entries[key] = _Entry(weakref.ref(array, functools.partial(_forget, key)), version)
    return entry


def _forget(key: int, source: weakref.ref) -> None:
    """The array is gone; another one may have its id."""
    if key in _entries and _entries[key].source is source:
        del _entries[key]


def kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate `make(array, *settings)`, which makes an array that is only read."""

    @functools.wraps(make)
    def of(array: Any, *settings: Any) -> Any:
        if (entry := _now.entries.get(id(array))) is None:
            return make(array, *settings)
        key = (id(array), make, *settings)
        if key not in entry.made:
            saved, _now.entries = _now.entries, {}  # what it calls in turn need not be kept
            try:
                made = make(array, *settings)
            finally:
                _now.entries = saved
            made = entry.made.setdefault(key, made)  # another thread may have made it meanwhile
            _now.entries[id(made)] = entry
            if kept_bytes() > _MOST_BYTES:
                _entries.clear()
        return entry.made[key]

    return of


def kept_bytes() -> int:
    """How much memory what is kept takes."""
    return sum(made.nbytes for entry in [*_entries.values()] for made in [*entry.made.values()])
