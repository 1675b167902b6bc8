"""The check of one kernel on one case, for tests, benchmarks and `minires kernels check` alike.

A result is right where |got - definition| <= error_factor * eps * error_scale, elementwise, the definition computed in
float64 from the same rounded inputs. That bound accepts what the dtype can lose and nothing more: a silent TF32, a
forgotten tile or a biased statistic are far outside it. What else a kernel can get wrong has a name of its own:

    signature           its parameters are not those of the definition
    raised              it raised an exception
    shape, dtype        an output has another shape or dtype than the definition's
    unwritten output    an element that came from `memory.empty` (poisoned here) was never written, or was read before
    wrong value         outside the bound
    input changed       it wrote into an argument, or into memory between an argument's elements
    not deterministic   a second run, on one thread, gives other bits
    stale output        a later call changes an earlier result, or gets a stale one itself
    non-finite lost     a NaN in an input does not show in the output
    layout              right on contiguous arrays, wrong on the same values in other strides
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from .cpu.jit import get_num_threads, set_num_threads
from .memory import fill_poison, is_float, is_poison, poisoned
from .registry import HALVES, Case, Kernel, Problem, computed_in

DTYPES = ("float32", "float64")
LAYOUTS = ("contiguous", "channels_last", "strided")


@dataclass(frozen=True)
class Result:
    """What a check found. worst: the largest error, in units of eps * error_scale, as far as the check got.
    failure: a name of the list at this page's head, or "" where the kernel is right. detail: what was seen."""

    kernel: Kernel
    case: Case
    dtype: str
    layout: str
    worst: float = 0.0
    failure: str = ""
    detail: str = ""

    @property
    def ok(self) -> bool:
        return not self.failure

    def __str__(self) -> str:
        verdict = f"right, worst {self.worst:.2g} eps" if self.ok else f"{self.failure}: {self.detail}"
        return f"{self.kernel.problem.name}/{self.kernel.name} {self.case.name} {self.dtype} {self.layout}: {verdict}"


class Wrong(Exception):
    """A kernel failed a check: `failure` is the check's name, the message what was seen."""

    def __init__(self, failure: str, detail: str):
        super().__init__(detail)
        self.failure = failure


def check(
    kernel: Kernel, case: Case, dtype: str = "float32", layout: str = "contiguous", seed: int = 0, trial: Any = None
) -> Result:
    """Check `kernel` on one case, dtype and layout; ValueError where it does not take them.

    trial: a `Trial` of the same arguments, to share its definition.
    """
    trial = trial or Trial(kernel.problem, case, dtype, seed)
    if not trial.suits(kernel):
        raise ValueError(f"{kernel.name} does not take the case {case.name!r} in {dtype}")
    try:
        return Result(kernel, case, dtype, layout, _examine(kernel, trial, layout))
    except Wrong as wrong:
        failure, detail = wrong.failure, str(wrong)
    if layout != "contiguous" and check(kernel, case, dtype, "contiguous", seed, trial).ok:
        failure, detail = "layout", f"right on contiguous arrays, but {layout} gives {failure}: {detail}"
    return Result(kernel, case, dtype, layout, float("nan"), failure, detail)


def dtypes_of(kernel: Kernel) -> tuple[str, ...]:
    """The dtypes that a kernel is checked in."""
    return DTYPES if kernel.dtypes == ("any",) else kernel.dtypes


def check_case(kernel: Kernel, case: Case, seed: int = 0) -> Iterator[Result]:
    """Check `kernel` on one case in every dtype and layout that it takes; nothing where it does not take the case."""
    for dtype in dtypes_of(kernel):
        trial = Trial(kernel.problem, case, dtype, seed)
        if trial.suits(kernel):
            for layout in LAYOUTS:
                if layout != "channels_last" or any(a is not None and a.ndim == 4 for a in trial.arrays.values()):
                    yield check(kernel, case, dtype, layout, seed, trial)


class Trial:
    """One case in one dtype: the inputs and, computed when first asked for, what the definition makes of them.

    With a dtype of 16 bits the problem's `wide` arguments are float32.

    arrays: inputs by name, C-order. params: keyword parameters. wanted: the outputs, in float64, as a tuple.
    """

    def __init__(self, problem: Problem, case: Case, dtype: str, seed: int = 0):
        self.problem, self.case, self.dtype, self.seed = problem, case, dtype, seed
        arrays, self.params = problem.inputs(case, np.random.default_rng(seed))
        wide = {name: computed_in(dtype) for name in problem.wide}
        self.arrays = {name: _cast(a, wide.get(name, dtype)) for name, a in arrays.items()}
        self._wanted: Any = None
        self._scales: dict[Any, tuple] = {}  # by the function that computes them

    def suits(self, kernel: Kernel) -> bool:
        """Whether the kernel takes these inputs."""
        return kernel.takes(*self.arrays.values(), **self.params)

    @property
    def output_dtypes(self) -> tuple[str, ...]:
        """The dtypes of the outputs, or of what is in their place where the definition gives no float."""
        if self.problem.writes:
            return tuple(a.dtype.name for a in self._written(self.arrays, None))
        if self.problem.output_dtypes is None:
            return (self.dtype,) * len(self.wanted)
        return self.problem.output_dtypes(self.dtype, **self.params)

    @property
    def wanted(self) -> tuple:
        if self._wanted is None:
            self._wanted = self.define(self.arrays)
        return self._wanted

    def scale(self, kernel: Kernel) -> tuple:
        """What the kernel's errors are relative to: its own error scale, or the problem's."""
        function = kernel.error_scale or self.problem.error_scale
        if function not in self._scales:
            arrays = [_cast(a, "float64") for a in self.arrays.values()]
            self._scales[function] = _as_tuple(function(*arrays, **self.params))
        return self._scales[function]

    def define(self, arrays: dict) -> tuple:
        """The definition's outputs for these values, in float64."""
        values = [_cast(a, "float64") for a in arrays.values()]
        with np.errstate(all="ignore"):
            returned = self.problem.reference(*values, **self.params)
        return _as_tuple(self._written(dict(zip(arrays, values, strict=True)), returned))

    def _written(self, arrays: dict, returned: Any) -> Any:
        if not self.problem.writes:
            return returned
        return tuple(a for name, a in arrays.items() if a is not None and self.problem.overwrites(name))

    def run(self, kernel: Callable[..., Any], layout: str = "contiguous", arrays: dict | None = None) -> tuple:
        """The kernel's outputs for copies of the inputs in `layout`. Wrong where it raises or changes an input."""
        copies, buffers = {}, {}
        for name, a in (self.arrays if arrays is None else arrays).items():
            copies[name], buffers[name] = (None, None) if a is None else lay_out(a, layout)
            if layout == "strided" and a is not None and a.ndim and not self.problem.overwrites(name):
                copies[name].flags.writeable = False  # as gradients made by np.broadcast_to are
        before = {name: b.copy() for name, b in buffers.items() if b is not None}
        try:
            with np.errstate(all="ignore"):
                returned = kernel(*copies.values(), **self.params)
        except Exception as error:  # whatever a kernel raises is the verdict on it
            raise Wrong("raised", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
        for name, old in before.items():
            if self.problem.overwrites(name):  # its elements are the output; what lies between them is not
                lay_out_as(buffers[name], old, copies[name])
            if buffers[name].tobytes() != old.tobytes():
                raise Wrong("input changed", f"{name} is not what it was before the call")
        return _as_tuple(self._written(copies, returned))

    def compare(self, got: tuple, kernel: Kernel) -> float:
        """The largest error in units of eps * error_scale. Raises Wrong where an output is not what was wanted."""
        if len(got) != len(self.wanted):
            raise Wrong("shape", f"it returns {len(got)} outputs, not {len(self.wanted)}")
        worst = 0.0
        outputs = zip(got, self.wanted, self.scale(kernel), self.output_dtypes, strict=True)
        for i, (y, want, scale, dtype) in enumerate(outputs):
            label = f"output {i}: " if len(got) > 1 else ""
            if (y is None) != (want is None):
                raise Wrong("shape", f"{label}{'None' if y is None else 'an array'}, which the definition has not")
            if y is not None:
                found = np.asarray(y), np.asarray(want)
                worst = max(worst, self._compare_one(*found, scale, dtype, kernel.error_factor, label))
        return worst

    def _compare_one(self, y: Any, want: Any, scale: Any, dtype: str, error_factor: float, label: str) -> float:
        integral = want.dtype.kind in "iub"
        if y.shape != want.shape:
            raise Wrong("shape", f"{label}{y.shape}, not {want.shape}")
        expected = want.dtype if integral else np.dtype(dtype)
        if y.dtype != expected and (self.problem.exact_dtype or y.dtype.kind != expected.kind):
            raise Wrong("dtype", f"{label}{y.dtype}, not {expected}")
        if (unwritten := is_poison(y) & (y != want)).any():
            at = tuple(map(int, np.argwhere(unwritten)[0]))
            raise Wrong("unwritten output", f"{label}{unwritten.sum()} of {y.size} elements, the first at {at}")
        if integral:
            error, allowed = (y != want).astype(float), 0.0
        else:
            allowed, limits, y = error_factor, ml_dtypes.finfo(dtype), y.astype(np.float64)
            if dtype in HALVES:  # computed in float32, and rounded once
                allowed = min(allowed, 1.0)
            with np.errstate(all="ignore"):
                # A product that underflows is off by the least subnormal number, eps * tiny; an exact output never is.
                units = float(limits.eps) * (scale + np.where(scale > 0, float(limits.tiny), 0))
                error = np.abs(y - want) / np.broadcast_to(units, want.shape)
            # Where they are equal the quotient may be 0/0 (the scale says that the value is exact) or inf - inf.
            error = np.where((y == want) | (np.isnan(want) & np.isnan(y)), 0.0, error)
        worst = float(error.max(initial=0.0))
        if not worst <= allowed:
            at = tuple(map(int, np.unravel_index(np.argmax(error), error.shape)))
            unit = "" if integral else f" (worst {worst:.3g} eps; allowed {allowed:g})"
            raise Wrong("wrong value", f"{label}{y[at]} instead of {want[at]} at {at}{unit}")
        return worst


def lay_out(a: np.ndarray, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """A copy of `a` in a layout, and the buffer that holds it.

    "contiguous": C order. "channels_last": a 4-D array's memory in the order (0, 2, 3, 1). "strided": every other
    element of a buffer twice as large, backwards along the first axis, with other numbers in between.
    """
    if layout == "channels_last" and a.ndim == 4:
        buffer = a.transpose(0, 2, 3, 1).copy()
        return buffer.transpose(0, 3, 1, 2), buffer
    if layout == "strided" and a.ndim:
        buffer = np.repeat(a, 2, axis=-1)
        view = buffer[..., ::2][::-1]
        buffer[..., 1::2] = 1 if a.dtype.kind in "iub" else 1e3
        view[...] = a
        return view, buffer
    buffer = np.array(a, order="C")
    return buffer, buffer


def lay_out_as(buffer: np.ndarray, old: np.ndarray, view: np.ndarray) -> None:
    """Make `old`, a copy of `buffer`, agree with it in the elements that `view` shows."""
    offset = view.__array_interface__["data"][0] - buffer.__array_interface__["data"][0]
    np.ndarray(view.shape, view.dtype, old, offset, view.strides)[...] = view


def _examine(kernel: Kernel, trial: Trial, layout: str) -> float:
    """Run every check; returns the worst error, or raises Wrong."""
    _same_signature(kernel)
    _stir_heap(trial)
    with poisoned():
        first = trial.run(kernel, layout)
    worst = trial.compare(first, kernel)
    kept = [None if y is None else np.array(y) for y in first]

    threads = get_num_threads()
    set_num_threads(1)
    try:
        again = trial.run(kernel, layout)
    finally:
        set_num_threads(threads)
    if not all(map(_same_bits, kept, again)):
        raise Wrong("not deterministic", f"two runs, on {threads} threads and on one, give different bits")

    other = Trial(trial.problem, trial.case, trial.dtype, trial.seed + 1)
    outputs = other.run(kernel, layout)
    try:
        worst = max(worst, other.compare(outputs, kernel))
    except Wrong:
        _not_of_earlier_inputs(outputs, other, trial, kernel)
        raise
    if not all(map(_same_bits, kept, first)):
        raise Wrong("stale output", "a later call writes into the arrays that an earlier one returned")
    _keeps_nan(kernel, trial, layout)
    return worst


def _not_of_earlier_inputs(outputs: tuple, now: Trial, earlier: Trial, kernel: Kernel) -> None:
    """Raises Wrong if a wrong result is the right one for some of the earlier call's inputs: something was kept."""
    names = [name for name, a in now.arrays.items() if a is not None]
    for chosen in itertools.product((False, True), repeat=len(names)):
        kept = [name for name, keep in zip(names, chosen, strict=True) if keep]
        mixed = Trial(now.problem, now.case, now.dtype, now.seed)
        mixed.arrays |= {name: earlier.arrays[name] for name in kept}
        try:
            mixed.compare(outputs, kernel)
        except Wrong:
            continue
        raise Wrong("stale output", f"the result is that for an earlier call's {' and '.join(kept)}")


def _same_signature(kernel: Kernel) -> None:
    mine, wanted = (
        [(p.name, p.kind) for p in inspect.signature(fn).parameters.values()]
        for fn in (kernel.fn, kernel.problem.reference)
    )
    if mine != wanted:
        have, want = (inspect.signature(fn) for fn in (kernel.fn, kernel.problem.reference))
        raise Wrong("signature", f"it takes {have}, the definition {want}")


def _stir_heap(trial: Trial) -> None:
    """Leave poison in the memory that an output probably gets next, for kernels that use np.empty."""
    outputs = zip(trial.wanted, trial.output_dtypes, strict=True)
    waste = [np.zeros(y.shape, dtype if is_float(y.dtype) else y.dtype) for y, dtype in outputs if y is not None]
    for array in waste:
        fill_poison(array)


def _keeps_nan(kernel: Kernel, trial: Trial, layout: str) -> None:
    """A NaN in the first argument shows wherever the definition has it. One in another argument shows somewhere: the
    definition also has it where only a padding zero met it, and a kernel may leave those products out."""
    for i, (name, a) in enumerate(trial.arrays.items()):
        if a is None or not is_float(a.dtype) or not a.size:
            continue
        arrays = trial.arrays | {name: a.copy()}
        arrays[name].flat[a.size // 2] = np.nan
        got, wanted = trial.run(kernel, layout, arrays), trial.define(arrays)
        pairs = [(y, np.isnan(w)) for y, w in zip(got, wanted, strict=True) if w is not None and is_float(w.dtype)]
        if i > 0 and any(np.isnan(y).any() for y, _ in pairs):
            continue
        for y, should in pairs:
            if (lost := should & ~np.isnan(y)).any():
                at = tuple(map(int, np.argwhere(lost)[0]))
                raise Wrong("non-finite lost", f"with a NaN in {name} the output at {at} is {y[at]}, and should be NaN")


def _same_bits(a: Any, b: Any) -> bool:
    return a is b or np.array_equal(a, b, equal_nan=is_float(a.dtype))


def _cast(a: Any, dtype: str) -> Any:
    return a if a is None or not is_float(a.dtype) else a.astype(dtype)


def _as_tuple(outputs: Any) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)
