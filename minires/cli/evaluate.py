"""`minires evaluate`: how good is what a run has trained."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import Any, Literal

from .values import Whole


def evaluate(
    run: str,
    /,
    *,
    weights: Literal["final", "best", "last", "ema"] = "final",
    json: bool = False,
    confusion: bool = True,
    dataset: str | None = None,
    data_dir: str | None = None,
    device: str | None = None,
    threads: Whole | None = None,
    workers: Whole | None = None,
) -> int:
    """Accuracy, loss and confusion of a trained network on its test images.

    Parameters
    ----------
    run
        The run folder.
    weights
        final: model.safetensors; best, last: of a checkpoint; ema: the running average in the last one.
    json
        Print one JSON object instead of tables.
    confusion
        Write confusion.csv, and confusion.png where matplotlib is installed, into the run folder.
    dataset
        The data set, if not where it was in training.
    data_dir
        Where the data set lies, if not where it was in training.
    device
        'cpu', 'cuda' or 'cuda:N', if not that of training.
    threads
        CPU threads of the kernels, if not as in training.
    workers
        How many prepare images ahead of time.
    """
    from ..train.evaluation import evaluate_run, write_confusion

    given: dict[str, Any] = {
        "dataset": dataset,
        "data_dir": data_dir,
        "device": device,
        "threads": threads,
        "workers": workers,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    found = evaluate_run(run, weights, changes, on_note=lambda text: print(f"minires: {text}", file=sys.stderr))
    written = [str(path) for path in (write_confusion(found, Path(run)) if confusion else ())]
    if json:
        print(jsonlib.dumps({"run": run, **found.to_json(), "files": written}, ensure_ascii=False))
        return 0
    width = max(len("class"), *map(len, found.classes))
    print(f"{'class':<{width}}  {'right':>7}  {'of':>7}  accuracy")
    for name, right, n in found.per_class():
        share = f"{right / n:8.2%}" if n else " " * 8
        print(f"{name:<{width}}  {right:>7,}  {n:>7,}  {share}")
    print(
        f"top-1 accuracy {found.top1:.2%} ({found.correct} of {found.total} images); top-5 {found.top5:.2%}; "
        f"loss {found.loss:.4f}; {found.weights} weights, {found.file}"
    )
    if written:
        print(f"confusion matrix: {', '.join(written)}")
    return 0
