"""Where a number comes from: machine, versions, commit. Every row of a results file carries it."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("minires", "numpy", "numba", "torch", "onnxruntime", "openvino")
ON_GPU = ("cupy-cuda13x", "cupy-cuda12x", "nvidia-cuda-nvrtc", "nvidia-cudnn-cu13", "nvidia-cudnn-frontend", "triton")


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def provenance(threads: int) -> dict[str, str]:
    """The columns that say where and of what a row was measured."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions(PACKAGES),
        "commit": _commit(),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Their versions; "" for one that is not installed."""
    found = dict.fromkeys(packages, "")
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def _commit() -> str:
    """The commit of this tree, with "+" where files differ from it; "" outside a repository."""
    here = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def results_file(name: str, threads: int) -> Path:
    """Where a benchmark's results stand: a file per benchmark, CPU and number of threads."""
    slug = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    return RESULTS / f"{name}-{slug}-{threads}t.csv"


def write(
    name: str,
    rows: Sequence[Mapping[str, object]],
    threads: int,
    output: Path | None = None,
    group: tuple[str, ...] = (),
) -> Path:
    """Write the rows, each with its provenance, as CSV; by default into `results_file`.

    group: columns that say what was measured; rows of an earlier run that say something else there stay in the file.
    """
    where = provenance(threads)
    path = output or results_file(name, threads)
    new = [{**{key: str(value) for key, value in row.items()}, **where} for row in rows]
    measured = {tuple(row[key] for key in group) for row in new}
    earlier = read(path) if group and path.exists() else []
    if earlier and set(earlier[0]) != set(new[0]):
        earlier = []  # made by another version of the benchmark
    kept = [row for row in earlier if tuple(row[key] for key in group) not in measured]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(new[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + new)
    return path


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a results file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
