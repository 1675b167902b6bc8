"""Convolutions of ResNets on a GPU: our ladder, kernels of one's own, and cuDNN's plans, checked and timed in turn.

`python -m benchmarks conv2d --device cuda` runs what `gpu_report` runs layer by layer; both leave rows of one kind, of
which `python -m benchmarks readme` makes the README's ladder.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from minires.kernels import registry  # pyright: ignore[reportMissingImports]
from minires.kernels.timing import timing  # pyright: ignore[reportMissingImports]

from .cudnn_peer import cudnn_conv
from .layers import geometric_mean
from .provenance import ON_GPU, RESULTS, versions, write

Row = dict[str, Any]
_DRAWN = (1 << 24) - 3  # numbers drawn on the host, repeated from there on at no round distance
_L2 = 256 << 20  # bytes written between calls: more than any second-level cache
_PLANS = 3  # of cuDNN, in the results

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


DIRECTIONS = ("fprop", "dgrad", "wgrad")


def layer_names() -> list[str]:
    return [
        f"{layer}:{direction}:{dtype}"
        for dtype in ("float32", "bfloat16")
        for layer in (*RESNET50, *RESNET20)
        for direction in DIRECTIONS
    ]


def layers(argument: str, own: Sequence[Any] = (), least: int = 3, seconds: float = 2.0) -> Iterator[Row]:
    """A convolution by every kernel of ours from step `least` on, by `own` ones, and by cuDNN's plans; each is compared
    with the result of the first step from 3 on before it is timed. Rows: the fastest first, of cuDNN's plans three."""
    layer, direction, dtype = argument.split(":")
    if dtype == "float32":
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # fp32 means fp32 on both sides
    cupy: Any = importlib.import_module("cupy")
    n, (c, size, k, taps, stride) = BATCH[layer], (RESNET50 | RESNET20)[layer]
    arrays, params, flops = _conv_inputs(cupy, direction, dtype, n, c, size, k, taps, stride)
    calls: dict[str, Callable[[], Any]] = {}
    allowed: dict[str, float] = {}
    steps: dict[str, Any] = {}
    fitting = [k for k in registry.kernels(f"conv2d_{direction}", "cuda") if k.takes(*arrays, **params)]
    for kernel in sorted(
        fitting, key=lambda k: (k in own, k.step < 3, k.step)
    ):  # the first one is what is compared with
        if kernel in own or kernel.step >= least:
            steps[kernel.name] = "own" if kernel in own else kernel.step
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
    times = on_gpu(cupy, calls | plans, seconds=seconds)
    best = min((t.median for name, t in times.items() if name in plans), default=None)
    ranked = sorted(times.items(), key=lambda item: item[1].median)
    slow = [name for name, _ in ranked if name in plans][_PLANS:]
    for name, t in (item for item in ranked if item[0] not in slow):
        row = {"layer": layer, "direction": direction, "dtype": dtype, "kernel": name, "step": steps.get(name, "")}
        row["n"] = t.n
        row |= {"median_us": round(t.median * 1e6, 2), "p20_us": round(t.p20 * 1e6, 2), "p80_us": round(t.p80 * 1e6, 2)}
        row |= {"tflop_per_s": round(flops / t.median / 1e12, 2), "relative_difference": float(f"{errors[name]:.2g}")}
        yield row | {"cudnn_best_over_this": None if best is None else round(best / t.median, 3), "cudnn": reason}


def _conv_inputs(cupy: Any, direction: str, dtype: str, n: int, c: int, size: int, k: int, taps: int, stride: int):
    """(arrays, params, flops), activations channels-last in memory, random and of a size that keeps sums near 1."""
    pad = taps // 2
    rng = np.random.default_rng(0)  # NumPy's: CuPy's generator needs cuRAND, which is not ours to ask for
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


def time_layers(
    group: str,
    network: str | None,
    case: str | None,
    own: Sequence[Any],
    least: int,
    seconds: float,
    output: Path | None,
) -> None:
    """`python -m benchmarks GROUP --device cuda`: print the rows of all layers that are asked for, and write them.

    ValueError for a group or layer that there is not, RuntimeError without a GPU.
    """
    networks = {"resnet50": RESNET50, "resnet20": RESNET20}
    of_own = {kernel.problem.name for kernel in own}
    names = [
        name
        for name in layer_names()
        for layer, direction, _ in [name.split(":")]
        if f"conv2d_{direction}".startswith(group) and case in (None, layer)
        if (network is None or layer in networks.get(network, ())) and (not own or f"conv2d_{direction}" in of_own)
    ]
    if not names:
        raise ValueError(
            f"nothing to time on 'cuda' for {group!r}, network {network!r}, case {case!r}; groups: conv2d, "
            f"{', '.join(f'conv2d_{d}' for d in DIRECTIONS)}; networks: {', '.join(networks)}; "
            f"cases: {', '.join(BATCH)}"
        )
    gpu = gpu_name()
    where = versions(ON_GPU) | {"gpu": gpu, "driver": driver()}
    rows: list[Row] = []
    for name in names:
        print(f"\n{name.replace(':', ', ')}\n  {'kernel':24} {'us':>10}  TFLOP/s  cuDNN's time / this")
        for row in layers(name, own, least, seconds):
            print("  " + _line(row), flush=True)
            rows.append(dict.fromkeys(_COLUMNS, "") | row | where)
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    path = write("conv2d", rows, 1, output or RESULTS / f"conv2d-{slug}.csv", group=("layer", "direction", "dtype"))
    draw_ladder(rows, path.with_suffix(".png"))
    print(f"\nwritten to {path} and, drawn, beside it")


_COLUMNS = ("layer", "direction", "dtype", "kernel", "step", "n", "median_us", "p20_us", "p80_us", "tflop_per_s")
_COLUMNS += ("relative_difference", "cudnn_best_over_this", "cudnn", "wrong_by")


def _line(row: Row) -> str:
    if "wrong_by" in row:
        return f"{row['kernel']:24} not timed: differs by {row['wrong_by']:.2g} of the largest output"
    ratio = row["cudnn_best_over_this"]
    beside = f"{row['cudnn']}" if ratio is None else f"{ratio:.2f}"
    return f"{row['kernel']:24} {row['median_us']:>10.1f} {row['tflop_per_s']:>8.1f}  {beside}"


def ladder(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, float]]:
    """By (step, kernel without its direction) and then by dtype: the geometric mean of cuDNN's best time over the
    kernel's, over all layers and directions that it was timed on beside cuDNN."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        if row.get("cudnn_best_over_this") not in (None, "") and row.get("step") not in (None, ""):
            name = row["kernel"].removeprefix(f"{row['direction']}_")
            by_dtype = found.setdefault((str(row["step"]), name), {})
            by_dtype.setdefault(row["dtype"], []).append(float(row["cudnn_best_over_this"]))
    return {
        key: {dtype: geometric_mean(ratios) for dtype, ratios in by_dtype.items()}
        for key, by_dtype in sorted(found.items())
    }


def draw_ladder(rows: Sequence[Row], output: Path) -> None:
    """TFLOP/s by layer: our fastest filled, cuDNN's fastest hollow; a panel per direction and dtype."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.get("tflop_per_s") not in (None, "")]
    panels = list(dict.fromkeys((row["dtype"], row["direction"]) for row in timed))
    figure = Figure(figsize=(8, 1 + 2.2 * max(1, len(panels))), layout="constrained")
    for place, (dtype, direction) in enumerate(panels, 1):
        axes = figure.add_subplot(len(panels), 1, place)
        here = [row for row in timed if (row["dtype"], row["direction"]) == (dtype, direction)]
        names = list(dict.fromkeys(row["layer"] for row in here))
        for of_cudnn, face, label in ((True, "none", "cuDNN's fastest plan"), (False, "black", "our fastest kernel")):
            best: dict[str, float] = {}
            for row in here:
                if row["kernel"].startswith("cudnn:") == of_cudnn:
                    best[row["layer"]] = max(best.get(row["layer"], 0.0), float(row["tflop_per_s"]))
            axes.scatter([*best], [*best.values()], s=40, edgecolors="black", facecolors=face, label=label)
        axes.set(title=f"{direction}, {dtype}", ylabel="TFLOP/s", ylim=(0, None))
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(fontsize=8)
    figure.savefig(output, dpi=150)
