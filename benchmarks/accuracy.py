"""What Winograd's rounding and bfloat16 do to accuracy: `python -m benchmarks accuracy`.

The recipe `cifar10-short`, from the first weight to the last, once per seed and arithmetic: sums of products as they
are written (`minires.exact()`), what the dispatcher picks by itself (Winograd for 3x3 at stride 1), and bfloat16. A
seed has the same first weights, batches and augmentation in all three. A run is about ten minutes on two cores;
finished runs stand in the results file and are not done again, and a broken one goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from minires.kernels.cpu.jit import get_num_threads  # pyright: ignore[reportMissingImports]

import minires
from minires.train import Recipe, load_recipe, resume, train

from .provenance import read, results_file, write

ARITHMETIC = ("exact", "winograd", "bf16")
GROUP = ("arithmetic", "seed", "epochs")
_PRECISION = {"exact": "fp32", "winograd": "fp32", "bf16": "bf16"}


def accuracy(
    *,
    data: Path | None = None,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    arithmetic: tuple[str, ...] = ARITHMETIC,
    epochs: int | None = None,
    folder: Path = Path("runs/accuracy"),
    output: Path | None = None,
) -> int:
    """Train `cifar10-short` per seed and arithmetic, and compare what they get right.

    Exit code 1 where a mean lies outside of what the exact kernels' seeds span (bf16: more than one point below their
    mean).

    Parameters
    ----------
    data
        An archive or folder of train/CLASS/* and test/CLASS/*; by default cifar10-jpg.tar.xz in $MINIRES_DATA.
    seeds
        One run each.
    arithmetic
        Of exact, winograd, bf16.
    epochs
        By default the recipe's.
    folder
        Where the runs are kept; a run that is there already goes on.
    output
        Results file; by default benchmarks/results/accuracy-CPU-THREADSt.csv.
    """
    if unknown := set(arithmetic) - set(ARITHMETIC):
        raise ValueError(f"--arithmetic {', '.join(sorted(unknown))}: choose from {', '.join(ARITHMETIC)}")
    if not seeds or not arithmetic:
        raise ValueError(f"nothing to train: seeds {seeds}, arithmetic {arithmetic}; name at least one of each")
    if data is None:
        if not (source := os.environ.get("MINIRES_DATA")):
            raise ValueError("say where the images are: --data ARCHIVE, or set MINIRES_DATA")
        data = Path(source, "cifar10-jpg.tar.xz")
    common: dict[str, Any] = {"dataset": "folder", "data_dir": str(data)} | ({"epochs": epochs} if epochs else {})
    recipes = {
        (name, seed): load_recipe(
            "cifar10-short",
            {**common, "seed": seed, "precision": _PRECISION[name], "out": str(folder / f"{name}-{seed}")},
        )
        for seed in seeds
        for name in arithmetic
    }
    path = output or results_file("accuracy", get_num_threads())
    for (name, seed), recipe in recipes.items():
        if any(_key(row) == (name, str(seed), str(recipe.epochs)) for row in _rows(path)):
            continue
        row = {"arithmetic": name, "seed": seed, "epochs": recipe.epochs, **one_run(name, recipe)}
        write("accuracy", [row], get_num_threads(), path, group=GROUP)
        print(f"{name}, seed {seed}: {row['test_accuracy']:.2%}", flush=True)
    print(f"results: {path}")
    return judge([row for row in _rows(path) if row["epochs"] == str(recipe.epochs)])


def one_run(name: str, recipe: Recipe) -> dict[str, Any]:
    """Train one, or go on with what is in its folder."""
    with minires.exact() if name == "exact" else contextlib.nullcontext():
        folder = Path(recipe.out)
        summary = resume(folder, {"data_dir": recipe.data_dir}) if folder.exists() else train(recipe)
    return {
        "test_accuracy": summary.test_accuracy,
        "test_loss": summary.test_loss,
        "first_step_seconds": round(summary.first_step_seconds, 1),
        "seconds": round(summary.seconds, 1),
    }


def judge(rows: Sequence[Mapping[str, str]]) -> int:
    """Print mean and span of each arithmetic, and say whether Winograd's and bfloat16's are where they should be."""
    found = {n: [100 * float(r["test_accuracy"]) for r in rows if r["arithmetic"] == n] for n in ARITHMETIC}
    for name, shares in found.items():
        if shares:
            span = f"{min(shares):.2f} to {max(shares):.2f} %"
            print(f"{name:9} mean {mean(shares):.2f} %, {span}, {len(shares)} seeds")
    if not found["exact"]:
        return 0
    least, most, usual = min(found["exact"]), max(found["exact"]), mean(found["exact"])
    wrong = []
    if found["winograd"] and not least <= mean(found["winograd"]) <= most:
        wrong.append(f"Winograd's mean lies outside of what the exact kernels span ({least:.2f} to {most:.2f} %)")
    if found["bf16"] and mean(found["bf16"]) < usual - 1:
        wrong.append(f"bfloat16's mean is more than one point below the exact kernels' ({usual:.2f} %)")
    print("\n".join(wrong) or "all within what the exact kernels give")
    return 1 if wrong else 0


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[key] for key in GROUP)


def _rows(path: Path) -> list[dict[str, str]]:
    return read(path) if path.exists() else []
