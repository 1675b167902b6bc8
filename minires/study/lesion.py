"""What is lost when one block of a trained network is taken out at test time?

A plain network is a chain: take out one link, and all that follow get what they never saw. A residual network of n
blocks is 2^n paths, one for every choice of branches to pass; taking out a branch leaves half of them, among them most
of the short ones. If the paths do not depend much on each other, little is lost, and the error rises slowly as more
are taken out. Likewise when blocks change places.

Three networks learn the digits; then, without any more training, we measure the error on the test images

    with each block taken out (of a residual block that is its branch: y = relu(shortcut(x)); a plain block is passed
    by, where its input has the shape of its output), with k random blocks taken out, and after k random swaps of two
    blocks of the same shape.

What to look at: how far the bars of the plain network rise above those of its residual twin, and which blocks of the
residual networks cost most.

Source: Veit, Wilber & Belongie 2016 (arXiv:1605.06431), section 4, figures 3 and 5, with a 15-layer VGG and ResNet-110
on CIFAR-10.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..capture import ablate
from ..engine import Tensor
from ..models import ResNet
from ..nn import functional as F
from .networks import digits, error_rate, fit, network, published, steps_of
from .result import LINES, Finding, Result, Table, listed

CHANCE = 90.0  # percent wrong, of ten classes


@contextlib.contextmanager
def without(model: ResNet, names: Iterable[str]) -> Iterator[None]:
    """Within it, the named blocks are taken out: only their shortcuts are left."""
    blocks = model.blocks()
    with contextlib.ExitStack() as stack:
        for name in names:
            if blocks[name].downsample is None:
                stack.enter_context(ablate(model, name, to="identity"))
            else:
                stack.enter_context(blocks[name].register_forward_hook(_shortcut_alone))
        yield


def _shortcut_alone(block: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """relu(s(x)), what a residual block without its branch puts out; with pre-activation s(a), a = relu(bn1(x))."""
    (x,) = args
    if block.preact:
        return block.shortcut(x if block.bn1 is None else block.bn1(x, relu=True))
    return F.relu(block.shortcut(x))


def removable(model: ResNet) -> list[str]:
    """The blocks that can be taken out: all with a skip connection, of plain ones those that keep the shape."""
    return [
        name
        for name, block in model.blocks().items()
        if block.skip or (block.conv1.stride == (1, 1) and block.conv1.in_channels == block.conv1.out_channels)
    ]


@contextlib.contextmanager
def swapped(model: ResNet, pairs: Iterable[tuple[str, str]]) -> Iterator[None]:
    """Within it, the blocks of each pair ("layer1.1", "layer1.2") have changed places, one pair after the other."""
    done = []
    try:
        for one, other in pairs:
            _swap(model, one, other)
            done.append((one, other))
        yield
    finally:
        for one, other in reversed(done):
            _swap(model, one, other)


def _swap(model: ResNet, one: str, other: str) -> None:
    (layer, i), (same, j) = one.split("."), other.split(".")
    blocks: Any = model.get_submodule(layer)
    if layer != same:
        raise ValueError(f"{one} and {other} are blocks of different layers")
    blocks[int(i)], blocks[int(j)] = blocks[int(j)], blocks[int(i)]


@dataclass
class Patient:
    """A network and its errors, in percent of the test images.

    name: of the model. whole: as it was trained. blocks: those that can be taken out. single: without each of them.
    deleted: without k of them, for k in counts, (draws, k). reordered: after k swaps, (draws, k).
    """

    name: str
    whole: float
    blocks: list[str]
    single: np.ndarray
    counts: np.ndarray
    deleted: np.ndarray
    swaps: np.ndarray
    reordered: np.ndarray

    residual = property(lambda self: not self.name.startswith("plain"))


@dataclass(repr=False)
class Lesion(Result):
    """patients: the networks. trained: how. test_images, data: how many of what. seed: of the weights and choices."""

    name: ClassVar[str] = "lesion"
    size: ClassVar[tuple[float, float]] = (10.0, 7.6)
    patients: list[Patient]
    trained: str
    test_images: int
    data: str
    seed: int

    def tables(self) -> list[Table]:
        rows = []
        for p in self.patients:
            worst = int(p.single.argmax())
            cells = [f"{x:.1f}" for x in (p.whole, np.median(p.single), p.single.max())]
            rows.append((p.name, *cells, p.blocks[worst], str(len(p.blocks))))
        head = ("network", "whole", "one out: median", "worst", "which", "blocks")
        title = f"Error on {self.test_images} test images of {self.data} (%), {self.trained}; chance is {CHANCE:g} %"
        many = []
        for p in self.patients:
            for what, counts, errors in (("taken out", p.counts, p.deleted), ("swaps", p.swaps, p.reordered)):
                each = [f"{k}: {e:.0f}" for k, e in zip(counts, errors.mean(0), strict=True)]
                many.append((p.name, what, "  ".join(each[:: max(1, len(each) // 6)])))
        return [
            Table(title, head, rows, (1, 2, 3, 5)),
            Table(
                "Error (%) with k random blocks taken out, and after k random swaps; k: mean", ("network", "", ""), many
            ),
        ]

    def findings(self) -> list[Finding]:
        return [
            f
            for make in (_single_plain, _single_residual, _shrinking, _several, _order)
            if (f := make(self)) is not None
        ]

    def draw(self, figure: Any) -> None:
        top, bottom = figure.subfigures(2, 1)
        rows = top.subplots(len(self.patients), 1, sharey=True)
        for axes, p in zip(np.atleast_1d(rows), self.patients, strict=True):
            shrinks = [block.endswith(".0") and block != "layer1.0" for block in p.blocks]
            axes.bar(range(len(p.blocks)), p.single, color=["0.75" if s else "0.3" for s in shrinks], edgecolor="0.0")
            axes.axhline(p.whole, color="0.0", linestyle="--", linewidth=0.8)
            every = max(1, len(p.blocks) // 14)
            names = [block.removeprefix("layer") for block in p.blocks[::every]]
            axes.set_xticks(range(0, len(p.blocks), every), names, fontsize=8)
            axes.set(ylim=(0, 100))
            axes.set_title(f"{p.name}: one block out", fontsize=10)
            axes.grid(True, axis="y", color="0.9")
            axes.set_axisbelow(True)
        top.supylabel("error (%)", fontsize=10)
        top.supxlabel("block taken out (layer.number; light: shrinks the image; dashed: whole network)", fontsize=9)
        out, order = bottom.subplots(1, 2, sharey=True)
        for line, p in zip(LINES, self.patients, strict=False):
            out.plot(p.counts, p.deleted.mean(0), label=p.name, markersize=4, **line)
            order.plot(p.swaps, p.reordered.mean(0), label=p.name, markersize=4, **line)
        out.set(xlabel="random blocks taken out", ylabel="error (%), mean of draws", ylim=(0, 100))
        order.set(xlabel="random swaps of two blocks of one layer")
        for axes in (out, order):
            axes.axhline(CHANCE, color="0.5", linestyle=":", linewidth=1)
            axes.grid(True, color="0.9")
        out.legend()


def lesion(
    models: tuple[str, ...] = ("plain20", "resnet20", "resnet56"),
    epochs: int = 10,
    draws: int = 5,
    lr: float = 0.1,
    weights: tuple[str, ...] = (),
    data: str = "cifar10",
    images: int = 1000,
    seed: int = 0,
    on_note: Callable[[str], Any] | None = None,
) -> Lesion:
    """Take out, or reorder, blocks of trained networks at test time: plain ones break, residual ones hardly notice.

    Parameters
    ----------
    models
        Names of the networks that are trained on the digits.
    epochs
        Passes over the training images.
    draws
        Random orders in which blocks are taken out, and swapped.
    lr
        Highest learning rate.
    weights
        Published CIFAR-10 weights, by name or file, to be examined instead: nothing is trained then.
    data
        With --weights: 'cifar10', or a folder or archive of its images as test/CLASS/*.png.
    images
        With --weights: how many of the test images.
    seed
        Seed of the weights, of the batches and of the choices.
    """
    if not models or epochs < 0 or min(draws, images) < 1:
        raise ValueError(
            f"models={models} must name networks, epochs={epochs} be at least 0, draws={draws} and images={images} at "
            "least 1"
        )
    note, patients = on_note or (lambda text: None), []
    if weights:
        for file, (model, x, labels) in {file: published(file, data, images) for file in weights}.items():
            note(file)
            patients.append(examine(model, x, labels, Path(file).name, draws, seed))
        return Lesion(patients, "published weights", min(images, len(labels)), "CIFAR-10", seed)
    networks, digit = {name: network(name, seed) for name in models}, digits()
    for name, model in networks.items():
        note(f"{name}, {epochs} epochs")
        fit(model, digit, steps_of(epochs, digit), lr, seed=seed)
        patients.append(examine(model, digit.test_images, digit.test_labels, name, draws, seed))
    return Lesion(patients, f"after {epochs} epochs", len(digit.test_labels), "digits", seed)


def examine(
    model: ResNet, images: np.ndarray, labels: np.ndarray, name: str = "", draws: int = 5, seed: int = 0
) -> Patient:
    """Measure a trained network on test images; it is left as it was."""
    rng, blocks = np.random.default_rng(seed), removable(model)

    def wrong(change: contextlib.AbstractContextManager[Any]) -> float:
        with change:
            return error_rate(model, images, labels)

    whole = wrong(contextlib.nullcontext())
    single = np.array([wrong(without(model, [block])) for block in blocks])
    counts = _spread(len(blocks))
    pairs = [(a, b) for a in blocks for b in blocks if a < b and _alike(model, a, b)]
    swaps = _spread(min(len(blocks), len(pairs)))
    deleted, reordered = [], []
    for _ in range(draws):  # of each order the k first, so that every k adds to the one before
        gone, pairs = rng.permutation(blocks), [pairs[i] for i in rng.permutation(len(pairs))]
        deleted.append([wrong(without(model, gone[:k])) for k in counts])
        reordered.append([wrong(swapped(model, pairs[:k])) for k in swaps])
    return Patient(name, whole, blocks, single, counts, np.array(deleted), swaps, np.array(reordered))


def _spread(n: int, points: int = 8) -> np.ndarray:
    """At most so many whole numbers from 1 to n, evenly spread."""
    return np.unique(np.linspace(1, n, min(n, points)).round().astype(int))


def _alike(model: ResNet, a: str, b: str) -> bool:
    """Whether two blocks can change places: of one layer, none of them the one that changes the shape."""
    layer = a.partition(".")[0]
    first = f"{layer}.0" if layer != model.layer_names[0] else ""
    return b.partition(".")[0] == layer and first not in (a, b)


# --- what the literature says, beside the measurement ---------------------------------------------------------------


def _single_plain(found: Lesion) -> Finding | None:
    plain = [p for p in found.patients if not p.residual]
    if not plain:
        return None
    return Finding(
        "Veit et al. 2016, figure 3: VGG",
        "Taking out any one layer of a plain network reduces it to chance (90 % wrong).",
        _each(plain, _wrong),
        all(np.median(p.single) > 60 for p in plain),
        f"Measured on {found.data}, and a block is two layers: {_each(plain, _hurt)}.",
    )


def _wrong(p: Patient) -> str:
    return f"{np.median(p.single):.0f} % wrong on the median, {p.single.min():.0f} to {p.single.max():.0f} %"


def _points(p: Patient) -> str:
    return f"{np.median(p.single) - p.whole:+.1f} points on the median, {p.single.max() - p.whole:+.1f} at worst"


def _hurt(p: Patient) -> str:
    return f"{int((p.single > 50).sum())} of {len(p.blocks)} blocks cost more than half of the images"


def _single_residual(found: Lesion) -> Finding | None:
    residual = [p for p in found.patients if p.residual]
    if not residual:
        return None
    deepest = max(residual, key=lambda p: len(p.blocks))
    return Finding(
        "Veit et al. 2016, figure 3: ResNet-110",
        "Taking out any one block of a residual network has little effect on its error.",
        _each(residual, _points),
        bool(np.median(deepest.single) - deepest.whole < 3),
        f"The fewer blocks, the more of the paths one of them carries: {_each(residual, _over)}."
        if any((p.single - p.whole > 3).any() for p in residual)
        else "",
    )


def _over(p: Patient) -> str:
    return f"{int((p.single - p.whole > 3).sum())} of {len(p.blocks)} blocks cost more than 3 points"


def _shrinking(found: Lesion) -> Finding | None:
    residual = [p for p in found.patients if p.residual]
    if not residual:
        return None
    deepest = max(residual, key=lambda p: len(p.blocks))
    cost, shrinks = deepest.single - deepest.whole, [block in ("layer2.0", "layer3.0") for block in deepest.blocks]
    worst = [f"{deepest.blocks[i]} ({cost[i]:+.1f})" for i in (-cost).argsort()[:3]]
    inside, outside = cost[shrinks], cost[np.logical_not(shrinks)]
    return Finding(
        f"Veit et al. 2016, figure 3: which block ({deepest.name})",
        "Taking out a block that shrinks the image costs a little more than taking out another.",
        f"{inside.mean():+.1f} points for those two on average, {np.median(outside):+.1f} the others' median; "
        f"the three that cost most: {listed(worst)}",
        bool(inside.mean() > np.median(outside)),
        "What costs most here is the beginning: a first branch has nothing but the stem to stand in for it."
        if (-cost).argsort()[0] == 0
        else "",
    )


def _several(found: Lesion) -> Finding | None:
    residual = [p for p in found.patients if p.residual]
    if not residual:
        return None
    deepest = max(residual, key=lambda p: len(p.blocks))
    mean = deepest.deleted.mean(0)
    rises = np.diff([deepest.whole, *mean]) / np.diff([0, *deepest.counts])
    return Finding(
        f"Veit et al. 2016, figure 5a: several blocks ({deepest.name})",
        "The error rises smoothly with the number of blocks taken out, as in an ensemble.",
        f"{listed([f'{e:.0f} % at {k}' for k, e in zip(deepest.counts, mean, strict=True)])}",
        bool(rises.min() > -3 and rises.max() < 20),
        f"At the steepest it rises by {rises.max():.0f} points per block.",
    )


def _order(found: Lesion) -> Finding | None:
    measured = [p for p in found.patients if len(p.swaps)]
    residual = [p for p in measured if p.residual]
    if not residual:
        return None
    deepest = max(residual, key=lambda p: len(p.blocks))
    plain = [p for p in measured if not p.residual]
    return Finding(
        f"Veit et al. 2016, figure 5b: reordering ({deepest.name})",
        "Blocks of a residual network can change places, too: the error rises smoothly with the disorder.",
        f"after one swap {_each([*plain, *residual], lambda p: f'{p.reordered[:, 0].mean():.0f} %')}, "
        f"after {deepest.swaps[-1]} in {deepest.name} {deepest.reordered[:, -1].mean():.0f} %",
        bool(deepest.reordered[:, 0].mean() < 3 * deepest.whole + 10),
    )


def _each(patients: Sequence[Patient], text: Callable[[Patient], str]) -> str:
    return listed([f"{text(p)} ({p.name})" for p in patients])
