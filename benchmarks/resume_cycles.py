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

from cyclopts import App

from minires.train.checkpoint import Checkpoints

RECIPE = [
    *("train", "--image-size", "8", "--batch-size", "64", "--threads", "1", "--workers", "2", "--ema", "0.99"),
    *(
        "--mixup",
        "0.2",
        "--cutout",
        "2",
        "--accumulate",
        "2",
        "--val",
        "200",
        "--recalibrate",
        "--checkpoint-every",
        "7",
    ),
]
app = App(name="benchmarks.resume_cycles", help="Stop and resume at random moments.", help_format="plaintext")


@app.default
def resume_cycles(*, cycles: int = 10, epochs: int = 40, kill: bool = False, seed: int = 0) -> int:
    """Compare a run that was stopped `cycles` times with one that was not.

    Parameters
    ----------
    cycles
        How often it is stopped.
    epochs
        Its length; it must be long enough to be stopped so often.
    kill
        SIGKILL in place of SIGTERM: what was computed since the last checkpoint is computed again.
    seed
        Of the moments.
    """
    random.seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        recipe = [*RECIPE, "--epochs", str(epochs)]
        start = time.perf_counter()
        assert _run([*recipe, "--out", str(whole)], None, kill)[0] == 0
        seconds, steps = time.perf_counter() - start, []
        command = [*recipe, "--out", str(broken)]
        for _ in range(cycles):
            code, _ = _run(command, random.uniform(0.2, 0.6) * seconds / cycles, kill)
            if code == 0:
                print("the run ended before it was stopped often enough: give it more --epochs", file=sys.stderr)
                return 1
            assert code == (-signal.SIGKILL if kill else 128 + signal.SIGTERM), code
            steps += Checkpoints(broken / "checkpoints").steps()[-1:]
            command = ["train", "--resume", str(broken)]
        assert _run(command, None, kill)[0] == 0
        wrong = differences(whole, broken)
    print(f"{'SIGKILL' if kill else 'SIGTERM'} {cycles} times, checkpoints at steps {steps}")
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


def _run(arguments: list[str], after: float | None, kill: bool) -> tuple[int, str]:
    """Run minires; stop it so many seconds after its first step. Returns (exit code, standard error)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "minires", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if after is not None and process.stdout is not None:
        for line in process.stdout:  # the line that an epoch ends with: the kernels are compiled by then
            if line.startswith("epoch "):
                break
        time.sleep(after)
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
    _, error = process.communicate()
    return process.returncode, error


if __name__ == "__main__":
    sys.exit(app())
