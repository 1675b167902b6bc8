"""The units of work of `gpu_report`: each a generator of rows, run in a process of its own on a machine with a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from minires.kernels import registry  # pyright: ignore[reportMissingImports]
from minires.kernels.checking import Trial, check_case, dtypes_of  # pyright: ignore[reportMissingImports]

from .gpu_blocks import BLOCKS, blocks
from .gpu_end_to_end import end_to_end, end_to_end_names
from .gpu_layers import layer_names, layers
from .gpu_primitives import PRIMITIVES, primitives
from .gpu_steps import REPLAYS, inference, inference_names, replays, training, training_names

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """arguments() of the units; run(argument) yields rows; seconds that one may take."""

    arguments: Callable[[], list[str]]
    run: Callable[[str], Iterator[Row]]
    seconds: float


def run_unit(name: str) -> Iterator[Row]:
    """The rows of the unit "section/argument"."""
    section, _, argument = name.partition("/")
    yield from SECTIONS[section].run(argument)


def _kernel_names() -> list[str]:
    return [f"{k.problem.name}:{k.name}" for k in registry.kernels(device="cuda")]


def _kernel(name: str) -> Any:
    problem, _, own = name.partition(":")
    return next(k for k in registry.kernels(problem, "cuda") if k.name == own)


def _test_cases(kernel: Any) -> list[Any]:
    return [case for case in kernel.problem.cases if "test" in case.tags]


def conformance(argument: str) -> Iterator[Row]:
    """The kernel's results on the GPU beside the interpreter's: cases that are equal bit for bit, and the largest
    difference of the others, in units of the bound."""
    from minires.kernels.cuda.gpu import from_host  # pyright: ignore[reportMissingImports]

    kernel = _kernel(argument)
    there = from_host(kernel)
    for dtype in dtypes_of(kernel):
        equal = cases = 0
        worst = 0.0
        for case in _test_cases(kernel):
            trial = Trial(kernel.problem, case, dtype)
            if trial.suits(kernel):
                real, interpreted = trial.run(there, "channels_last"), trial.run(kernel, "channels_last")
                cases += 1
                same = all(map(_same, real, interpreted))
                equal += same
                if not same:
                    worst = max(worst, trial.compare(real, kernel))
        yield {"kernel": argument, "dtype": dtype, "cases": cases, "bitwise_equal": equal, "worst_eps": worst}


def _same(a: Any, b: Any) -> bool:
    return a is b or np.asarray(a).tobytes() == np.asarray(b).tobytes()


def check(argument: str) -> Iterator[Row]:
    """The kernel on the GPU against its definition, in every dtype and layout; raises where it is wrong."""
    from minires.kernels.cuda.gpu import from_host  # pyright: ignore[reportMissingImports]

    kernel = from_host(_kernel(argument))
    results = [result for case in _test_cases(kernel) for result in check_case(kernel, case)]
    wrong = [result for result in results if not result.ok]
    worst = max((result.worst for result in results if result.ok), default=0.0)
    yield {"kernel": argument, "checks": len(results), "wrong": len(wrong), "worst_eps": round(worst, 3)}
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(results)} checks fail, the first: {wrong[0]}")


SECTIONS = {
    "primitives": Section(lambda: list(PRIMITIVES), primitives, 60),
    "check": Section(_kernel_names, check, 120),
    "replays": Section(lambda: list(REPLAYS), replays, 240),
    "blocks": Section(lambda: list(BLOCKS), blocks, 240),
    "training": Section(training_names, training, 240),
    "layers": Section(layer_names, layers, 90),
    "conformance": Section(_kernel_names, conformance, 300),
    "inference": Section(inference_names, inference, 180),
    "end_to_end": Section(end_to_end_names, end_to_end, 900),
}

__all__ = ["SECTIONS", "Section", "run_unit"]
