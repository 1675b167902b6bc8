"""`python -m benchmarks networks --device cuda`: training steps and inference of whole networks on a GPU.

It runs what `gpu_report` runs in its sections `training` and `inference` (gpu_steps.py), each library in a process of
its own, one after the other, and leaves a results file of which `python -m benchmarks readme` makes the README's table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .gpu_layers import driver, gpu_name
from .gpu_report import Unit, clocks, in_process
from .gpu_steps import PREDICTORS, SETUPS, TRAINERS
from .provenance import ON_GPU, RESULTS, versions, write

Row = dict[str, Any]
LIBRARIES = {"train": ("training", TRAINERS), "infer": ("inference", PREDICTORS)}
_COLUMNS = ("model", "batch", "size", "what", "precision", "library", "best", "n", "median_ms", "p20_ms", "p80_ms")
_COLUMNS += ("images_per_s", "over_best_peer", "version", "clocks")
_STARTING = 120.0  # seconds that a process may take beside the measurement: import, compile, autotune


def precision_of(library: str) -> str:
    """The precision that a contestant of gpu_steps.py runs in."""
    return "bf16" if "amp" in library else "fp32"


def time_networks(
    only: Sequence[str],
    what: Sequence[str],
    precision: Sequence[str],
    peers: Sequence[str] | None,
    seconds: float,
    batch: int,
    output: Path | None,
) -> None:
    """Print a table for every network, batch, task and precision that is asked for, and write all as a CSV file.

    peers: names, or None for all. seconds: of measuring, shared by the libraries of a table. ValueError for what there
    is not, RuntimeError without a GPU.
    """
    if "memory" in what:
        raise ValueError("--what memory is measured on the CPU alone: leave out --device cuda")
    setups = [setup for setup in SETUPS if setup.split(":")[0] in only and (not batch or setup.endswith(f":{batch}"))]
    if not setups:
        raise ValueError(f"nothing to time on 'cuda' for {', '.join(only)} at batch {batch}; there are {[*SETUPS]}")
    known = {name for _, libraries in LIBRARIES.values() for name in libraries if not name.startswith("minires")}
    if odd := set(peers or ()) - known:
        raise ValueError(f"--peers {min(odd)!r} is not one of {', '.join(sorted(known))}, none")
    gpu = gpu_name()
    where = versions(ON_GPU) | {"gpu": gpu, "driver": driver()}
    rows: list[Row] = []
    for setup in setups:
        for task in what:
            for one in precision:
                section, libraries = LIBRARIES[task]
                wanted = [name for name in libraries if precision_of(name) == one and _asked(name, peers)]
                print(f"\n{setup.replace(':', ', batch ')}, {SETUPS[setup]}x{SETUPS[setup]}, {task}, {one}", flush=True)
                about = dict(zip(("model", "batch"), setup.split(":"), strict=True))
                about |= {"size": str(SETUPS[setup]), "what": task, "precision": one}
                table = _measured(section, wanted, setup, seconds / len(wanted))
                rows += [dict.fromkeys(_COLUMNS, "") | about | row | where for row in table]
    if not rows:
        raise RuntimeError("nothing could be measured; see the lines above")
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    group = ("model", "batch", "what", "precision")
    print(f"\nwritten to {write('networks', rows, 1, output or RESULTS / f'networks-{slug}.csv', group=group)}")


def _asked(library: str, peers: Sequence[str] | None) -> bool:
    return peers is None or library.startswith("minires") or library in peers


def _measured(section: str, libraries: Sequence[str], setup: str, seconds: float) -> list[Row]:
    """The rows of one table, the fastest first; what cannot be measured is said and left out."""
    rows: list[Row] = []
    for library in libraries:
        unit = Unit(section, f"{library}:{setup}:{seconds:g}", seconds + _STARTING)
        ok, found, error = in_process(unit, unit.seconds)
        for row in found if ok else ():
            if "skipped" in row:
                error = row["skipped"]
            else:
                rows.append({name: row[name] for name in _COLUMNS if name in row} | {"clocks": clocks()})
        if error:
            print(f"  {library}: skipped, {error}", flush=True)
    peers = [row["images_per_s"] for row in rows if not row["library"].startswith("minires")]
    best = max(peers, default=None)
    for row in sorted(rows, key=lambda row: -row["images_per_s"]):
        row["best"] = int(row["images_per_s"] == best and not row["library"].startswith("minires"))
        row["over_best_peer"] = round(row["images_per_s"] / best, 3) if best else ""
        spread = f"({row['p20_ms']} to {row['p80_ms']}, n={row['n']})"
        line = f"  {row['library']:26} {row['median_ms']:>9} ms {spread:28} {row['images_per_s']:>9} images/s"
        print(line + (f"  {row['over_best_peer']:.2f} of the best peer's" if best else ""), flush=True)
    return sorted(rows, key=lambda row: -row["images_per_s"])
