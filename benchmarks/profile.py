"""Where the time of a network's step goes: kernel by kernel beside its floor, and what passes outside of kernels.

The floor of a call is what its problem needs at least: its multiply-adds at the machine's peak or its bytes at the
speed of a copy, whichever takes longer. (A Winograd kernel multiplies less, what lies in a cache is read faster than a
copy from memory: both may fall below it.) A call's time is its median over the steps, at its place within the step.

On one thread the processor's time of that thread is taken, so that other work on the machine hardly counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from minires.kernels.cpu.features import has_bfloat16_products  # pyright: ignore[reportMissingImports]
from minires.kernels.cpu.jit import get_num_threads  # pyright: ignore[reportMissingImports]

import minires
from minires import dispatch
from minires.hooks.base import table

from .contestants import CONTESTANTS, Setting
from .layers import NETWORKS
from .peaks import Peaks, measure
from .provenance import write

WHAT, PRECISIONS = ("train", "infer"), ("fp32", "bf16")
GROUP = ("model", "batch", "size", "what", "precision")
OUTSIDE, TOTAL = "outside of kernels", "the step"
_MANY = 6  # arrays that are told one by one


@dataclass(frozen=True)
class Call:
    """A call of a kernel; flops and bytes as its problem counts them."""

    problem: str
    kernel: str
    shapes: str
    flops: int
    moved: int
    dtype: str

    def floor(self, peaks: Peaks) -> float:
        """Seconds that it takes at least."""
        return peaks.floor(self.flops, self.moved, self.dtype == "bfloat16" and has_bfloat16_products())


@dataclass
class Line:
    """Calls that are told together. ms, floor (in ms), flops, moved: of all of them, within one step."""

    calls: int = 0
    ms: float = 0.0
    floor: float = 0.0
    flops: int = 0
    moved: int = 0

    def add(self, call: Call, ms: float, peaks: Peaks) -> None:
        """One more call."""
        self.calls, self.ms, self.floor = self.calls + 1, self.ms + ms, self.floor + 1e3 * call.floor(peaks)
        self.flops, self.moved = self.flops + call.flops, self.moved + call.moved


def profile(
    model: str,
    /,
    *,
    what: str = "train",
    precision: str = "fp32",
    batch: int = 0,
    size: int = 0,
    steps: int = 10,
    lines: int = 40,
    output: Path | None = None,
) -> None:
    """Tell where the time of a training step, or of inference, of the network MODEL goes.

    Parameters
    ----------
    what
        train (forward, backward, SGD) or infer.
    precision
        fp32 or bf16.
    batch
        Images per step; 0: as the benchmark of networks has it, else 1.
    size
        Their height and width; 0: as the benchmark of networks has it, else the model's own.
    steps
        That are timed.
    lines
        Of kernels at their shapes that are printed, the longest first; the file has all.
    output
        The CSV file to write, instead of one named after this machine in benchmarks/results.
    """
    for name, value, known in (("what", what, WHAT), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise ValueError(f"--{name} {value!r} is not one of {', '.join(known)}")
    if min(batch, size, lines, steps - 1) < 0:
        raise ValueError(f"--steps {steps} must be at least 1, --batch {batch}, --size {size}, --lines {lines} 0")
    usual_batch, usual_size = NETWORKS.get(model, (1, 0))
    threads, batch = get_num_threads(), batch or usual_batch
    size = size or usual_size or minires.models.create_model(model).image_size
    begin = CONTESTANTS["minires"][1](Setting(model, batch, size, threads, precision == "bf16"), what == "train")
    step, _ = begin()
    for _ in range(2):  # the first compiles, and records inference, the second checks the recording
        step()
    peaks, calls = measure(), calls_of(step)
    seconds, totals = times_of(step, steps, time.thread_time if threads == 1 else time.perf_counter)
    if any(len(one) != len(calls) for one in seconds):
        raise RuntimeError("the steps do not run the same kernels: a profile needs a step that repeats")
    print(f"{model}, batch {batch}, {size}x{size}, {what}, {precision}, {threads} threads; {peaks}")
    ms, total = 1e3 * np.median(seconds, axis=0), 1e3 * float(np.median(totals))
    by_problem, by_shape = {}, {}
    whole, rest = Line(), Line(ms=total - float(ms.sum()))
    for call, spent in zip(calls, ms, strict=True):
        by_problem.setdefault((call.problem,), Line()).add(call, float(spent), peaks)
        by_shape.setdefault((call.problem, call.kernel, call.shapes), Line()).add(call, float(spent), peaks)
        whole.add(call, 0.0, peaks)
    whole.ms = total
    _print(("problem",), {**_longest(by_problem), (OUTSIDE,): rest, (TOTAL,): whole}, total)
    _print(("problem", "kernel", "shapes"), dict([*_longest(by_shape).items()][:lines]), total)

    by_shape = {**_longest(by_shape), (OUTSIDE, "", ""): rest, (TOTAL, "", ""): whole}
    rows = [
        dict(model=model, batch=batch, size=size, what=what, precision=precision, steps=steps)
        | dict(zip(("problem", "kernel", "shapes"), key, strict=True))
        | dict(calls=line.calls, flops=line.flops, bytes=line.moved, ms=f"{line.ms:.4g}")
        | dict(share=f"{line.ms / total:.4f}", floor_ms=f"{line.floor:.4g}")
        | peaks.columns()
        for key, line in by_shape.items()
    ]
    print(f"\nwritten to {write('profile', rows, threads, output, group=GROUP)}")


def calls_of(step: Callable[[], Any]) -> list[Call]:
    """The calls of kernels in one step, in their order."""
    calls = []

    def noted(kernel: Any) -> Callable[..., Any]:
        def run(*arrays: Any, **params: Any) -> Any:
            problem = kernel.problem
            flops, moved = problem.flops(*arrays, **params), problem.bytes_moved(*arrays, **params)
            dtype = next((a.dtype.name for a in arrays if a is not None), "")
            calls.append(Call(problem.name, kernel.name, _shapes(arrays, params), flops, moved, dtype))
            return kernel(*arrays, **params)

        return run

    with dispatch.observe(noted):
        step()
    return calls


def times_of(step: Callable[[], Any], n: int, clock: Callable[[], float]) -> tuple[list[list[float]], list[float]]:
    """Run the step n times: for each the seconds of every call of a kernel, and the seconds of the whole."""
    seconds, totals = [], []

    def timed(kernel: Any) -> Callable[..., Any]:
        def run(*arrays: Any, **params: Any) -> Any:
            start = clock()
            result = kernel(*arrays, **params)
            seconds[-1].append(clock() - start)
            return result

        return run

    with dispatch.observe(timed):
        for _ in range(n):
            seconds.append([])
            start = clock()
            step()
            totals.append(clock() - start)
    return seconds, totals


def _shapes(arrays: Sequence[Any], params: dict[str, Any]) -> str:
    """Of the arrays of two axes and more, and the stride: "8x64x56x56 256x64x1x1". Only a count where they are many."""
    shapes = ["x".join(map(str, a.shape)) for a in arrays if a is not None and a.ndim > 1]
    if len(shapes) > _MANY:
        return f"{len(shapes)} arrays"
    stride = params.get("stride", (1, 1))
    return " ".join(shapes) + (f" stride {stride[0]}" if stride not in ((1, 1), 1) else "")


def _longest(lines: dict[tuple[str, ...], Line]) -> dict[tuple[str, ...], Line]:
    return dict(sorted(lines.items(), key=lambda item: -item[1].ms))


def _print(titles: tuple[str, ...], lines: dict[tuple[str, ...], Line], total: float) -> None:
    rows = []
    for key, line in lines.items():
        floor = (f"{line.floor:.2f}", f"{line.floor / line.ms:.0%}" if line.ms > 0 else "") if line.floor else ("", "")
        rows.append((*key, str(line.calls or ""), f"{line.ms:.2f}", f"{line.ms / total:.1%}", *floor))
    n = len(titles)
    print()
    print(table((*titles, "calls", "ms", "share", "floor ms", "of floor"), rows, range(n, n + 5)))
