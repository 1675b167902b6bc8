"""How good a network is: accuracy, loss, which classes are taken for which, and where it is most wrong.

evaluate_run("runs/digits-...").top1                                              on the run's test images
evaluate_weights("resnet20.th", "resnet20", dataset="folder", data_dir="photos")  any weights on any images
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minires.kernels.cpu.jit import set_num_threads  # pyright: ignore[reportMissingImports]

from ..data import DataLoader, ImageDataset
from ..device import CPU, array_module, to_device
from ..device import device as as_device
from ..engine import Tensor
from ..interop import load
from ..models import create_model
from ..nn import Module
from ..nn.module import StateDictError
from ..ops import cross_entropy
from ..state import no_grad
from . import precision
from .checkpoint import Checkpoint, Checkpoints, DamagedCheckpoint, read_checkpoint
from .images import make_loader, open_images, open_test
from .pretrained import for_inference, open_network, summary_of
from .recipe import Recipe
from .run_folder import recipe_of

Weights = Literal["final", "best", "last", "ema"]
_BATCH = 256  # images at once; results do not depend on it
_WORST = 24  # mistakes that are listed and drawn


@dataclass(frozen=True)
class Mistake:
    """An image that was taken for another class. index: in the data set. sure: the probability of the class that it
    was taken for. file: "" where it had none. image: (H, W, C) uint8, where there is a data set of them."""

    index: int
    label: str
    taken_for: str
    sure: float
    file: str = ""
    image: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Evaluation:
    """confusion: (K, K) int64, how many images of class i (row) were taken for class j (column).

    classes: the K names. loss: cross-entropy, nats per image, with the label smoothing of training. correct5: images
    whose class is among the 5 largest outputs. mistakes: the images that the network was most sure about and wrong,
    worst first. weights: which ones of the run, and file: where they were read.
    """

    classes: tuple[str, ...]
    confusion: np.ndarray
    loss: float
    correct5: int
    weights: str = ""
    file: str = ""
    mistakes: tuple[Mistake, ...] = ()

    total = property(lambda self: int(self.confusion.sum()), doc="How many images.")
    correct = property(lambda self: int(np.trace(self.confusion)), doc="Images whose largest output is their class.")
    top1 = property(lambda self: self.correct / self.total, doc="Share of them.")
    top5 = property(lambda self: self.correct5 / self.total, doc="Share of images whose class is among the 5 largest.")

    def per_class(self) -> list[tuple[str, int, int]]:
        """(class, images of it that were right, images of it)."""
        rows = zip(self.classes, self.confusion, strict=True)
        return [(name, int(row[i]), int(row.sum())) for i, (name, row) in enumerate(rows)]

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        counts = {"correct": self.correct, "total": self.total, "top1": self.top1, "top5": self.top5, "loss": self.loss}
        per_class = {name: {"correct": right, "total": n} for name, right, n in self.per_class()}
        mistakes = [{name: getattr(m, name) for name in ("file", "label", "taken_for", "sure")} for m in self.mistakes]
        what = {"per_class": per_class, "confusion": self.confusion.tolist(), "mistakes": mistakes}
        return {**counts, "weights": self.weights, "file": self.file, **what}


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
    precision, threads, workers). on_note: called with a line to be read. Raises ValueError or OSError in one line.
    """
    folder, note = Path(run), on_note or (lambda text: None)
    if weights not in (known := ("final", "best", "last", "ema")):
        raise ValueError(f"weights={weights!r} is not one of {', '.join(known)}")
    recipe = dataclasses.replace(recipe_of(folder), **(changes or {}))
    device = as_device(recipe.device)
    array_module(device)  # raises where there is no such device
    where, state = _load(folder, weights, note)
    summary = summary_of(folder)
    if recipe.threads:
        set_num_threads(recipe.threads)
    images = open_images(recipe)
    if list(images.classes) != summary.get("classes", list(images.classes)):
        raise ValueError(f"dataset={recipe.dataset!r} has other classes than those that {folder} was trained on")
    for moment in ("mean", "std"):
        if summary and not np.allclose(summary[moment], getattr(images, moment), rtol=1e-4, atol=1e-6):
            now = list(getattr(images, moment))
            note(f"warning: the training images' {moment} is {now}, and was {summary[moment]} when the run was trained")
    try:
        model = create_model(recipe.model, len(images.classes), images.channels, weights=state)
    except StateDictError as error:
        why = textwrap.shorten(str(error), 300, placeholder=" ...")  # the names of all weights, at worst
        raise ValueError(f"{where} does not fit the recipe: {why}") from error
    model.to(device)
    loader = make_loader(recipe, images, images.test, _BATCH, training=False)
    order = ([t.to(device) for t in batch] for batch in loader.iterate(0))
    with precision.region(recipe):
        found = evaluate_model(for_inference(model), order, images.classes, recipe.label_smoothing)
    return _from(found, images.test, weights, str(where))


def evaluate_weights(
    weights: str | Path,
    model: str = "",
    changes: Mapping[str, Any] | None = None,
    on_note: Callable[[str], Any] | None = None,
) -> Evaluation:
    """Count the test images of a data set that weights get right; of a folder without a split, all images.

    weights, model: as `open_network` takes them. changes: fields of `Recipe`: dataset (by default "folder"), data_dir,
    image_size, mean, std, device, precision, threads, workers. on_note: called with a line to be read. Raises
    ValueError or OSError in one line, also where the weights have another number of classes.
    """
    note = on_note or (lambda text: None)
    given = {"dataset": "folder", **(changes or {})}
    moments: dict[str, Any] = {name: given.get(name, ()) for name in ("mean", "std")}
    device = given.get("device", "cpu")
    network = open_network(weights, model, **moments, image_size=given.get("image_size", 0), device=device, note=note)
    given.update(mean=network.mean, std=network.std, image_size=network.image_size)
    recipe = Recipe(**given)
    if recipe.threads:
        set_num_threads(recipe.threads)
    test = open_test(recipe, network.resize)
    if len(test.classes) != len(network.classes):
        raise ValueError(
            f"{network.source} tell {len(network.classes)} classes apart, and dataset={recipe.dataset!r} has "
            f"{len(test.classes)} ({textwrap.shorten(', '.join(test.classes), 60, placeholder='...')})"
        )
    if test.images.shape[3] != network.channels:
        raise ValueError(f"{network.source} are for images of {network.channels} channels, not {test.images.shape[3]}")
    if network.named and network.classes != tuple(test.classes):
        note(
            f"warning: the weights' classes are {', '.join(network.classes)}; the images' are {', '.join(test.classes)}"
        )
    loader = DataLoader(test, _BATCH, num_workers=recipe.workers, workers=recipe.worker_kind)
    order = ([t.to(device) for t in batch] for batch in loader)
    with precision.region(recipe):
        found = evaluate_model(for_inference(network.model), order, test.classes)
    return _from(found, test, "all", str(weights))


def _from(found: Evaluation, test: ImageDataset, weights: str, file: str) -> Evaluation:
    """With where the weights and the mistaken images came from."""
    mistakes = tuple(
        dataclasses.replace(m, file=test.paths[m.index] if test.paths else "", image=test.images[m.index])
        for m in found.mistakes
    )
    return dataclasses.replace(found, weights=weights, file=file, mistakes=mistakes)


@no_grad()
def evaluate_model(
    model: Module, batches: Iterable[Any], classes: Sequence[str], label_smoothing: float = 0.0
) -> Evaluation:
    """Count over batches of (images, labels (N,) integers). Equal outputs: the class with the lower number comes first.

    ValueError where there are no images, and where the outputs are not finite.
    """
    k, loss, correct5 = len(classes), 0.0, 0
    confusion, mistakes = np.zeros((k, k), np.int64), []
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
            taken, first = y.argmax(1), int(confusion.sum())
            sure = 1 / np.exp(y.astype(np.float64) - y.max(1, keepdims=True)).sum(1)  # softmax of the largest
            for i in np.flatnonzero(taken != t).tolist():
                mistakes.append(Mistake(first + i, classes[int(t[i])], classes[int(taken[i])], float(sure[i])))
            mistakes = sorted(mistakes, key=lambda m: -m.sure)[:_WORST]
            np.add.at(confusion, (t, taken), 1)
    finally:
        model.train(training)
    if not confusion.any():
        raise ValueError("there are no images to evaluate")
    return Evaluation(tuple(classes), confusion, loss / int(confusion.sum()), correct5, mistakes=tuple(mistakes))


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
    found = {
        name.removeprefix(part): Tensor(array) for name, array in checkpoint.arrays.items() if name.startswith(part)
    }
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
