"""Whole networks beside their peers: training steps, inference, memory. Each library in a process of its own, in turn.

All start from the same weights and images, and what their first steps gave must agree before anything is timed. The
ratio is minires' time over the best peer's, round by round; its median counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from minires.kernels.cpu.jit import get_num_threads  # pyright: ignore[reportMissingImports]
from minires.kernels.timing import timing  # pyright: ignore[reportMissingImports]

from .contestants import CONTESTANTS, INFERENCE_ONLY, missing
from .gpu_networks import time_networks
from .layers import NETWORKS, floor_seconds
from .peaks import measure, measure_sgemm
from .provenance import write
from .turns import best, in_turn, ratio
from .worker import Worker

OURS = "minires"
WHAT, PRECISIONS = ("train", "infer", "memory"), ("fp32", "bf16")
GROUP = ("model", "batch", "size", "what", "precision")
# Relative to the norm. A ReLU whose input is almost 0 goes either way, and the gradient is another one: the largest
# differences from PyTorch's are 0.004 (ResNet-20), 0.001 (18) and 0.026 (50) in float32, and 0.11, 0.22 and 0.29 in
# bfloat16, which has 8 bits. Something else computed differs by about 1.
ERROR, GRADIENT_ERROR = {"fp32": 1e-4, "bf16": 0.05}, {"fp32": 0.1, "bf16": 0.45}
_PAUSE = 0.2  # seconds in which the threads of the library measured before stop spinning
_TURN = 0.5  # seconds of a turn, at least one step
_MIB = 2**20


def networks(
    *,
    device: str = "cpu",
    only: str = ",".join(NETWORKS),
    what: str = "train,infer",
    precision: str = "fp32,bf16",
    peers: str = "",
    seconds: float = 60.0,
    least: int = 3,
    batch: int = 0,
    size: int = 0,
    output: Path | None = None,
) -> None:
    """Time whole networks: a training step (forward, backward, SGD) and inference, with their peers.

    Lists are written with commas. A peer that compiles does so at its first run, for a minute, and keeps it on disk.

    Parameters
    ----------
    device
        "cpu", or "cuda": beside PyTorch, eager and compiled; CUDA graphs on both sides.
    only
        Names of networks.
    what
        train, infer, memory (peak resident memory of training above the idle process).
    precision
        fp32, bf16.
    peers
        Only these peers; none: `--peers none`.
    seconds
        Of timing for each row of the table; starting and checking come before.
    least
        Rounds at least, however long they take (CPU).
    batch
        Images per step; 0: as the benchmark has it for this network.
    size
        Their height and width; 0: as the benchmark has it (CPU).
    output
        The CSV file to write, instead of one named after this machine in benchmarks/results.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r}: these benchmarks run on 'cpu' and 'cuda'")
    models = _listed("only", only, NETWORKS)
    if device == "cuda":
        rivals = None if not peers else [name for name in peers.split(",") if name != "none"]
        tasks, precisions = _listed("what", what, WHAT), _listed("precision", precision, PRECISIONS)
        time_networks(models, tasks, precisions, rivals, seconds, batch, output)
        return
    wanted = _listed("peers", peers, [*CONTESTANTS, "none"]) if peers else [*CONTESTANTS]
    threads, files = get_num_threads(), set()
    for model in models:
        usual_batch, usual_size = NETWORKS[model]
        for task in _listed("what", what, WHAT):
            for one in _listed("precision", precision, PRECISIONS):
                row = _Row(model, batch or usual_batch, size or usual_size, task, one, threads)
                found = row.memory(wanted) if task == "memory" else row.time(wanted, seconds, least)
                if found:
                    name = "networks-memory" if task == "memory" else "networks"
                    files.add(write(name, found, threads, output, group=GROUP))
    for file in sorted(files):
        print(f"written to {file}")


def _listed(what: str, text: str, known: Any) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"--{what} {name!r} is not one of {', '.join(known)}")
    if not names:
        raise ValueError(f"--{what} is empty; there are {', '.join(known)}")
    return names


class _Row:
    """One row of the table: a network, what it does, in which precision."""

    def __init__(self, model: str, batch: int, size: int, what: str, precision: str, threads: int):
        self.head = dict(model=model, batch=batch, size=size, what=what, precision=precision)
        self.model, self.batch, self.size, self.what = model, batch, size, what
        self.precision, self.threads = precision, threads
        print(f"\n{model}, batch {batch}, {size}x{size}, {what}, {precision}", flush=True)

    def start(self, wanted: list[str]) -> dict[str, Worker]:
        """minires and the peers, each having shown that it computes the same. Those that cannot are named."""
        names = [name for name in CONTESTANTS if name == OURS or name in wanted]
        if self.what != "infer":
            names = [name for name in names if name not in INFERENCE_ONLY]
        workers, first = {}, {}
        for name in names:
            if lacking := missing(name):
                print(f"  {name}: skipped, {lacking} not installed")
                continue
            numbers = (self.batch, self.size, self.threads)
            task = "infer" if self.what == "infer" else "train"
            workers[name] = Worker("benchmarks.contestants", name, task, self.precision, self.model, *numbers)
        for name, worker in [*workers.items()]:
            trouble = ""
            try:
                message = worker.read()
                first[name] = message.get("first", {})
                trouble = message.get("unavailable", "")
            except RuntimeError as error:
                trouble = str(error).strip()
                if name == OURS:
                    _close(workers)
                    raise
            if not trouble and name != OURS and OURS in workers:
                result, gradients = _differences(first[OURS], first[name])
                errors = f"error {result:.1e}" + (f", of gradients {gradients:.1e}" if self.what != "infer" else "")
                if result <= ERROR[self.precision] and gradients <= GRADIENT_ERROR[self.precision]:
                    print(f"  {name}: agrees, {errors}")
                else:
                    trouble = f"it computes something else: {errors}"
            if trouble:
                print(f"  {name}: skipped, {trouble}", flush=True)
                workers.pop(name).close()
        return workers

    def time(self, wanted: list[str], seconds: float, least: int) -> list[dict[str, Any]]:
        """The rows of the results file, one for each library."""
        workers = self.start(wanted)
        try:
            peaks = measure()
            print(f"  {peaks}; {self.threads} threads", flush=True)
            rivals = {name: worker.measure for name, worker in workers.items()}
            samples = in_turn(rivals, seconds, _TURN, _PAUSE, least) if rivals else {}
        finally:
            _close(workers)
        fastest = best(samples, [name for name in samples if name != OURS])
        dtype = "bfloat16" if self.precision == "bf16" else "float32"
        floor = floor_seconds(self.model, self.batch, self.size, peaks, self.what == "train", dtype)
        rows = []
        for name in sorted(samples, key=lambda name: timing(samples[name]).median):
            t = timing(samples[name])
            ours = ratio(samples, OURS, name) if OURS in samples else None
            rows.append(
                self.head
                | dict(library=name, best=int(name == fastest), n=t.n, median_ms=f"{t.median * 1e3:.4g}")
                | dict(p20_ms=f"{t.p20 * 1e3:.4g}", p80_ms=f"{t.p80 * 1e3:.4g}")
                | dict(images_per_s=f"{self.batch / t.median:.4g}", ratio=f"{ours.median:.3f}" if ours else "")
                | dict(ratio_p20=f"{ours.p20:.3f}" if ours else "", ratio_p80=f"{ours.p80:.3f}" if ours else "")
                | dict(floor_ms=f"{floor * 1e3:.4g}", of_floor=f"{floor / t.median:.3f}")
                | peaks.columns()
            )
            print(_line(rows[-1]))
        print(f"  sgemm afterwards {measure_sgemm() / 1e9:.0f} GFLOP/s")
        return rows

    def memory(self, wanted: list[str]) -> list[dict[str, Any]]:
        """The rows of the file on memory, one for each library."""
        workers = self.start(wanted)
        try:
            found = {name: worker.ask(do="memory") for name, worker in workers.items()}
        finally:
            _close(workers)
        above = {name: max(1, answer["peak"] - answer["idle"]) for name, answer in found.items()}
        least = min((name for name in above if name != OURS), key=above.__getitem__, default=None)
        rows = []
        for name in sorted(above, key=above.__getitem__):
            mib = {f"{key}_mib": f"{found[name][key] / _MIB:.0f}" for key in ("idle", "peak")}
            own = f"{above[OURS] / above[name]:.3f}" if OURS in above else ""
            rows.append(
                self.head
                | dict(library=name, best=int(name == least), **mib)
                | dict(above_mib=f"{above[name] / _MIB:.0f}", ratio=own)
            )
            print(f"  {name:28} {rows[-1]['above_mib']:>7} MiB above idle {mib['idle_mib']:>5}; minires / it: {own}")
        return rows


def _line(row: dict[str, Any]) -> str:
    spread = f"({row['p20_ms']} to {row['p80_ms']}, n={row['n']})"
    text = f"  {row['library']:28} {row['median_ms']:>7} ms {spread:28} {row['images_per_s']:>7} images/s"
    text += f"  {float(row['of_floor']):.0%} of floor" if row["of_floor"] else ""
    return text + (f"  minires / it: {row['ratio']}" if row["ratio"] else "") + (" <- best peer" if row["best"] else "")


def _differences(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> tuple[float, float]:
    """The difference of the loss or logits, and the largest of any gradient, relative to the norm of ours."""
    if ours.keys() != theirs.keys():
        return float("inf"), float("inf")
    norms = {name: max(float(np.linalg.norm(values)), 1e-30) for name, values in ours.items()}
    errors = {name: float(np.linalg.norm(np.subtract(ours[name], theirs[name]))) / norms[name] for name in ours}
    result = next(iter(errors))
    return errors.pop(result), max(errors.values(), default=0.0)


def _close(workers: dict[str, Worker]) -> None:
    for worker in workers.values():
        worker.close()
