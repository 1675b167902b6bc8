"""What a run reports: after every step, after every epoch, at its end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Step:
    """After one step. loss: cross-entropy of its batch, nats. accuracy: share right in this epoch so far
    (of mixed images: the label with the larger share).

    step counts from 1 to steps; images_per_second is over this epoch, its first step left out where others follow.
    """

    epoch: int
    step: int
    steps: int
    loss: float
    accuracy: float
    images_per_second: float


@dataclass(frozen=True)
class Epoch:
    """After one epoch; a line of metrics.jsonl. lr: of its last step. Losses in nats per image, accuracies as shares.

    Training loss and accuracy are of the images as augmented, before the step that each was used in; images_per_second
    is of training alone; seconds since the start of the run.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_accuracy: float
    test_loss: float | None
    test_accuracy: float | None
    images_per_second: float
    seconds: float


@dataclass(frozen=True)
class Summary:
    """At the end; summary.json. seconds: the whole run, with compilation and evaluation.

    images_per_second: training images per second of training steps, without the first step, which compiles kernels
    (first_step_seconds). best: on the held-out images, after the epoch where it was highest. recipe: its fields.
    """

    test_accuracy: float
    test_loss: float
    test_images: int
    train_images: int
    epochs: int
    steps: int
    seconds: float
    first_step_seconds: float
    images_per_second: float
    best_accuracy: float
    best_step: int
    model: str
    parameters: int
    classes: list[str]
    mean: list[float]
    std: list[float]
    seed: int
    device: str
    threads: int
    versions: dict[str, str]
    recipe: dict[str, Any]
    folder: str


class Mean:
    """Loss and accuracy over the batches that are added."""

    def __init__(self) -> None:
        self.images, self.right, self._loss = 0, 0, 0.0

    def add(self, loss: float, right: int, images: int) -> None:
        """A batch: its mean loss, how many of its images are right (`count_right`), how many there are."""
        self.images += images
        self.right += right
        self._loss += loss * images

    def state(self) -> list[Any]:
        """What `load_state` takes up again, exactly; JSON can hold it."""
        return [self.images, self.right, self._loss]

    def load_state(self, state: list[Any]) -> None:
        """Go on from a `state()`."""
        self.images, self.right, self._loss = state

    @property
    def loss(self) -> float:
        """Mean loss per image."""
        return self._loss / self.images if self.images else np.nan

    @property
    def accuracy(self) -> float:
        """Share of the images whose largest output is the label's."""
        return self.right / self.images if self.images else np.nan


def count_right(logits: Any, labels: Any) -> Any:
    """How many of the outputs (N, K) have their largest number at the label: an array of one number, where they lie.

    labels: (N,), or shares of classes (N, K), of which the largest counts.
    """
    return (logits.argmax(1) == (labels.argmax(1) if labels.ndim == 2 else labels)).sum()


class Stopwatch:
    """Images per second of training, without the first step of all, which compiles kernels. `first`: its seconds."""

    def __init__(self) -> None:
        self.first = np.nan
        self._run, self._epoch, self._last = [0.0, 0], [0.0, 0], 0.0

    def begin_epoch(self, anew: bool = True) -> None:
        """Now an epoch begins, or goes on (anew=False)."""
        self._epoch, self._last = [0.0, 0] if anew else self._epoch, time.perf_counter()

    def state(self) -> list[list[float]]:
        """What `load_state` takes up again."""
        return [list(self._run), list(self._epoch)]

    def load_state(self, state: list[list[float]]) -> None:
        """Go on from a `state()`; the first step of this process compiles again, and is left out again."""
        self._run, self._epoch = map(list, state)

    def lap(self, images: int) -> None:
        """Now a step over so many images is done."""
        seconds, self._last = time.perf_counter() - self._last, time.perf_counter()
        if np.isnan(self.first):
            self.first = seconds
            return
        for total in (self._run, self._epoch):
            total[0] += seconds
            total[1] += images

    @property
    def speed(self) -> float:
        """Images per second of the run so far."""
        return self._run[1] / self._run[0] if self._run[0] else 0.0

    @property
    def epoch_speed(self) -> float:
        """Images per second of this epoch so far."""
        return self._epoch[1] / self._epoch[0] if self._epoch[0] else 0.0
