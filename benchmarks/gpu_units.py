"""The units of work of `gpu_report`: each a generator of rows, run in a process of its own on a machine with a GPU."""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from minires.kernels import registry  # pyright: ignore[reportMissingImports]
from minires.kernels.checking import Trial, check_case, dtypes_of  # pyright: ignore[reportMissingImports]
from minires.kernels.timing import timing  # pyright: ignore[reportMissingImports]

from .cudnn_peer import cudnn_conv
from .gpu_blocks import BLOCKS, blocks
from .gpu_primitives import PRIMITIVES, primitives
from .gpu_steps import REPLAYS, inference, inference_names, replays, training, training_names

Row = dict[str, Any]
_DRAWN = (1 << 24) - 3  # numbers drawn on the host, repeated from there on at no round distance
_L2 = 256 << 20  # bytes written between calls: more than any second-level cache

# Convolutions of ResNet-50 at batch 256 and of ResNet-20 at batch 128: C, H = W, K, R = S, stride.
RESNET50 = {
    "stem": (3, 224, 64, 7, 2),
    "reduce56": (256, 56, 64, 1, 1),
    "same56": (64, 56, 64, 3, 1),
    "expand56": (64, 56, 256, 1, 1),
    "down28": (128, 56, 128, 3, 2),
    "same28": (128, 28, 128, 3, 1),
    "expand28": (128, 28, 512, 1, 1),
    "project28": (256, 56, 512, 1, 2),
    "same14": (256, 14, 256, 3, 1),
    "expand14": (256, 14, 1024, 1, 1),
    "same7": (512, 7, 512, 3, 1),
    "expand7": (512, 7, 2048, 1, 1),
}
RESNET20 = {"cifar16": (16, 32, 16, 3, 1), "cifar32": (32, 16, 32, 3, 1), "cifar64": (64, 8, 64, 3, 1)}
BATCH = {**dict.fromkeys(RESNET50, 256), **dict.fromkeys(RESNET20, 128)}


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


def gpu_name() -> str:
    """The name of the GPU; RuntimeError says what is missing where there is none."""
    from minires.device import array_module, device

    xp: Any = array_module(device("cuda"))
    return xp.cuda.runtime.getDeviceProperties(0)["name"].decode()


def driver() -> str:
    """The newest CUDA that the driver knows, such as "13.0"."""
    cupy: Any = importlib.import_module("cupy")
    major, rest = divmod(cupy.cuda.runtime.driverGetVersion(), 1000)
    return f"{major}.{rest // 10}"


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


DIRECTIONS = ("fprop", "dgrad", "wgrad")


def _layer_names() -> list[str]:
    return [
        f"{layer}:{direction}:{dtype}"
        for dtype in ("float32", "bfloat16")
        for layer in (*RESNET50, *RESNET20)
        for direction in DIRECTIONS
    ]


def layers(argument: str) -> Iterator[Row]:
    """A convolution by every kernel of ours from step 3 on, and by cuDNN's plans; each is compared with step 3's result
    before it is timed."""
    layer, direction, dtype = argument.split(":")
    if dtype == "float32":
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # fp32 means fp32 on both sides
    cupy: Any = importlib.import_module("cupy")
    n, (c, size, k, taps, stride) = BATCH[layer], (RESNET50 | RESNET20)[layer]
    arrays, params, flops = _conv_inputs(cupy, direction, dtype, n, c, size, k, taps, stride)
    calls: dict[str, Callable[[], Any]] = {}
    allowed: dict[str, float] = {}
    for kernel in registry.kernels(f"conv2d_{direction}", "cuda"):
        if kernel.step >= 3 and kernel.takes(*arrays, **params):
            allowed[kernel.name] = max(1e-4, kernel.error_factor * 2.0**-22)
            calls[kernel.name] = lambda kernel=kernel: kernel(*arrays, **params)
    wanted = next(iter(calls.values()))()
    scale = float(cupy.abs(wanted.astype("float32")).max())
    plans, reason = cudnn_conv(cupy, direction, dtype, arrays, params)
    errors = {}
    for name, call in list((calls | plans).items()):
        off = float(cupy.abs(call().astype("float32") - wanted.astype("float32")).max()) / scale
        errors[name] = off
        if not off < (0.02 if dtype == "bfloat16" else allowed.get(name, 1e-4)):
            calls.pop(name, None)
            plans.pop(name, None)
            yield {"layer": layer, "direction": direction, "dtype": dtype, "kernel": name, "wrong_by": off}
    times = on_gpu(cupy, calls | plans, seconds=2.0)
    best = min((t.median for name, t in times.items() if name in plans), default=None)
    for name, t in sorted(times.items(), key=lambda item: item[1].median)[:8]:
        row = {"layer": layer, "direction": direction, "dtype": dtype, "kernel": name, "n": t.n}
        row |= {"median_us": round(t.median * 1e6, 2), "p20_us": round(t.p20 * 1e6, 2), "p80_us": round(t.p80 * 1e6, 2)}
        row |= {"tflop_per_s": round(flops / t.median / 1e12, 2), "relative_difference": float(f"{errors[name]:.2g}")}
        yield row | {"cudnn_best_over_this": None if best is None else round(best / t.median, 3), "cudnn": reason}


def _conv_inputs(cupy: Any, direction: str, dtype: str, n: int, c: int, size: int, k: int, taps: int, stride: int):
    """(arrays, params, flops), activations channels-last in memory, random and of a size that keeps sums near 1."""
    pad, rng = (
        taps // 2,
        np.random.default_rng(0),
    )  # NumPy's: CuPy's generator needs cuRAND, which is not ours to ask for
    p = (size + 2 * pad - taps) // stride + 1

    def draw(*shape: int, scale: float = 1.0) -> Any:
        few = rng.standard_normal(min(math.prod(shape), _DRAWN), dtype=np.float32)
        values = cupy.tile(cupy.asarray(scale * few), -(-math.prod(shape) // few.size))[: math.prod(shape)]
        return values.astype(np.dtype(dtype)).reshape(shape).transpose(0, 3, 1, 2)

    x, dy = (lambda: draw(n, size, size, c)), (lambda: draw(n, p, p, k))
    w = cupy.ascontiguousarray(draw(k, taps, taps, c, scale=(c * taps * taps) ** -0.5))
    geometry = dict(stride=(stride, stride), padding=(pad, pad), dilation=(1, 1), groups=1)
    flops = 2 * n * p * p * k * c * taps * taps
    if direction == "fprop":
        return (x(), w), geometry, flops
    if direction == "dgrad":
        return (dy(), w), geometry | dict(input_hw=(size, size)), flops
    return (x(), dy()), geometry | dict(kernel_hw=(taps, taps)), flops


def on_gpu(cupy: Any, calls: dict[str, Callable[[], Any]], seconds: float, least: int = 5) -> dict[str, Any]:
    """Seconds per call by events on the GPU, round by round, each after the second-level cache was overwritten."""
    waste = cupy.empty(_L2, cupy.uint8)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    cupy.cuda.Device().synchronize()
    stop = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < stop:
        for name, call in calls.items():
            waste.fill(rounds & 255)
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record()
            call()
            end.record()
            end.synchronize()
            samples[name].append(cupy.cuda.get_elapsed_time(begin, end) / 1e3)
        rounds += 1
    return {name: timing(s) for name, s in samples.items()}


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
    "layers": Section(_layer_names, layers, 90),
    "conformance": Section(_kernel_names, conformance, 300),
    "inference": Section(inference_names, inference, 180),
    "end_to_end": Section(
        lambda: ["cifar10-short:0:bf16", "cifar10-short:0:fp32", "cifar10-short:1:bf16"], end_to_end, 900
    ),
}

__all__ = ["SECTIONS", "Section", "driver", "gpu_name", "on_gpu", "run_unit"]
