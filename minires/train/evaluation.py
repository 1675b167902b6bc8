"""How good is what a run has trained: accuracy, loss, and which classes are taken for which.

evaluate_run("runs/digits-...").top1
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minires.kernels.cpu.jit import set_num_threads  # pyright: ignore[reportMissingImports]

from ..device import CPU, array_module, to_device
from ..device import device as as_device
from ..interop import load
from ..models import create_model
from ..nn import Module
from ..ops import cross_entropy
from ..serialization import write_atomically
from ..state import no_grad
from .checkpoint import Checkpoint, Checkpoints, DamagedCheckpoint, read_checkpoint
from .images import make_loader, open_images
from .run_folder import recipe_of

Weights = Literal["final", "best", "last", "ema"]
_BATCH = 256  # images at once; results do not depend on it


@dataclass(frozen=True)
class Evaluation:
    """confusion: (K, K) int64, how many images of class i (row) were taken for class j (column).

    classes: the K names. loss: cross-entropy, nats per image, with the label smoothing of training. correct5: images
    whose class is among the 5 largest outputs. weights: which ones of the run, and
    file: where they were read.
    """

    classes: tuple[str, ...]
    confusion: np.ndarray
    loss: float
    correct5: int
    weights: str = ""
    file: str = ""

    total = property(lambda self: int(self.confusion.sum()), doc="How many images.")
    correct = property(lambda self: int(np.trace(self.confusion)), doc="Images whose largest output is their class.")
    top1 = property(lambda self: self.correct / self.total, doc="Share of them.")
    top5 = property(lambda self: self.correct5 / self.total, doc="Share of images whose class is among the 5 largest.")

    def per_class(self) -> list[tuple[str, int, int]]:
        """(class, images of it that were right, images of it)."""
        rows = zip(self.classes, self.confusion, strict=True)
        return [(name, int(row[i]), int(row.sum())) for i, (name, row) in enumerate(rows)]

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it; without the confusion matrix."""
        counts = {"correct": self.correct, "total": self.total, "top1": self.top1, "top5": self.top5, "loss": self.loss}
        per_class = {name: {"correct": right, "total": n} for name, right, n in self.per_class()}
        return {**counts, "weights": self.weights, "file": self.file, "per_class": per_class}


def evaluate_run(
    run: str | Path,
    weights: Weights = "final",
    changes: Mapping[str, Any] | None = None,
    on_note: Callable[[str], Any] | None = None,
) -> Evaluation:
    """Rebuild the network of a run folder and its test images, and count.

    weights: "final", those of model.safetensors, which the run's summary is about; "last", those of the newest
    checkpoint; "ema", their running average there; "best", those of the epoch that was best on the held-out images (the
    average, if the run has one). changes: fields of the recipe that are different now (data_dir, dataset, device,
    threads, workers). on_note: called with a line to be read. Raises ValueError or OSError in one line.
    """
    folder, note = Path(run), on_note or (lambda text: None)
    if weights not in (known := ("final", "best", "last", "ema")):
        raise ValueError(f"weights={weights!r} is not one of {', '.join(known)}")
    recipe = dataclasses.replace(recipe_of(folder), **(changes or {}))
    device = as_device(recipe.device)
    array_module(device)  # raises where there is no such device
    where, state = _load(folder, weights, note)
    summary = _summary(folder)
    if recipe.threads:
        set_num_threads(recipe.threads)
    images = open_images(recipe)
    if list(images.classes) != summary.get("classes", list(images.classes)):
        raise ValueError(f"dataset={recipe.dataset!r} has other classes than those that {folder} was trained on")
    for moment in ("mean", "std"):
        if summary and not np.allclose(summary[moment], getattr(images, moment), rtol=1e-4, atol=1e-6):
            now = list(getattr(images, moment))
            note(f"warning: the training images' {moment} is {now}, and was {summary[moment]} when the run was trained")
    options: dict[str, Any] = {"stem": recipe.stem} if recipe.stem else {}
    model = create_model(recipe.model, len(images.classes), images.channels, **options)
    try:
        model.load_state_dict(state)
    except ValueError as error:
        why = textwrap.shorten(str(error), 300, placeholder=" ...")  # the names of all weights, at worst
        raise ValueError(f"{where} does not fit the recipe: {why}") from error
    model.to(device)
    loader = make_loader(recipe, images, images.test, _BATCH, training=False)
    order = ([t.to(device) for t in batch] for batch in loader.iterate(0))
    found = evaluate_model(model, order, images.classes, recipe.label_smoothing)
    return dataclasses.replace(found, weights=weights, file=str(where))


@no_grad()
def evaluate_model(
    model: Module, batches: Iterable[Any], classes: Sequence[str], label_smoothing: float = 0.0
) -> Evaluation:
    """Count over batches of (images, labels (N,) integers). Equal outputs: the class with the lower number comes first.

    ValueError where there are no images, and where the outputs are not finite.
    """
    k, loss, correct5 = len(classes), 0.0, 0
    confusion = np.zeros((k, k), np.int64)
    training = model.training
    model.eval()
    try:
        for images, labels in batches:
            output = model(images)
            y, t = to_device(output.array, CPU), to_device(labels.array, CPU)
            if not np.isfinite(y).all():
                raise ValueError("the weights give outputs that are NaN or infinite: they are damaged, or diverged")
            loss += float(cross_entropy(output, labels, label_smoothing=label_smoothing).array) * len(t)
            own = np.take_along_axis(y, t[:, None], 1)
            before = (y > own) | ((y == own) & (np.arange(k) < t[:, None]))  # (N, K): what ranks before the label
            correct5 += int((before.sum(1) < 5).sum())
            np.add.at(confusion, (t, y.argmax(1)), 1)
    finally:
        model.train(training)
    if not confusion.any():
        raise ValueError("there are no images to evaluate")
    return Evaluation(tuple(classes), confusion, loss / int(confusion.sum()), correct5)


def write_confusion(found: Evaluation, folder: Path) -> list[Path]:
    """Write confusion.csv and, where matplotlib is installed, confusion.png; the files that were written."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["class / taken for", *found.classes])
    table.writerows([name, *row] for name, row in zip(found.classes, found.confusion.tolist(), strict=True))
    files = [folder / "confusion.csv", folder / "confusion.png"]
    write_atomically(files[0], lambda beside: beside.write_bytes(text.getvalue().encode()))
    return files if _draw(found, files[1]) else files[:1]


def _draw(found: Evaluation, path: Path) -> bool:
    """Shares of each class in grey, darker for more; numbers where they can be read."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    k = len(found.classes)
    side = min(14.0, 2.5 + 0.45 * k)
    figure = Figure(figsize=(side, side), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    share = found.confusion / np.maximum(1, found.confusion.sum(1, keepdims=True))
    axes.imshow(share, cmap="Greys", vmin=0, vmax=1)
    axes.set(
        title=f"{found.correct} of {found.total} images right ({found.top1:.2%})", xlabel="taken for", ylabel="class"
    )
    if k <= 30:
        axes.set_xticks(range(k), found.classes, rotation=90)
        axes.set_yticks(range(k), found.classes)
        for i, j in zip(*np.nonzero(found.confusion), strict=True):
            shade = "white" if share[i, j] > 0.5 else "black"
            axes.text(j, i, str(found.confusion[i, j]), ha="center", va="center", fontsize=8, color=shade)
    write_atomically(path, lambda beside: canvas.print_png(beside))
    return True


def _load(folder: Path, weights: Weights, note: Callable[[str], Any]) -> tuple[Path, dict[str, Any]]:
    """(file, state dict) of the weights asked for."""
    if weights == "final":
        path = folder / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no model.safetensors yet; try --weights last")
        try:
            return path, load(path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error.__cause__ or error}); try --weights last") from error
    kept = Checkpoints(folder / "checkpoints")
    path, checkpoint = _newest(kept, note)
    average = any(name.startswith("ema/") for name in checkpoint.arrays)
    if weights == "best":
        step = checkpoint.state["best"][1]
        if step not in kept.steps():
            raise FileNotFoundError(f"{folder} has no checkpoint of its best epoch (step {step}); try --weights final")
        path = kept.path(step)
        checkpoint = read_checkpoint(path)
    if weights == "ema" and not average:
        raise ValueError(f"{folder} has no running average: it was trained with ema = 0; try --weights last")
    part = "model/" if weights == "last" or not average else "ema/"
    found = {name.removeprefix(part): array for name, array in checkpoint.arrays.items() if name.startswith(part)}
    found.pop("ema_updates", None)
    return path, found


def _newest(kept: Checkpoints, note: Callable[[str], Any]) -> tuple[Path, Checkpoint]:
    """The newest checkpoint that is intact; unlike in training, a damaged one is left where it is."""
    damaged: DamagedCheckpoint | None = None
    for step in reversed(kept.steps()):
        try:
            return kept.path(step), read_checkpoint(kept.path(step))
        except DamagedCheckpoint as error:
            note(f"warning: {error}; looking for the one before")
            damaged = error
    raise damaged or FileNotFoundError(f"{kept.folder.parent} has no checkpoints; try --weights final")


def _summary(folder: Path) -> dict[str, Any]:
    """What summary.json says, {} where the run has not ended."""
    path = folder / "summary.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not {"classes", "mean", "std"} <= found.keys():
            raise ValueError("it lacks classes, mean or std")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove it to evaluate without it") from error
    return found
