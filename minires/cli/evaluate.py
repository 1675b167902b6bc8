"""`minires evaluate`: how good a network is, that of a run or of any file of weights."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from .errors import say
from .values import Whole


def evaluate(
    run: str | None = None,
    /,
    *,
    weights: str = "final",
    model: str = "",
    json: bool = False,
    pictures: Annotated[bool, Parameter(name=["--pictures", "--confusion"])] = True,
    out: Path | None = None,
    dataset: Annotated[str | None, Parameter(name=["--dataset", "--data"])] = None,
    data_dir: str | None = None,
    image_size: Whole | None = None,
    mean: Annotated[tuple[float, ...] | None, Parameter(consume_multiple=True, negative_iterable=())] = None,
    std: Annotated[tuple[float, ...] | None, Parameter(consume_multiple=True, negative_iterable=())] = None,
    device: str | None = None,
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
    threads: Whole | None = None,
    workers: Whole | None = None,
) -> int:
    """Accuracy, loss, confusion and worst mistakes of a trained network on test images.

    minires evaluate runs/NAME

    minires evaluate --weights resnet20.th --model resnet20 --data folder --data-dir photos

    Parameters
    ----------
    run
        The run folder; without it, --weights says what to evaluate, and --data-dir on what.
    weights
        Of a run: final (model.safetensors), best or last (of a checkpoint), ema (the running average in the last one).
        Without a run: a file, a run folder, or the name of published weights.
    model
        The model's name, where the weights do not say it.
    json
        Print one JSON object instead of tables.
    pictures
        Write confusion.csv, confusion.png and mistakes.png; the pictures need matplotlib.
    out
        The folder to write them into; by default that of the run, and without a run they are not written.
    dataset
        The data set, if not that of training; for weights in files by default folder.
    data_dir
        Where the data set lies, if not where it was in training.
    image_size
        Height and width that images are resized to, in pixels, if not as the weights say.
    mean
        Mean per channel to normalise by, if not as the weights say.
    std
        The deviation that goes with --mean.
    device
        'cpu', 'cuda' or 'cuda:N', if not that of training.
    precision
        What convolutions and the last layer compute in, if not as in training.
    threads
        CPU threads of the kernels, if not as in training.
    workers
        How many prepare images ahead of time.
    """
    from ..train.evaluation import evaluate_run, evaluate_weights
    from ..train.pictures import write_confusion, write_mistakes

    given: dict[str, Any] = {
        "dataset": dataset,
        "data_dir": data_dir,
        "image_size": image_size,
        "mean": mean,
        "std": std,
        "device": device,
        "precision": precision,
        "threads": threads,
        "workers": workers,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    of_run: Any = weights
    if run is None:
        if weights == "final":
            raise ValueError("say what to evaluate: RUN (a run folder), or --weights FILE --model NAME --data-dir DIR")
        if (Path(weights) / "recipe.toml").is_file() and not model:
            run, of_run = weights, "final"
    elif model:
        raise ValueError(f"--model {model} does not go with a run, whose recipe names its model")
    if run is not None:
        found = evaluate_run(run, of_run, changes, on_note=say)
    else:
        found = evaluate_weights(weights, model, changes, on_note=say)
    folder, written = out or (run and Path(run)), []
    if pictures and folder:
        folder.mkdir(parents=True, exist_ok=True)
        written = [str(path) for path in (*write_confusion(found, folder), *write_mistakes(found, folder))]
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
        print(f"written to {folder}: {', '.join(Path(path).name for path in written)}")
    elif not folder:
        print("--out DIR writes the confusion matrix and the worst mistakes")
    return 0
