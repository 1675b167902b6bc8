"""What activation checkpointing saves in memory and costs in time: `python -m benchmarks.memory`.

Every row has a process of its own: its peak resident memory, and the seconds of a training step (forward, backward, SGD
with momentum), float32, on the CPU. The rows of a network take their steps in turn, so that a busy machine disturbs all
alike. The gradients of the first step must be the same in all rows of a network, bit for bit, before anything is timed.
"""

from __future__ import annotations

import gc
import hashlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App

from .provenance import RESULTS, write

DEFAULT = ("resnet110:128:0,1,2,3", "resnet1202:32:0,1,5,10")
_MIB = 2**20
_HEAD = "model       batch  blocks again  peak MiB  of the step  of plain  s/step  of plain"
app = App(name="benchmarks.memory", help="Peak memory and time of a training step.", help_format="plaintext")


@app.default
def memory(*cases: str, steps: int = 7, output: Path = RESULTS / "memory.csv") -> None:
    """Measure training steps with and without activation checkpointing.

    Parameters
    ----------
    cases
        MODEL:BATCH:N,N,... where N is how many blocks at a time are computed again in backward; 0: none.
    steps
        Timed steps per row; one more comes before them.
    output
        The CSV file to write.
    """
    rows: list[dict[str, Any]] = []
    threads = 0
    print(_HEAD)
    for case in cases or DEFAULT:
        model, batch, segments = case.split(":")
        workers = [_Worker(model, batch, segment) for segment in segments.split(",")]
        try:
            gradients = [worker.read() for worker in workers]
            if len(set(gradients)) > 1:
                raise RuntimeError(f"{case}: the gradients are not the same: nothing is measured")
            for _ in range(steps):
                for worker in workers:
                    worker.step()
            found = [worker.finish() for worker in workers]
        finally:
            for worker in workers:
                worker.process.kill()
        plain = next((row for row in found if row["blocks_again"] == 0), None)
        for row in found:
            threads = row.pop("threads")
            row["memory_of_plain"] = round(row["step_mib"] / plain["step_mib"], 3) if plain else ""
            row["time_of_plain"] = round(row["median_s"] / plain["median_s"], 3) if plain else ""
            print(_line(row), flush=True)
        rows += found
    print(f"written: {write('memory', rows, threads, output)}")


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['model']:<10}  {row['batch']:>5}  {row['blocks_again'] or '-':>12}  {row['peak_mib']:>8,.0f}"
        f"  {row['step_mib']:>11,.0f}  {row['memory_of_plain']:>8}  {row['median_s']:>6.2f}  {row['time_of_plain']:>8}"
    )


class _Worker:
    """A process that takes a step whenever it is asked to."""

    def __init__(self, model: str, batch: str, segment: str):
        command = [sys.executable, "-m", "benchmarks.memory", "--worker", model, batch, segment]
        self.process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
        )
        self.seconds: list[float] = []

    def read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.process.args[-3:])}: the process has ended with {self.process.wait()}")
        return line.strip()

    def step(self) -> None:
        print("step", file=self.process.stdin, flush=True)
        self.seconds.append(float(self.read()))

    def finish(self) -> dict[str, Any]:
        print("finish", file=self.process.stdin, flush=True)
        low, median, high = np.quantile(self.seconds, (0.2, 0.5, 0.8)).round(4).tolist()
        return {**json.loads(self.read()), "median_s": median, "p20_s": low, "p80_s": high, "n": len(self.seconds)}


def work(model: str, batch: int, segment: int) -> None:
    """What a worker does. step_mib: its peak, without what was resident before the steps."""
    from minires.kernels.cpu.jit import get_num_threads  # pyright: ignore[reportMissingImports]

    import minires
    from minires.models import create_model
    from minires.ops import cross_entropy
    from minires.optim import SGD

    minires.manual_seed(0)
    net = create_model(model, checkpoint_blocks=segment)
    optimizer = SGD(net.parameters(), 0.1, momentum=0.9)
    rng = np.random.default_rng(0)
    images = minires.from_numpy(rng.standard_normal((batch, 3, net.image_size, net.image_size)).astype(np.float32))
    labels = minires.from_numpy(rng.integers(0, 10, batch))

    def backward(n: int) -> None:
        optimizer.zero_grad()
        cross_entropy(net(images[:n]), labels[:n]).backward()

    backward(2)  # compiles, or loads what was compiled
    optimizer.step()  # makes its buffers
    gc.collect()
    before = _resident()
    backward(batch)
    digest = hashlib.sha256()
    for parameter in net.parameters():
        digest.update(b"" if parameter.grad is None else parameter.grad.array.tobytes())
    print(digest.hexdigest(), flush=True)
    while sys.stdin.readline().strip() == "step":
        start = time.perf_counter()
        backward(batch)
        optimizer.step()
        print(time.perf_counter() - start, flush=True)
    peak = _peak()
    found = {"peak_mib": round(peak / _MIB, 1), "step_mib": round((peak - before) / _MIB, 1)}
    head = {"model": model, "batch": batch, "blocks_again": segment}
    print(json.dumps({**head, **found, "threads": get_num_threads()}), flush=True)


def _peak() -> int:
    """The most bytes of this process that were ever in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _resident() -> int:
    """Bytes of this process that are in memory now; where the system does not say, the most that ever were."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return _peak()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        name, *numbers = sys.argv[2:]
        work(name, *map(int, numbers))
    else:
        app()
