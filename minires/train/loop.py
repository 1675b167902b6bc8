"""The training loop: recipe in, run folder and summary out.

    for every batch:    loss = cross_entropy(model(images), labels);  loss.backward();  sgd.step();  schedule.step()
    after every epoch:  evaluate; write metrics.jsonl and the weights

Initial weights come from the recipe's seed, order and augmentation from (seed, epoch, step). No other chance enters:
the same recipe on the same machine with as many threads gives the same weights, bit for bit.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from minires.kernels.cpu.jit import get_num_threads, set_num_threads  # pyright: ignore[reportMissingImports]

from .. import optim
from ..data import DataLoader
from ..device import array_module
from ..device import device as as_device
from ..engine import Tensor
from ..hooks import AnomalyError, AnomalyHook
from ..models import create_model
from ..nn import Module
from ..ops import cross_entropy
from ..random import manual_seed
from ..serialization import save
from ..state import no_grad
from .curves import draw_curves
from .images import open_images
from .metrics import Epoch, Mean, Step, Stopwatch, Summary
from .recipe import Recipe
from .run_folder import RunFolder
from .schedule import make_schedule

_EVALUATE = 256  # images per batch of evaluation; results do not depend on it


class Diverged(RuntimeError):
    """The loss is not a number any more."""


def train(
    recipe: Recipe,
    on_step: Callable[[Step], Any] | None = None,
    on_epoch: Callable[[Epoch], Any] | None = None,
    on_note: Callable[[str], Any] | None = None,
) -> Summary:
    """Train as the recipe says, and write its run folder (`RunFolder` lists what is in it).

    on_step, on_epoch: called after every step and every epoch. on_note: called with a line that a user may want to
    read. Raises ValueError, RuntimeError or OSError in one line for what the recipe asks and is not there, and
    `Diverged`, which names the op and the module where it began, when the loss is NaN or infinite.
    """
    note = on_note or (lambda text: None)
    run = Run(recipe)
    try:
        for epoch in range(1, recipe.epochs + 1):
            with np.errstate(all="ignore"):  # the loss is watched; a NaN is reported in our words
                record = run.epoch(epoch, on_step)
            if on_epoch is not None:
                on_epoch(record)
    except KeyboardInterrupt:
        done = len(run.folder.epochs)
        note(f"interrupted; the weights after {done} epochs are in {run.folder.path}" if done else "interrupted")
        raise
    result = f"{run.test.accuracy:.2%} of the held-out images right"
    title = f"{recipe.model} on {recipe.dataset}, seed {recipe.seed}: {result}"
    if not draw_curves(run.folder.path / "curves.png", run.folder.epochs, title):
        note("no curves.png: drawing it needs matplotlib (pip install 'minires[demo]')")
    summary = run.summary()
    run.folder.finish(summary)
    return summary


class Run:
    """A training run: the model, its optimizer, the images and the run folder, made as the recipe says."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.start = recipe, time.perf_counter()
        self.device = as_device(recipe.device)
        array_module(self.device)  # raises where there is no such device
        if recipe.threads:
            set_num_threads(recipe.threads)
        self.images = images = open_images(recipe)
        if len(images.train) < recipe.batch_size:
            raise ValueError(f"batch_size={recipe.batch_size} is more than the {len(images.train)} training images")
        common: dict[str, Any] = {"num_workers": recipe.workers, "generator": recipe.seed}
        # the rest of an epoch that fills no batch is dropped: statistics of a few images would unsettle BatchNorm
        self.loader = DataLoader(images.train, recipe.batch_size, shuffle=True, drop_last=True, **common)
        self.tests = DataLoader(images.test, _EVALUATE, **common)
        manual_seed(recipe.seed)
        self.model = create_model(recipe.model, num_classes=len(images.classes), in_channels=images.channels)
        self.model.to(self.device)
        settings = {"momentum": recipe.momentum, "nesterov": recipe.nesterov, "weight_decay": recipe.weight_decay}
        self.optimizer = optim.SGD(self.model.parameters(), recipe.lr, **settings)
        self.schedule = make_schedule(recipe, self.optimizer, len(self.loader))
        self.steps, self.watch, self.test = 0, Stopwatch(), Mean()
        self.folder = RunFolder(recipe)  # last, so that a recipe that cannot be leaves no folder behind

    def epoch(self, number: int, on_step: Callable[[Step], Any] | None = None) -> Epoch:
        """Train for an epoch (from 1), evaluate, and write the run folder."""
        recipe, mean, lr = self.recipe, Mean(), math.nan
        self.model.train()
        self.watch.begin_epoch()
        for images, labels in _on(self.device, self.loader):
            lr = self.schedule.get_last_lr()[0]
            loss, logits = self.step(images, labels)
            mean.add(loss, logits.array, labels.array)
            self.watch.lap(recipe.batch_size)
            if on_step is not None:
                total = recipe.epochs * len(self.loader)
                on_step(Step(number, self.steps, total, loss, mean.accuracy, self.watch.epoch_speed))
        self.test = test = evaluate(self.model, _on(self.device, self.tests), recipe.label_smoothing)
        seconds = time.perf_counter() - self.start
        results = (mean.loss, mean.accuracy, test.loss, test.accuracy, self.watch.epoch_speed, seconds)
        record = Epoch(number, self.steps, lr, *results)
        self.folder.add(record)
        save(self.model.state_dict(), self.folder.path / "model.safetensors")
        return record

    def step(self, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
        """One step of SGD: the loss of the batch and the model's outputs, both from before the step."""
        self.optimizer.zero_grad()
        logits = self.model(images)
        loss = cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        value = float(loss.array)
        if not math.isfinite(value):
            raise Diverged(f"the loss is {value} in step {self.steps + 1}: {self.explain(images, labels)}")
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.steps += 1
        return value, logits

    def explain(self, images: Tensor, labels: Tensor) -> str:
        """Where the NaN or infinity in this batch's loss began: the op and the module."""
        with AnomalyHook():
            try:
                cross_entropy(self.model(images), labels, label_smoothing=self.recipe.label_smoothing)
            except AnomalyError as anomaly:
                return f"{anomaly}; try a smaller lr than {self.recipe.lr}"
        return "it is finite when the batch is computed again"

    def summary(self) -> Summary:
        """What summary.json holds."""
        return Summary(
            test_accuracy=self.test.accuracy,
            test_loss=self.test.loss,
            test_images=self.test.images,
            train_images=len(self.images.train),
            epochs=self.recipe.epochs,
            steps=self.steps,
            seconds=time.perf_counter() - self.start,
            first_step_seconds=self.watch.first,
            images_per_second=self.watch.speed,
            model=self.recipe.model,
            parameters=sum(p.array.size for p in self.model.parameters()),
            classes=list(self.images.classes),
            mean=list(self.images.mean),
            std=list(self.images.std),
            seed=self.recipe.seed,
            device=str(self.device),
            threads=get_num_threads(),
            versions=versions(),
            recipe=dataclasses.asdict(self.recipe),
            folder=str(self.folder.path),
        )


@no_grad()
def evaluate(model: Module, batches: Iterable[Any], label_smoothing: float = 0.0) -> Mean:
    """Loss and accuracy of the model, in evaluation mode, over batches of (images, labels). Its mode is put back."""
    mean, training = Mean(), model.training
    model.eval()
    for images, labels in batches:
        logits = model(images)
        loss = cross_entropy(logits, labels, label_smoothing=label_smoothing)
        mean.add(float(loss.array), logits.array, labels.array)
    model.train(training)
    return mean


def versions() -> dict[str, str]:
    """What the run ran on: versions of Python and of the packages that compute, and the platform."""
    packages = {name: importlib.metadata.version(name) for name in ("minires", "numpy", "numba")}
    return {"python": platform.python_version(), **packages, "platform": platform.platform()}


def _on(device: Any, batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        yield [tensor.to(device) for tensor in batch]
