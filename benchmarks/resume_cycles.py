"""Stop and resume a run at random moments, by real signals to a real process: `python -m benchmarks.resume_cycles`.

Trains once without a break and once stopped by SIGTERM (or --kill: SIGKILL) `cycles` times, with workers, running
average, mixup, cutout and accumulation on, and compares weights, running average, optimizer and records bit for bit.
Exit code 1 where anything differs.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

from cyclopts import App

from minires.train.checkpoint import Checkpoints

RECIPE = (
    "train --image-size 8 --batch-size 64 --threads 1 --ema 0.99 --mixup 0.2 --cutout 2 --accumulate 2 --val 200 "
    "--recalibrate --checkpoint-every 7"
).split()
app = App(name="benchmarks.resume_cycles", help="Stop and resume at random moments.", help_format="plaintext")


@app.default
def resume_cycles(
    *,
    cycles: int = 10,
    epochs: int = 40,
    workers: int = 2,
    worker_kind: Literal["thread", "process"] = "process",
    kill: bool = False,
    seed: int = 0,
) -> int:
    """Compare a run that was stopped `cycles` times with one that was not.

    Parameters
    ----------
    cycles
        How often it is stopped.
    epochs
        Its length; a stop takes two to three epochs.
    workers
        How many prepare images.
    worker_kind
        What they are.
    kill
        SIGKILL in place of SIGTERM: what was computed since the last checkpoint is computed again.
    seed
        Of the moments.
    """
    random.seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        recipe = [*RECIPE, "--epochs", str(epochs), "--workers", str(workers), "--worker-kind", worker_kind]
        _run([*recipe, "--out", str(whole)], None, kill, (0,))
        steps = []
        command = [*recipe, "--out", str(broken)]
        for _ in range(cycles):
            stopped = -signal.SIGKILL if kill else 128 + signal.SIGTERM
            code = _run(command, random.random(), kill, (0, stopped))
            if code == 0:
                print("the run ended before it was stopped often enough: give it more --epochs", file=sys.stderr)
                return 1
            steps += Checkpoints(broken / "checkpoints").steps()[-1:]
            command = ["train", "--resume", str(broken)]
        _run(command, None, kill, (0,))
        wrong = differences(whole, broken)
    how = f"{workers} {worker_kind} workers, {'SIGKILL' if kill else 'SIGTERM'} {cycles} times"
    print(f"{how}, checkpoints at steps {steps}")
    print("\n".join(wrong) if wrong else "weights, running average, optimizer and records are equal, bit for bit")
    return 1 if wrong else 0


def differences(a: Path, b: Path) -> list[str]:
    """What of two runs is not equal bit for bit, apart from what a clock says."""
    first, second = (Checkpoints(folder / "checkpoints").load() for folder in (a, b))
    assert first is not None and second is not None
    names = sorted(first.arrays.keys() | second.arrays.keys())
    wrong = [n for n in names if first.arrays[n].tobytes() != second.arrays[n].tobytes()]
    if (a / "model.safetensors").read_bytes() != (b / "model.safetensors").read_bytes():
        wrong.append("model.safetensors")
    return wrong + (["metrics.jsonl"] if _records(a) != _records(b) else [])


def _records(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def _run(arguments: list[str], part: float | None, kill: bool, expected: tuple[int, ...]) -> int:
    """Run minires; stop it after two epochs and that part of a third. Returns the exit code, one of those expected."""
    process = subprocess.Popen(
        [sys.executable, "-m", "minires", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if part is not None and process.stdout is not None:
        lines = (line for line in process.stdout if line.startswith("epoch "))
        next(lines, "")  # the kernels are compiled by then
        start = time.perf_counter()
        next(lines, "")
        time.sleep(part * (time.perf_counter() - start))
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
    _, error = process.communicate()
    if process.returncode not in expected:
        raise RuntimeError(f"minires {' '.join(arguments)} ended with code {process.returncode}: {error}")
    return process.returncode


if __name__ == "__main__":
    sys.exit(app())
