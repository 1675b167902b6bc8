"""The training loop: recipe in, run folder and summary out.

    for every batch:    loss = cross_entropy(model(images), labels);  loss.backward();  sgd.step();  schedule.step()
    after every epoch:  evaluate; write metrics, weights and a checkpoint

Initial weights come from the recipe's seed, order and augmentation from (seed, epoch, step), the learning rate from the
step. No other chance enters: the same recipe on the same machine with as many threads gives the same weights, bit for
bit, also when the run was stopped at any step and resumed (`resume`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minires.kernels.cpu.jit import get_num_threads, set_num_threads  # pyright: ignore[reportMissingImports]

from .. import dispatch
from ..device import array_module
from ..device import device as as_device
from ..engine import Tensor
from ..nn import Module
from ..ops import cross_entropy
from ..serialization import save
from ..state import no_grad
from . import state
from .checkpoint import read_checkpoint
from .curves import draw_curves
from .images import make_loader, open_images
from .interrupt import Interrupted, Signals
from .metrics import Epoch, Mean, Step, Stopwatch, Summary, count_right
from .optimizers import make_optimizer
from .penalties import Penalty
from .recipe import Recipe
from .run_folder import RunFolder
from .schedule import make_schedule
from .stages import Freezing
from .start import new_model
from .step import Diverged, TrainStep
from .writers import open_writers, tensorboard_writer

_EVALUATE = 256  # images per batch of evaluation; results do not depend on it
_RECALIBRATE = 100  # batches that recalibration looks at, at most


class _Stop(Exception):
    """A signal came; the run is between two steps, or evaluates."""


def train(
    recipe: Recipe,
    on_step: Callable[[Step], Any] | None = None,
    on_epoch: Callable[[Epoch], Any] | None = None,
    on_note: Callable[[str], Any] | None = None,
) -> Summary:
    """Train as the recipe says, and write its run folder (`RunFolder` lists what is in it).

    on_step, on_epoch: called after every step and every epoch. on_note: called with a line that a user may want to
    read. Raises ValueError, RuntimeError or OSError in one line for what the recipe asks and is not there; `Diverged`,
    which names the op and the module where it began, when the loss or a gradient is NaN or infinite; `Interrupted`
    when SIGINT or SIGTERM came: the step is finished and saved then.
    """
    run = _new_run(recipe)
    return run.go(on_step, on_epoch, on_note)


def resume(
    path: str | Path,
    changes: Mapping[str, Any] | None = None,
    extend: bool = False,
    on_step: Callable[[Step], Any] | None = None,
    on_epoch: Callable[[Epoch], Any] | None = None,
    on_note: Callable[[str], Any] | None = None,
) -> Summary:
    """Go on with the run in a folder, from its last checkpoint: to the same weights, bit for bit, as without a break.

    changes: recipe fields with other values; only those that change nothing in the result (`recipe.FREE`), and with
    `extend` also epochs and steps, which change the learning rates to come. Warns (on_note) of another machine or
    other versions. Raises as `train` does, and ValueError for what may not change and for a run that is complete.
    """
    note, path = on_note or (lambda text: None), Path(path)
    recipe = state.resumed_recipe(path, changes or {}, extend)
    folder = RunFolder.existing(path, recipe.keep)
    try:
        checkpoint = folder.checkpoints.load(note)
        run = _new_run(recipe, folder)
        if checkpoint is None:
            note(f"{path} has no checkpoint yet: starting from the beginning")
        else:
            state.restore(run, checkpoint, note)
    except BaseException:
        folder.close()
        raise
    folder.write_recipe(recipe)
    folder.summary_path.unlink(missing_ok=True)
    return run.go(on_step, on_epoch, on_note)


def _new_run(recipe: Recipe, folder: RunFolder | None = None) -> Run:
    if not recipe.probe:
        return Run(recipe, folder)
    from .probe import ProbeRun

    return ProbeRun(recipe, folder)


class Run:
    """A training run: the model, its optimizer, the images and the run folder, made as the recipe says.

    epoch (from 1) and batch: where it is; step: how many steps are done, of `total`. recorded: the step of the last
    line of the metrics. mean: over this epoch's batches. best: (accuracy, step) on the held-out images.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder | None = None):
        self.recipe, self.begun, self.seconds_before = recipe, time.perf_counter(), 0.0
        self.device = as_device(recipe.device)
        array_module(self.device)  # raises where there is no such device
        if recipe.tensorboard:
            tensorboard_writer()  # raises where it is missing
        if recipe.threads:
            set_num_threads(recipe.threads)
        self.images = images = open_images(recipe)
        if len(images.train) < recipe.batch_size:
            raise ValueError(f"batch_size={recipe.batch_size} is more than the {len(images.train)} training images")
        self.loader = make_loader(recipe, images, images.train, recipe.batch_size, training=True)
        self.per_epoch = len(self.loader)
        self.total = recipe.steps or recipe.epochs * self.per_epoch
        self.model, self.start = new_model(recipe, images.classes, images.channels, folder and folder.path)
        self.model.to(self.device)
        self.freezing = Freezing(recipe, self.model)
        self.optimizer = make_optimizer(recipe, self.model, self.start.taken if recipe.l2_sp else ())
        self.schedule = make_schedule(recipe, self.optimizer, self.total)
        penalty = Penalty(self.model, self.start.taken, recipe.l1, recipe.l2_sp, recipe.decay_norm)
        self.train_step = TrainStep(recipe, self.model, self.optimizer, penalty, lambda text: self.said(text))
        self.ema = _make_ema(self.model, recipe.ema) if recipe.ema else None
        self.epoch, self.batch, self.step, self.recorded = 1, 0, 0, 0
        self.mean, self.watch, self.judged = Mean(), Stopwatch(), None
        self.best = (-1.0, 0)
        self.signals, self.saved = Signals(), -1
        self.on_step: Callable[[Step], Any] | None = None
        self.said: Callable[[str], Any] = lambda text: None
        # last, so that a recipe that cannot be leaves no folder behind
        self.folder = folder or RunFolder.new(recipe)
        if folder is None:
            self.start.save(self.folder.path)

    def go(self, on_step: Any = None, on_epoch: Any = None, on_note: Any = None) -> Summary:
        """Train to the end, from where the run is. See `train`."""
        note = self.said = on_note or (lambda text: None)
        self.on_step = on_step
        tuning = dispatch.autotune() if self.recipe.autotune else contextlib.nullcontext()
        self.writers = open_writers(self.folder.path, tensorboard=self.recipe.tensorboard)
        try:
            self.writers.truncate_to(self.recorded)
            for line in self.header():
                note(line)
            with self.signals, tuning, np.errstate(all="ignore"):  # a NaN is reported in our words
                while True:
                    self._rest_of_epoch()
                    if self.recorded != self.step:
                        record = self._end_of_epoch()
                        if on_epoch is not None:
                            on_epoch(record)
                    if self.step >= self.total or self._stale():
                        return self._finish(note)
        except _Stop:
            if self.saved != self.step:
                self.save()
            name = "interrupted" if self.signals.received == 2 else "terminated"
            command = f"minires train --resume {self.folder.path}"
            text = f"{name} after step {self.step} of {self.total}, which is saved; go on with: {command}"
            raise Interrupted(text, self.signals.received) from None
        except KeyboardInterrupt:
            note(self._last_good("interrupted at once"))
            raise
        except Diverged:
            note(self._last_good("diverged"))
            raise
        finally:
            self.writers.close()
            self.loader.close()
            self.folder.close()

    def _rest_of_epoch(self) -> None:
        """The steps from here to the end of the epoch or of the run."""
        if self.batch == self.per_epoch or self.step >= self.total or self._stale():
            return
        self._look_for_signals()
        self.freezing.train(self.epoch)
        self.watch.begin_epoch(self.batch == 0)
        if self.batch == 0:
            self.mean = Mean()
        for images, targets in self.loader.iterate(self.epoch - 1, self.batch):
            loss, right = self._step(images, targets)
            if math.isfinite(loss):  # of a step in float16 that was left out it may be NaN
                self.mean.add(loss, right, len(images))
            self.watch.lap(self.recipe.batch_size)
            if self.on_step is not None:
                accuracy, speed = self.mean.accuracy, self.watch.epoch_speed
                self.on_step(Step(self.epoch, self.step, self.total, loss, accuracy, speed))
            if self.recipe.checkpoint_every and self.step % self.recipe.checkpoint_every == 0:
                self.save()
            self._look_for_signals()
            if self.step >= self.total:
                break

    def _step(self, images: Tensor, targets: Tensor) -> tuple[float, int]:
        """One step: the loss of the batch and how many of it are right, both from before it."""
        result = self.train_step(self.step + 1, images.to(self.device), targets.to(self.device))
        self.schedule.step()
        if self.ema is not None:
            self.ema.update()
        self.step += 1
        self.batch += 1
        return result

    def _end_of_epoch(self) -> Epoch:
        """Judge the weights, if it is time to; write metrics, weights and a checkpoint."""
        recipe, test = self.recipe, None
        last = self.step >= self.total
        if last or self.epoch % recipe.eval_every == 0:
            with self._weights_to_keep():
                test = self.judged = self._evaluate(self.images.held_out)
                self._save_weights()
            if test.accuracy > self.best[0]:
                self.best = (test.accuracy, self.step)
        record = Epoch(
            epoch=self.epoch,
            step=self.step,
            lr=max(self.schedule.lrs_at(self.step - 1)),
            train_loss=self.mean.loss,
            train_accuracy=self.mean.accuracy,
            test_loss=test.loss if test else None,
            test_accuracy=test.accuracy if test else None,
            images_per_second=self.watch.epoch_speed,
            seconds=self.seconds,
        )
        self.writers.add(dataclasses.asdict(record))
        self.recorded = self.step
        if self.batch == self.per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0
        self.save()
        return record

    def _finish(self, note: Callable[[str], Any]) -> Summary:
        """The last weights, or the best ones, judged on the test images; summary.json and curves.png."""
        test, recipe, images = self.judged, self.recipe, self.images
        if self._stale() and self.step < self.total:
            note(f"stopped early: no better epoch on the held-out images in the last {recipe.patience}")
        if recipe.final == "best":
            self._restore_best()
            note(f"the weights kept are those of the best epoch, of step {self.best[1]}")
        if test is None or recipe.recalibrate or recipe.val:
            with self._weights_to_keep() if recipe.final == "last" else contextlib.nullcontext():
                if recipe.recalibrate:
                    self._recalibrate()
                test = self._evaluate(images.test)
                self._save_weights()
        rows = [Epoch(**row) for row in self.writers.rows()]
        result = f"{test.accuracy:.2%} of the test images right"
        title = f"{recipe.model} on {recipe.dataset}, seed {recipe.seed}: {result}"
        if not draw_curves(self.folder.path / "curves.png", rows, title):
            note("no curves.png: drawing it needs matplotlib (pip install 'minires[demo]')")
        summary = Summary(
            test_accuracy=test.accuracy,
            test_loss=test.loss,
            test_images=test.images,
            train_images=len(images.train),
            epochs=math.ceil(self.step / self.per_epoch),
            steps=self.step,
            seconds=self.seconds,
            first_step_seconds=0.0 if math.isnan(self.watch.first) else self.watch.first,
            images_per_second=self.watch.speed,
            best_accuracy=self.best[0],
            best_step=self.best[1],
            model=recipe.model,
            parameters=sum(p.array.size for p in self.model.parameters()),
            classes=list(images.classes),
            mean=list(images.mean),
            std=list(images.std),
            seed=recipe.seed,
            device=str(self.device),
            threads=get_num_threads(),
            versions=state.versions(),
            recipe=dataclasses.asdict(recipe),
            folder=str(self.folder.path),
        )
        self.folder.finish(summary)
        return summary

    def save(self) -> None:
        """Write a checkpoint of where the run is. Diverged, and nothing is written, where a weight is not finite."""
        xp = array_module(self.device)
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if tensor.dtype.kind == "f" and not bool(xp.isfinite(tensor.array).all()):
                raise Diverged(f"{name} is not finite after step {self.step}; try a smaller lr than {self.recipe.lr}")
        arrays, rest = state.capture(self)
        self.folder.checkpoints.save(self.step, arrays, rest, best=self.best[1])
        self.saved = self.step

    def header(self) -> list[str]:
        """Lines on what pretrained weights the run begins with, and how they are trained; [] for new weights."""
        if not self.recipe.weights:
            return []
        size, images = self.recipe.image_size, self.images
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (images.mean, images.std))
        counts = f"{len(images.train):,} to train on, {len(images.test):,} to test"
        said = f"images: {counts}, {size}x{size}, normalised by mean {mean}, std {std}"
        return [*self.start.said, said, *([] if self.recipe.probe else self.freezing.table())]

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between a break and a resumption."""
        return self.seconds_before + time.perf_counter() - self.begun

    def _stale(self) -> bool:
        """Whether the run stops early: epochs were judged, and none of the last few was the best."""
        epochs, rest = divmod(self.step, self.per_epoch)
        judged = self.recorded == self.step and rest == 0 and epochs % self.recipe.eval_every == 0
        return 0 < self.recipe.patience * self.per_epoch <= self.step - self.best[1] and judged

    def _restore_best(self) -> None:
        """Put the weights of the best epoch into the model: the running average, if there is one."""
        arrays = read_checkpoint(self.folder.checkpoints.path(self.best[1])).arrays
        part = "model/" if self.ema is None else "ema/"
        own = self.model.state_dict()
        self.model.load_state_dict({name: arrays[part + name] for name in own})

    def _weights_to_keep(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, the model has the weights that are judged and saved: the running average, if there is one."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    def _evaluate(self, data: Any) -> Mean:
        loader = make_loader(self.recipe, self.images, data, _EVALUATE, training=False)
        with self.train_step.region:
            return evaluate(self.model, self._watched(loader.iterate(0)), self.recipe.label_smoothing)

    def _recalibrate(self) -> None:
        from .recalibrate import recalibrate

        self.freezing.train(self.epoch)  # frozen statistics stay
        order = self.loader.iterate(self.recipe.epochs)  # an epoch that was not trained on
        with self.train_step.region:
            recalibrate(self.model, self._watched(itertools.islice(order, _RECALIBRATE)))

    def _watched(self, order: Iterable[Any]) -> Iterator[Any]:
        """Batches on the run's device; a signal ends them."""
        for batch in order:
            self._look_for_signals()
            yield [tensor.to(self.device) for tensor in batch]

    def _look_for_signals(self) -> None:
        if self.signals.received:
            raise _Stop

    def _save_weights(self) -> None:
        save(self.model.state_dict(), self.folder.path / "model.safetensors")

    def _last_good(self, what: str) -> str:
        steps = self.folder.checkpoints.steps()
        kept = f"the checkpoint of step {steps[-1]} is in {self.folder.path}" if steps else "no checkpoint was written"
        return f"{what}; {kept}"


@no_grad()
def evaluate(model: Module, batches: Iterable[Any], label_smoothing: float = 0.0) -> Mean:
    """Loss and accuracy of the model, in evaluation mode, over batches of (images, labels). Its mode is put back."""
    mean, training = Mean(), model.training
    model.eval()
    try:
        for images, labels in batches:
            logits = model(images)
            loss = cross_entropy(logits, labels, label_smoothing=label_smoothing)
            mean.add(float(loss.array), int(count_right(logits.array, labels.array)), len(labels))
    finally:
        model.train(training)
    return mean


def _make_ema(model: Module, decay: float) -> Any:
    from .ema import EMA

    return EMA(model, decay)
