"""What the experiments share: the digits as arrays, networks without batch normalisation, a short training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import nn
from ..data import datasets, open_dataset
from ..engine import Tensor
from ..models import ResNet, create_model, get_weights, list_weights
from ..models.weights import CIFAR10_CLASSES
from ..nn import functional as F
from ..optim import SGD
from ..optim.lr_scheduler import LRScheduler, OneCycleLR
from ..random import get_rng_state, manual_seed, set_rng_state
from ..state import no_grad


class Digits(NamedTuple):
    """images (1437, 1, S, S) float32 of mean 0 and deviation 1, their labels; the same of 360 test images."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def digits(image_size: int = 16) -> Digits:
    """The digits that scikit-learn brings along. RuntimeError saying what to install where it is missing."""
    (images, labels), (test_images, test_labels) = (part.arrays for part in datasets.digits(image_size))
    mean, std = images.mean(), images.std()
    return Digits((images - mean) / std, labels, (test_images - mean) / std, test_labels)


def published(weights: str, data: str, images: int) -> tuple[ResNet, np.ndarray, np.ndarray]:
    """(network, images (N, 3, 32, 32), labels) of published CIFAR-10 weights.

    weights: their name, or their file under its own name. data: "cifar10", or a folder or archive of its test images as
    test/CLASS/*.png. images: how many of them, drawn at random. Raises ValueError or OSError in one line.
    """
    names = {known.filename: known for known in map(get_weights, list_weights())}
    known = names.get(Path(weights).name) or get_weights(weights)
    if known.dataset != "CIFAR-10":
        raise ValueError(
            f"weights={weights!r} were trained on {known.dataset}; take some of {list_weights('*cifar10*')}"
        )
    test = open_dataset("cifar10", None, False) if data == "cifar10" else open_dataset("folder", data, False)
    if tuple(test.classes) != CIFAR10_CLASSES:
        raise ValueError(f"data={data!r} has other classes than CIFAR-10: {', '.join(test.classes[:10])}")
    some = np.random.default_rng(0).permutation(len(test))[:images]
    scaled = (test.images[some] / np.float32(255) - np.array(known.mean, np.float32)) / np.array(known.std, np.float32)
    model = create_model(known.model, weights=weights, **known.options)
    return model, scaled.transpose(0, 3, 1, 2), test.labels[some]


def network(name: str, seed: int, norm: bool = True) -> ResNet:
    """A network for the digits with newly drawn weights; twins (resnet20, plain20) have the same from the same seed.

    norm: False takes out batch normalisation. Leaves the default generator as it was.
    """
    before = get_rng_state()
    manual_seed(seed)
    model = create_model(name, num_classes=10, in_channels=1)
    set_rng_state(before)
    if not norm:
        without_norm(model)
    return model


class NoNorm(nn.Module):
    """Takes the place of a BatchNorm2d and normalises nothing: relu(x + add)."""

    def forward(self, x: Tensor, add: Tensor | None = None, relu: bool = False) -> Tensor:
        """x; with `add` x + add; with `relu` max(. , 0) of it."""
        x = x if add is None else x + add
        return F.relu(x) if relu else x


def without_norm(model: nn.Module) -> None:
    """Take every BatchNorm2d out of a model."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, NoNorm())


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Within it, the model is in evaluation mode and remembers nothing for backward."""
    training = model.training
    model.eval()
    try:
        with no_grad():
            yield
    finally:
        model.train(training)


@contextlib.contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Within it, BN may move its running statistics; afterwards they are as before."""
    kept = {name: np.array(tensor.array) for name, tensor in model.named_buffers()}
    try:
        yield
    finally:
        for name, tensor in model.named_buffers():
            tensor.copy_(kept[name])


def error_rate(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images, in percent, that the model gets wrong in evaluation mode."""
    with evaluation(model):
        logits = np.concatenate([model(Tensor(images[i : i + 256])).array for i in range(0, len(images), 256)])
    return 100 * float((logits.argmax(1) != labels).mean())


def fit(
    model: nn.Module,
    data: Digits,
    steps: int,
    lr: float = 0.1,
    batch_size: int = 64,
    seed: int = 0,
    one_cycle: bool = True,
    watch: Callable[[int], Any] = lambda step: None,
) -> float:
    """Train by SGD (Nesterov momentum 0.9, weight decay 5e-4); returns the last loss, NaN where it diverged.

    one_cycle: the learning rate climbs to `lr` and falls to almost 0; else it is constant. watch(step) is called before
    the first step (0) and after every step; not any more once the loss is not finite.
    """
    optimizer = SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule: LRScheduler | None = OneCycleLR(optimizer, lr, total_steps=steps) if one_cycle and steps else None
    rng, order, last = np.random.default_rng(seed), np.empty(0, int), math.nan
    watch(0)
    for step in range(1, steps + 1):
        if len(order) < batch_size:
            order = rng.permutation(len(data.labels))
        batch, order = order[:batch_size], order[batch_size:]
        loss = F.cross_entropy(model(Tensor(data.images[batch])), Tensor(data.labels[batch]))
        last = float(loss.array)
        if not math.isfinite(last):
            return math.nan
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        watch(step)
    return last


def steps_of(epochs: int, data: Digits, batch_size: int = 64) -> int:
    """How many steps so many passes over the training images take."""
    return epochs * (len(data.labels) // batch_size)
