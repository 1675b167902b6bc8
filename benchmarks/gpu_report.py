"""What a machine with a GPU has to confirm and measure, in order of value, within a budget of minutes.

    python -m benchmarks.gpu_report --budget 20

Every unit of work runs in a process of its own, because a fault on a GPU spoils its process, and leaves one line of
JSON in the report as soon as it is done: interrupted, run out of time or crashed, the next call goes on with what is
missing. Units that are done are kept as long as commit and GPU are the same. `--dry-run` lists the units.

    primitives   single instructions in the interpreter and on the GPU; its answers are kept as golden outputs for CI
    check        every kernel's test cases on the GPU against the float64 definition, in every layout
    replays      1,000 replays of a training step as a CUDA graph beside steps without: equal, bit for bit?
    blocks       bottlenecks of ResNet-50 forward and backward: ours fused and not, PyTorch's, cuDNN's fused and not
    training     training steps beside PyTorch, each library in its process
    layers       convolutions of ResNets: ours, cuDNN's best plan (nvidia-cudnn-frontend), checked before timed
    conformance  every kernel's test cases on the GPU and in the interpreter: are the results equal, bit for bit?
    inference    forward passes beside PyTorch, each library in its process
    end_to_end   a recipe of ResNet-20 on CIFAR-10 images, to its accuracy: seconds, beside PyTorch's

What is compared is timed in turn by events on the GPU, with the second-level cache emptied before each call.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .gpu_layers import driver, gpu_name
from .gpu_units import SECTIONS, run_unit
from .provenance import ON_GPU, RESULTS, provenance, versions


@dataclass(frozen=True)
class Unit:
    """One process: a section's function with its argument, and the seconds that it may take."""

    section: str
    argument: str
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.section}/{self.argument}"


def units() -> list[Unit]:
    """All units, in order of value."""
    return [
        Unit(name, argument, section.seconds) for name, section in SECTIONS.items() for argument in section.arguments()
    ]


class Report:
    """The file of results: a line of JSON per unit. Only lines of this commit and GPU count as done."""

    def __init__(self, path: Path, where: dict[str, str]):
        self.path, self.where = path, where
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            self.lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

    def done(self) -> set[str]:
        same = ("commit", "gpu")
        return {line["unit"] for line in self.lines if all(line[key] == self.where[key] for key in same) and line["ok"]}

    def add(self, unit: Unit, ok: bool, seconds: float, rows: list[dict[str, Any]], error: str = "") -> None:
        line: dict[str, Any] = {"unit": unit.name, "ok": ok, "seconds": round(seconds, 1), **self.where}
        line |= {"clocks": clocks(), "rows": rows, "error": error}
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def go(
    report: Report,
    todo: list[Unit],
    budget: float,
    execute: Callable[[Unit, float], tuple[bool, list, str]],
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run the units that are not done until the budget (seconds) is spent; returns how many failed.

    A unit is begun only while a tenth of the seconds that it may take are left, and never gets more than are left.
    """
    stop, done, failed = clock() + budget, report.done(), 0
    for unit in todo:
        left = stop - clock()
        if unit.name in done:
            continue
        if left < unit.seconds / 10:
            print(f"{unit.name}: not begun, {max(left, 0):.0f} s are left")
            continue
        begun = clock()
        ok, rows, error = execute(unit, min(unit.seconds, left))
        report.add(unit, ok, clock() - begun, rows, error)
        failed += not ok
        print(f"{unit.name}: {'done' if ok else 'FAILED, ' + error}, {clock() - begun:.0f} s", flush=True)
        for row in rows:
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return failed


def clocks() -> str:
    """Clocks, power and temperature of the first GPU right now, as nvidia-smi prints them; "" without it."""
    asked = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_throttle_reasons.active"
    try:
        command = ["nvidia-smi", "--id=0", f"--query-gpu={asked}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def in_process(unit: Unit, seconds: float) -> tuple[bool, list[dict[str, Any]], str]:
    """(whether it went well, its rows, what went wrong) of a unit in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--unit", unit.name]
    rows, tail = [], ""
    try:
        folder = Path(__file__).parent.parent
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds)
        output, tail, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as expired:
        output, code = _text(expired.stdout), 124
        tail = f"stopped after {seconds:.0f} s"
    for line in output.splitlines():
        if line.startswith("{"):
            rows.append(json.loads(line))
    last = (tail.strip().splitlines() or [""])[-1]
    return code == 0, rows, "" if code == 0 else f"exit code {code}: {last[:300]}"


def _text(output: Any) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def main(arguments: list[str]) -> int:
    """--budget MINUTES (20), --output FILE, --dry-run, --only SECTION."""
    options = dict(zip(arguments[::2], arguments[1::2], strict=False)) if "--dry-run" not in arguments else {}
    if "--unit" in options:
        for row in run_unit(options["--unit"]):
            print(json.dumps(row), flush=True)
        return 0
    todo = [u for u in units() if options.get("--only") in (None, u.section)]
    if "--dry-run" in arguments:
        for unit in todo:
            print(f"{unit.name:60} at most {unit.seconds:.0f} s")
        print(f"{len(todo)} units")
        return 0
    gpu = gpu_name()
    path = Path(options.get("--output", RESULTS / f"gpu-{gpu.lower().replace(' ', '-')}.jsonl"))
    report = Report(path, provenance(1) | versions(ON_GPU) | {"gpu": gpu, "driver": driver()})
    failed = go(report, todo, 60 * float(options.get("--budget", 20)), in_process)
    print(f"{len(report.done())} of {len(todo)} units done, {failed} failed now; written to {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError, ImportError, RuntimeError) as problem:
        print(f"gpu_report: {problem}", file=sys.stderr)
        sys.exit(2)
