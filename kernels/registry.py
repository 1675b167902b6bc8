"""The table of problems and kernels that dispatch, tests, benchmarks and the documentation walk over.

A `Problem` is a definition in plain NumPy with its cases. A kernel is one way to compute it, registered by the
decorator `@kernel(PROBLEM, device=..., step=..., note=...)`; nothing else has to be edited to add one.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TEST = frozenset({"test"})
BENCH = frozenset({"bench"})
HALVES = ("float16", "bfloat16")
EPS_OF_BFLOAT16 = 2.0**16  # in those of float32


@dataclass(frozen=True, eq=False)
class Case:
    """One shape of a problem. `tags` says who uses it: tests ("test", small) or benchmarks ("bench", real layers)."""

    name: str
    params: Mapping[str, Any]
    tags: frozenset[str] = TEST


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be computed, independent of every fast way to compute it.

    reference(*arrays, **params) is the definition in plain NumPy, for any dtype (float64 in tests); it returns one
        array or a tuple of arrays.
    inputs(case, rng) -> (arrays, params): float64 arrays by name, in the order of `reference`'s arguments, and the
        keyword parameters.
    cases: the shapes that tests and benchmarks use.
    flops(*arrays, **params), bytes_moved(*arrays, **params): the least work, for GFLOP/s and GB/s. An array may be
        anything that has `shape` and `dtype`.
    error_scale(*arrays, **params): for each output, the elementwise magnitude that its rounding error is relative
        to, usually the definition applied to absolute values: |error| <= error_factor * eps * error_scale.
    writes: names of arguments that kernels overwrite in place (optimizer steps). Such a problem's outputs are these
        arguments after the call. The arrays of a `*list` are named p0, p1, ...: "p" here means all of them.
    exact_dtype: False where an output's dtype is its own matter (indices).
    wide: names of arguments that are float32 where the others have 16 bits: parameters, statistics.
    output_dtypes(dtype, **params) -> for each output the name of its dtype, where that is not always the inputs' own.
    """

    name: str
    reference: Callable[..., Any]
    inputs: Callable[[Case, np.random.Generator], tuple[dict[str, np.ndarray], dict[str, Any]]]
    cases: tuple[Case, ...]
    flops: Callable[..., int]
    bytes_moved: Callable[..., int]
    error_scale: Callable[..., Any]
    writes: tuple[str, ...] = ()
    exact_dtype: bool = True
    wide: tuple[str, ...] = ()
    output_dtypes: Callable[..., tuple[str, ...]] | None = None

    def overwrites(self, name: str) -> bool:
        """Whether kernels overwrite the argument of that name."""
        return name in self.writes or name.rstrip("0123456789") in self.writes

    @functools.cached_property
    def arguments(self) -> tuple[str, ...]:
        """The names of the arrays, in order; those of a `*list` at the end have none."""
        parameters = inspect.signature(self.reference).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def computed_in(dtype: str) -> str:
    """The dtype that numbers of this one are computed in: float32 for those of 16 bits, else the same."""
    return "float32" if dtype in HALVES else dtype


def of_magnitudes(reference: Callable[..., Any]) -> Callable[..., Any]:
    """A definition applied to absolute values: what a sum of products can lose is relative to this."""
    return lambda *arrays, **params: reference(*(None if a is None else np.abs(a) for a in arrays), **params)


def always(*arrays, **params) -> bool:
    """The `supports` of a kernel without limits."""
    return True


@dataclass(frozen=True, eq=False)
class Kernel:
    """One way to compute a problem. Call it like the problem's `reference`."""

    problem: Problem
    name: str
    device: str
    step: int
    note: str
    fn: Callable[..., Any] = field(repr=False)
    supports: Callable[..., bool] = field(default=always, repr=False)
    rank: Callable[..., float] | None = field(default=None, repr=False)
    error_factor: float = 32.0
    dtypes: tuple[str, ...] = ("float32", "float64")
    error_scale: Callable[..., Any] | None = field(default=None, repr=False)
    exact: bool = True

    def __call__(self, *arrays, **params):
        return self.fn(*arrays, **params)

    def takes(self, *arrays, **params) -> bool:
        """Whether this kernel can compute these inputs: dtypes it knows (at least one that it names: integers go beside
        them, as labels do), and `supports` agrees."""
        known = "any" in self.dtypes or (
            any(a is not None and _name(a.dtype) in self.dtypes for a in arrays)
            and all(itertools.starmap(self._knows, itertools.zip_longest(self.problem.arguments, arrays)))
        )
        return known and self.supports(*arrays, **params)

    def _knows(self, argument: str | None, a: Any) -> bool:
        """Whether it takes the dtype of an argument: one that it names, or float32 for what is wide beside 16 bits."""
        if a is None or a.dtype.kind not in "fcV" or _name(a.dtype) in self.dtypes:
            return True
        return argument in self.problem.wide and _name(a.dtype) in map(computed_in, self.dtypes)

    def rank_for(self, *arrays, **params) -> float:
        """How strongly dispatch wants this kernel for these inputs: its own `rank`, else its step of the ladder."""
        return self.step if self.rank is None else self.rank(*arrays, **params)


@functools.cache
def _name(dtype: np.dtype) -> str:
    """Its name, which NumPy puts together anew each time."""
    return dtype.name


_PROBLEMS: dict[str, Problem] = {}
_KERNELS: dict[tuple[str, str], Kernel] = {}


def kernel(
    problem: Problem,
    *,
    device: str,
    step: int,
    note: str,
    supports: Callable[..., bool] = always,
    rank: Callable[..., float] | None = None,
    error_factor: float = 32.0,
    dtypes: tuple[str, ...] = ("float32", "float64"),
    error_scale: Callable[..., Any] | None = None,
    exact: bool = True,
    name: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as a kernel of `problem`.

    device: "cpu" or "cuda". step: its place in the ladder, 0 for the definition; a later step is preferred, unless
    `rank(*arrays, **params)` says otherwise. note: one line, what this step changed and why. supports: whether it
    can compute these inputs, with the signature of the kernel. error_factor: the c of its error bound (32 unless the
    algorithm loses more; say why). dtypes: names of the float dtypes it takes; ("any",) for plain array code.
    error_scale: what its error is relative to where it is not the problem's. exact: False where outputs are not plain
    sums of their own products (Winograd): it rounds more, and one Inf spreads over a tile; `dispatch.exact` leaves it
    out. name: where the function's own name will not do.
    """

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        entry = Kernel(
            problem,
            name or fn.__name__,
            device,
            step,
            note,
            fn,
            supports,
            rank,
            error_factor,
            dtypes,
            error_scale,
            exact,
        )
        known = _PROBLEMS.setdefault(problem.name, problem)
        if known is not problem:
            raise ValueError(f"two different problems are named {problem.name!r}")
        if (problem.name, entry.name) in _KERNELS:
            raise ValueError(f"{problem.name} has a kernel named {entry.name!r} already")
        _KERNELS[problem.name, entry.name] = entry
        kernels.cache_clear()
        return fn

    return register


def forget(problem: str, name: str) -> None:
    """Take a kernel out of the table (tests of the registry itself)."""
    del _KERNELS[problem, name]
    kernels.cache_clear()


def load_file(path: str | Path) -> tuple[Kernel, ...]:
    """Run a file outside the tree that registers kernels, and return what it added to the table.

    A Python file, or a .cu file with a header (`cuda/own.py`). Raises FileNotFoundError, ImportError naming what went
    wrong in the file, or ValueError where it adds no kernel.
    """
    path = Path(path)
    if path.suffix == ".cu":
        from .cuda import own

        before = set(_KERNELS)
        own.load(path)
        return tuple(entry for key, entry in _KERNELS.items() if key not in before)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    name = f"minires_kernels_from_{path.stem}_{len(_KERNELS)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file: its name must end in .py")
    before = set(_KERNELS)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file raises is what is wrong with it
        for key in set(_KERNELS) - before:
            forget(*key)
        raise ImportError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    added = tuple(entry for key, entry in _KERNELS.items() if key not in before)
    if not added:
        raise ValueError(f"{path} registers no kernel: decorate a function with @kernel(PROBLEM, device=..., ...)")
    return added


def problems() -> list[Problem]:
    """All problems that have a kernel, by name."""
    return [_PROBLEMS[name] for name in sorted(_PROBLEMS)]


def problem(name: str) -> Problem:
    """The problem of that name; KeyError with the known names where there is none."""
    if name not in _PROBLEMS:
        raise KeyError(f"no problem is named {name!r}; known: {', '.join(sorted(_PROBLEMS))}")
    return _PROBLEMS[name]


@functools.cache
def kernels(problem: str | None = None, device: str | None = None) -> tuple[Kernel, ...]:
    """Registered kernels, by problem, device and step."""
    found = [k for k in _KERNELS.values() if problem in (None, k.problem.name) and device in (None, k.device)]
    return tuple(sorted(found, key=lambda k: (k.problem.name, k.device, k.step, k.name)))


def pairs(tag: str, device: str | None = None) -> Iterator[tuple[Kernel, Case]]:
    """Every kernel with every case of its problem that carries `tag`. Ask `Kernel.takes` with the inputs."""
    for k in kernels(device=device):
        for case in k.problem.cases:
            if tag in case.tags:
                yield k, case
