"""The kernels of a group of problems on their cases: checked, then timed in turn with PyTorch, which is oneDNN here.

Convolutions are those of ResNet-20, -18 and -50; other problems have benchmark cases of their own. Both sides compute
the same inputs, each in a process of its own; PyTorch in both memory layouts, of which the faster one counts.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter
from minires.kernels import registry  # pyright: ignore[reportMissingImports]
from minires.kernels.checking import Trial, Wrong, lay_out  # pyright: ignore[reportMissingImports]
from minires.kernels.cpu.jit import get_num_threads  # pyright: ignore[reportMissingImports]
from minires.kernels.timing import Timing, timing  # pyright: ignore[reportMissingImports]

from minires import dispatch

from . import layers
from .gpu_layers import time_layers
from .peaks import Peaks, measure
from .peers import sampled
from .provenance import write
from .turns import Samples, best, in_turn, ratio
from .worker import Worker, burst

FIRST_STEP = 1  # step 0, the definition, is only timed where asked for
TURN, PAUSE = 0.02, 0.005  # seconds
_CONVOLUTIONS = tuple(f"conv2d_{direction}" for direction in layers.DIRECTIONS)
PEER_ERROR = 1e-3  # of the largest output: enough to see that it computes the same
_HEAD = f"  {'kernel':28} {'ms':>8}  GFLOP/s  of FMA  of copy  of floor  time / PyTorch's"


@dataclass(frozen=True)
class _Job:
    """A problem at a case; layer: whose convolution it is."""

    problem: Any
    case: Any
    layer: layers.Layer | None = None


def kernels(
    group: str,
    /,
    *,
    device: str = "cpu",
    network: str | None = None,
    case: str | None = None,
    seconds: float = 1.0,
    ladder: bool = False,
    every_step: bool = False,
    kernels: Annotated[list[Path] | None, Parameter(negative=())] = None,
    output: Path | None = None,
) -> None:
    """Time the kernels of all problems whose name starts with GROUP, such as conv2d or conv2d_fprop.

    Parameters
    ----------
    group
        How the problems' names start.
    device
        "cpu", or "cuda": the convolutions of ResNet-50 and -20 beside cuDNN, steps 3 and later of the ladder unless all
        are asked for.
    network
        Only the convolutions of this network: resnet20, resnet18 or resnet50.
    case
        Only this case.
    seconds
        For each case, shared by all that are measured on it.
    ladder
        All kernels, not only the one that dispatch chooses.
    every_step
        All kernels and the definition, step 0.
    kernels
        Files of one's own that register more kernels; they are ranked in the ladder.
    output
        The CSV file to write, instead of one named after this machine in benchmarks/results.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r}: these benchmarks run on 'cpu' and 'cuda'")
    own = {k for file in kernels or [] for k in registry.load_file(file)}
    if device == "cuda":
        least = 0 if every_step else FIRST_STEP if ladder else 3
        time_layers(group, network, case, [*own], least, seconds, output)
        return
    jobs = [job for job in _jobs(group, network) if case in (None, job.case.name)]
    if own:
        touched = {k.problem.name for k in own}
        jobs = [job for job in jobs if job.problem.name in touched]
    if not jobs:
        names = sorted({p.name.partition("_")[0] for p in registry.problems()})
        narrowed = "".join(f", {what} {value!r}" for what, value in (("network", network), ("case", case)) if value)
        raise ValueError(f"nothing to time for {group!r}{narrowed}; groups: {names}; networks: {[*layers.NETWORKS]}")
    least = 0 if every_step else FIRST_STEP if ladder or own else None
    threads = get_num_threads()
    peaks, rows = measure(), []
    print(f"{peaks}; {threads} threads")
    rival = Worker("benchmarks.peers", threads)
    try:
        there = rival.read()["torch"]
        if not there:
            print("PyTorch is not installed: nothing to compare with (pip install 'minires[peers]')")
        for job in jobs:
            print(f"\n{job.problem.name}, {job.case.name}\n{_HEAD}")
            for row in _measure(job, least, own, seconds, peaks, rival if there else None):
                print("  " + _line(row), flush=True)
                rows.append(row)
    finally:
        rival.close()
    for line in summary(rows):
        print(line)
    print(f"\nwritten to {write(group.partition('_')[0], rows, threads, output, group=('problem', 'case'))}")


def _jobs(group: str, network: str | None) -> Iterator[_Job]:
    for problem in registry.problems():
        if problem.name in _CONVOLUTIONS and problem.name.startswith(group):
            for layer in (
                layer for name in layers.NETWORKS if network in (None, name) for layer in layers.layers(name)
            ):
                if not (layer.first and problem.name == "conv2d_dgrad"):  # images need no gradient
                    yield _Job(problem, layer.case, layer)
        elif problem.name.startswith(group) and group != "conv2d" and network is None:
            yield from (_Job(problem, case) for case in problem.cases if "bench" in case.tags)


def _trial(job: _Job) -> Trial:
    """The case's inputs and what must come out. The definition of a convolution would take minutes at these sizes: its
    place is taken by the BLAS kernel in float64, which the tests hold to the definition."""
    problem = job.problem
    if job.layer:
        fast = next(k.fn for k in registry.kernels(problem.name, "cpu") if k.step == 1)
        problem = dataclasses.replace(problem, reference=fast, error_scale=registry.of_magnitudes(fast))
    return Trial(problem, job.case, "float32")


def _measure(
    job: _Job, least: int | None, own: set, seconds: float, peaks: Peaks, rival: Worker | None
) -> Iterator[dict[str, Any]]:
    trial = _trial(job)
    layouts = {name: "contiguous" if name == "w" else "channels_last" for name in trial.arrays}
    arrays = [None if a is None else lay_out(a, layouts[name])[0] for name, a in trial.arrays.items()]
    chosen = dispatch.select(job.problem.name, *arrays, **trial.params)
    competing = [
        k
        for k in registry.kernels(job.problem.name, "cpu")
        if trial.suits(k) and (k is chosen or k in own or (least is not None and k.step >= least))
    ]
    rivals: dict[str, Any] = {}
    worst, wrong, peers = {}, {}, []
    for k in competing:
        try:
            worst[k.name] = trial.compare(trial.run(k, "channels_last"), k)
            rivals[k.name] = lambda turn, k=k: burst(lambda: k(*arrays, **trial.params), turn)
        except Wrong as error:
            wrong[k.name] = f"{error.failure}: {error}"
    if rival is not None:
        peers = _invite(job, trial, rival)
        rivals |= peers
    for measure_once in rivals.values():
        measure_once(0.0)  # compiles, and warms caches
    samples = in_turn(rivals, seconds, TURN, PAUSE) if rivals else {}
    flops, moved = (count(*arrays, **trial.params) for count in (job.problem.flops, job.problem.bytes_moved))
    fastest = best(samples, [*peers])
    steps = {k.name: k.step for k in competing}
    for name in sorted(samples, key=lambda name: timing(samples[name]).median):
        verdict = {"verdict": "right", "worst_eps": f"{worst[name]:.3g}"} if name in worst else {}
        numbers = _numbers(samples, name, fastest, flops, moved, peaks)
        yield _row(job, name, steps.get(name, ""), chosen.name == name) | verdict | numbers
    for name, verdict in wrong.items():
        yield _row(job, name, steps[name], chosen.name == name) | {"verdict": verdict}


def _invite(job: _Job, trial: Trial, rival: Worker) -> dict[str, Any]:
    """PyTorch's layouts as rivals, if what they compute is right."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "inputs.npz")
        np.savez(file, **{name: a for name, a in trial.arrays.items() if a is not None})
        message = dict(problem=job.problem.name, params=trial.params, arrays=[*trial.arrays], file=str(file))
        answer = rival.ask(do="load", **message)
    found = {}
    for layout, values in answer.items():
        wanted = sampled(np.asarray(trial.wanted[0]))
        error = np.abs(wanted - values).max() / np.abs(trial.wanted[0]).max()
        if not error <= PEER_ERROR:
            raise RuntimeError(f"PyTorch, {layout}, computes something else than {job.problem.name}: error {error:.2g}")
        name = "torch" if layout == "contiguous" else f"torch_{layout}"
        found[name] = lambda turn, one=layout: rival.ask(do="measure", layout=one, seconds=turn)["seconds"]
    return found


def _row(job: _Job, name: str, step: int | str, chosen: bool) -> dict[str, Any]:
    blank = ("verdict", "worst_eps", "n", "median_ms", "p20_ms", "p80_ms", "gflop_per_s", "gbyte_per_s")
    blank += ("of_fma", "of_copy", "of_floor", "ratio", "ratio_p20", "ratio_p80", "flops", "bytes")
    layer = {"network": "", "count": "", "plain_3x3": ""}
    if job.layer:
        layer = {"network": job.layer.network, "count": job.layer.count, "plain_3x3": int(job.layer.plain_3x3)}
    head = {"problem": job.problem.name, "case": job.case.name, **layer, "kernel": name, "step": step}
    return {**head, "chosen": int(chosen), **dict.fromkeys(blank, ""), **dict.fromkeys(_NO_PEAKS, "")}


_NO_PEAKS = ("fma_gflop_per_s", "copy_gbyte_per_s", "sgemm_gflop_per_s")


def _numbers(samples: Samples, name: str, fastest: str | None, flops: int, moved: int, peaks: Peaks) -> dict[str, str]:
    t = timing(samples[name])
    to_peer: Timing | None = ratio(samples, name, fastest) if fastest else None
    return {
        "n": str(t.n),
        "median_ms": f"{t.median * 1e3:.4g}",
        "p20_ms": f"{t.p20 * 1e3:.4g}",
        "p80_ms": f"{t.p80 * 1e3:.4g}",
        "gflop_per_s": f"{flops / t.median / 1e9:.4g}",
        "gbyte_per_s": f"{moved / t.median / 1e9:.4g}",
        "of_fma": f"{flops / t.median / peaks.flops:.3g}",
        "of_copy": f"{moved / t.median / peaks.copy:.3g}",
        "of_floor": f"{peaks.floor(flops, moved) / t.median:.3g}",
        "ratio": f"{to_peer.median:.4g}" if to_peer else "",
        "ratio_p20": f"{to_peer.p20:.4g}" if to_peer else "",
        "ratio_p80": f"{to_peer.p80:.4g}" if to_peer else "",
        "flops": str(flops),
        "bytes": str(moved),
        **peaks.columns(),
    }


def _line(row: dict[str, Any]) -> str:
    name = ("*" if row["chosen"] else " ") + row["kernel"]
    if not row["n"]:
        return f"{name:28} not timed, {row['verdict']}"
    shares = "  ".join(f"{float(row[key]):>7.0%}" for key in ("of_fma", "of_copy", "of_floor"))
    ratio = f"{float(row['ratio']):>10.2f}" if row["ratio"] else ""
    return f"{name:28} {float(row['median_ms']):>8.3f} {float(row['gflop_per_s']):>8.1f} {shares} {ratio}"


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The geometric means as lines of text."""
    means = by_direction(rows)
    if means:
        yield "\n* what dispatch chooses. Time / PyTorch's better layout, geometric means:"
        yield f"  {'':20}" + "".join(f"{direction:>8}" for direction in layers.DIRECTIONS)
    for network, found in means.items():
        yield f"  {network:20}" + "".join(f"{mean:8.2f}" if mean else f"{'':8}" for mean in found)
    plain = plain_3x3(rows)
    if plain is not None:
        yield f"  3x3 at stride 1 of ResNet-18 and -50, all directions: {plain:.2f}"


def by_direction(rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """By network: the geometric mean of the chosen kernels' ratios in each direction. rows: as in the results file."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["network"] and int(row["chosen"]) and row["ratio"]:
            direction = row["problem"].removeprefix("conv2d_")
            found.setdefault(row["network"], {}).setdefault(direction, []).append(float(row["ratio"]))
    return {
        network: [layers.geometric_mean(ratios[d]) if d in ratios else None for d in layers.DIRECTIONS]
        for network, ratios in found.items()
    }


def plain_3x3(rows: list[dict[str, Any]]) -> float | None:
    """Geometric mean of the ratios over ResNet-18's and -50's 3x3 layers at stride 1; None where one is missing."""
    wanted = {
        (f"conv2d_{direction}", layer.case.name)
        for network in ("resnet18", "resnet50")
        for layer in layers.layers(network)
        for direction in layers.DIRECTIONS
        if layer.plain_3x3
    }
    there = {(r["problem"], r["case"]): float(r["ratio"]) for r in rows if int(r["chosen"]) and r["ratio"]}
    return layers.geometric_mean([there[key] for key in wanted]) if wanted <= there.keys() else None
