"""The units of work of `gpu_report`: each a generator of rows, run in a process of its own on a machine with a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from minires.kernels import registry  # pyright: ignore[reportMissingImports]
from minires.kernels.checking import Trial, check_case, dtypes_of  # pyright: ignore[reportMissingImports]

from .gpu_blocks import BLOCKS, blocks
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


def end_to_end(argument: str) -> Iterator[Row]:
    """`minires train` of a shipped recipe on the GPU; the images come from $MINIRES_DATA, decoded first."""
    from minires.train.loop import train
    from minires.train.recipe import load_recipe

    recipe, seed, precision = argument.split(":")
    data = Path(os.environ.get("MINIRES_DATA", ".")) / "cifar10-jpg.tar.xz"
    if not data.exists():
        yield {"recipe": recipe, "skipped": "MINIRES_DATA names no folder with cifar10-jpg.tar.xz"}
        return
    out = Path(os.environ.get("MINIRES_RUNS", "runs")) / f"gpu-report-{recipe}-{seed}-{precision}-{os.getpid()}"
    changes: dict[str, Any] = dict(dataset="folder", data_dir=str(data), device="cuda", seed=int(seed), out=str(out))
    notes: list[str] = []
    summary = train(load_recipe(recipe, changes | dict(precision=precision, cuda_graphs=True)), on_note=notes.append)
    row = {"recipe": recipe, "seed": int(seed), "precision": precision, "test_accuracy": summary.test_accuracy}
    row |= {"seconds": summary.seconds, "images_per_s": summary.images_per_second, "steps": summary.steps}
    yield row | {"notes": [note for note in notes if "CUDA graphs" in note]}


SECTIONS = {
    "primitives": Section(lambda: list(PRIMITIVES), primitives, 60),
    "check": Section(_kernel_names, check, 120),
    "replays": Section(lambda: list(REPLAYS), replays, 240),
    "blocks": Section(lambda: list(BLOCKS), blocks, 240),
    "training": Section(training_names, training, 240),
    "layers": Section(layer_names, layers, 90),
    "conformance": Section(_kernel_names, conformance, 300),
    "inference": Section(inference_names, inference, 180),
    "end_to_end": Section(
        lambda: ["cifar10-short:0:bf16", "cifar10-short:0:fp32", "cifar10-short:1:bf16"], end_to_end, 900
    ),
}

__all__ = ["SECTIONS", "Section", "run_unit"]
