"""From arrays to a device to a kernel. Ops reach kernels only through `run`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import minires.kernels  # noqa: F401  (importing the tree registers its kernels)  # pyright: ignore[reportMissingImports]
from minires.kernels import kept, memory, registry  # pyright: ignore[reportMissingImports]
from minires.kernels.cpu import features, jit, launches, pools  # pyright: ignore[reportMissingImports]

from . import tuning
from .device import device_of

constant, constants = kept.constant, kept.constants  # what is said of an array here, kernels heed
Launches, layout, Needs, Plan, Pool = launches.Launches, launches.layout, pools.Needs, pools.Plan, pools.Pool
call_noted, get_num_threads, cache_bytes = jit.call_noted, jit.get_num_threads, features.cache_bytes
release_freed_memory, taken_from = memory.release_freed_memory, memory.taken_from
dense_order, from_order, order_of = memory.dense_order, memory.from_order, memory.order_of
_measured: dict[tuple, Any] = {}  # what `autotune` found, for all threads
_takers: dict[tuple, tuple[Any, list[Any]]] = {}  # see _taking
_MOST_TAKERS = 4096  # shapes; a network has some dozens


class _State(threading.local):
    """What this thread entered: kernels chosen by hand, only exact ones, whether to measure, who watches."""

    def __init__(self) -> None:
        self.chosen: dict[str, str] = {}
        self.exact = False
        self.autotune = False
        self.observers: list[Callable[[Any], Any]] = []


_state = _State()


def run(problem: str, *arrays: Any, **params: Any) -> Any:
    """Compute `problem` with the best kernel for these inputs on the device where they lie.

    Raises NotImplementedError naming the problem, device and dtypes where no kernel takes them.
    """
    return _call(select(problem, *arrays, **params), arrays, params)


def run_with(more: str, further: tuple, problem: str, *arrays: Any, **params: Any) -> tuple[bool, Any]:
    """`run`, or in its place the problem `more`, of further arrays, by the kernel of the same name, where there is one:
    it computes the same way, and more in the same pass. Returns whether it did, and what came out."""
    kernel = select(problem, *arrays, **params)
    candidates = _taking(more, kernel.device, (*arrays, *further), params)
    beside = next((k for k in candidates if k.name == kernel.name), None)
    if beside is None:
        return False, _call(kernel, arrays, params)
    return True, _call(beside, (*arrays, *further), params)


def _call(kernel: Any, arrays: tuple, params: dict[str, Any]) -> Any:
    compute = kernel
    for observe in _state.observers:
        compute = observe(kernel) or compute
    return compute(*arrays, **params)


def select(problem: str, *arrays: Any, **params: Any) -> Any:
    """The kernel that `run` would use: chosen by hand, else measured (`autotune`), else of the highest rank."""
    device = device_of(*arrays).type
    candidates = _taking(problem, device, arrays, params)
    if candidates and not (_state.chosen or _state.exact or _state.autotune or _measured):
        return candidates[0]
    candidates = [k for k in candidates if k.exact or not _state.exact]
    if not candidates:
        dtypes = ", ".join(str(a.dtype) for a in arrays if a is not None)
        raise NotImplementedError(f"no {device} kernel of {problem} takes ({dtypes}) with {params}")
    name = _state.chosen.get(problem)
    if name is not None and not (_state.exact and _is_inexact(problem, name)):
        return _named(problem, name, candidates)
    if _state.autotune or _measured:
        settings = params | {"exact": True} if _state.exact else params
        key = (problem, device, tuple(None if a is None else (a.shape, a.dtype.str) for a in arrays), _frozen(settings))
        if _state.autotune and _measured.get(key) not in candidates:
            rivals = [k for k in candidates if k.step > 0] or candidates  # the definition may take minutes
            _measured[key] = tuning.fastest(key, rivals, arrays, params)
        if _measured.get(key) in candidates:
            return _measured[key]
    return candidates[0]


def _taking(problem: str, device: str, arrays: tuple, params: dict) -> list[Any]:
    """The kernels that take these inputs, the highest rank first: asked once per shapes, dtypes and parameters, as
    asking takes longer than a small kernel runs."""
    registered = registry.kernels(problem, device)
    shapes = [None if a is None else (a.shape, a.dtype) for a in arrays]
    key = (problem, device, *shapes, *[item for item in params.items() if not _is_value(item[1])])
    found = _takers.get(key)
    if found is None or found[0] is not registered:  # other kernels were registered since
        if len(_takers) >= _MOST_TAKERS:
            _takers.clear()
        taking = [k for k in registered if k.takes(*arrays, **params)]
        found = _takers[key] = registered, sorted(taking, key=lambda k: -k.rank_for(*arrays, **params))
    return found[1]


@contextlib.contextmanager
def use_kernels(**choice: str) -> Iterator[None]:
    """Choose kernels by hand, in this thread: `with use_kernels(conv2d_fprop="fprop_im2col_numpy"): ...`.

    Raises ValueError at once for a problem or kernel that is not registered.
    """
    for problem, name in choice.items():
        known = [k.name for k in registry.kernels(problem)]
        if name not in known:
            raise ValueError(f"{problem} has no kernel {name!r}; known: {', '.join(known) or 'no such problem'}")
    saved, _state.chosen = _state.chosen, {**_state.chosen, **choice}
    try:
        yield
    finally:
        _state.chosen = saved


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Within it, in this thread, only kernels whose outputs are plain sums of their own products run.

    Winograd convolutions, which are faster but round more and spread one Inf over a tile, are left out, even where
    `use_kernels` chose them. AnomalyHook and find_anomaly enter it.
    """
    saved, _state.exact = _state.exact, True
    try:
        yield
    finally:
        _state.exact = saved


@contextlib.contextmanager
def autotune() -> Iterator[None]:
    """Within it, the first use of a problem at a shape measures every kernel that takes it and keeps the fastest.

    What was measured stays for the process, also after it, and on disk for later ones (`minires.tuning`).
    """
    saved, _state.autotune = _state.autotune, True
    try:
        yield
    finally:
        _state.autotune = saved


def plan() -> list[list[Any]]:
    """What `autotune` measured, as JSON can hold it: [problem, device, shapes and dtypes, parameters, kernel] each."""
    return [[*key, kernel.name] for key, kernel in _measured.items()]


def restore_plan(entries: list[Any]) -> list[str]:
    """Choose as in a `plan`: the same kernels at the same shapes. Returns the names of kernels that there are not."""
    missing = []
    for *key, name in entries:
        problem, device = key[:2]
        found = [k for k in registry.kernels(problem, device) if k.name == name]
        if found:
            _measured[_tuples(key)] = found[0]
        else:
            missing.append(f"{problem}: {name}")
    return missing


@contextlib.contextmanager
def observe(callback: Callable[[Any], Any]) -> Iterator[None]:
    """Within it, `callback(kernel)` is called with every kernel that `run` chooses (`TraceHook`). What it returns, if
    anything, is called in the kernel's place (`python -m benchmarks profile`)."""
    _state.observers.append(callback)
    try:
        yield
    finally:
        _state.observers.remove(callback)


def is_plain() -> bool:
    """Whether nobody, in this thread, chooses kernels, measures them or watches."""
    return not (_state.chosen or _state.exact or _state.autotune or _state.observers)


def _is_inexact(problem: str, name: str) -> bool:
    return any(k.name == name and not k.exact for k in registry.kernels(problem))


def _named(problem: str, name: str, candidates: list[Any]) -> Any:
    for k in candidates:
        if k.name == name:
            return k
    raise NotImplementedError(f"kernel {name!r}, chosen for {problem}, does not take these inputs")


def _frozen(params: dict) -> tuple:
    """Parameters as a key; without values: they do not change how long a kernel takes."""
    return tuple(sorted((name, str(value)) for name, value in params.items() if not _is_value(value)))


def _is_value(parameter: Any) -> bool:
    """Whether it is a float or an array of one number (a learning rate), on which no choice depends."""
    return not isinstance(parameter, (tuple, int)) and (isinstance(parameter, float) or hasattr(parameter, "strides"))


def _tuples(value: Any) -> Any:
    """Lists, as JSON makes of tuples, as tuples again."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
