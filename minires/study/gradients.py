"""Do gradients vanish in deep plain networks? What skip connections and batch normalisation (BN) do to them.

The textbook says that gradients vanish in deep networks and that skip connections cure it. Here a plain network and
its residual twin, which has the same weights, see the same images; we measure the norm of the loss's gradient with
respect to the output of every block, with and without BN, at initialisation, after one step and after some.

What to look at:

- Plain networks with BN do not vanish, they *explode* towards the input, by a constant factor per layer. One line of
  algebra says which: in a wide layer, BN divides by the deviation of relu(z), whose variance is (π - 1) / 2π, and ReLU
  lets half of the gradient pass; so its squared norm grows by (1/2) / ((π - 1) / 2π) = π / (π - 1) per layer going
  back, the norm by 1.21. A hundred layers make 10^8 of it.
- With skip connections it grows slowly: the branch's BN divides by a deviation that rises with depth.
- Without BN, He's initialisation keeps the gradient of plain networks nearly level; what is lost is lost at the
  image's border, where the zeros of the padding take part. It is now the residual ones whose activations explode: each
  block doubles the variance.
- One step of training changes the picture more than the next twenty. It is after the explosion that a deep plain
  network's gradient vanishes: the first step, huge near the input, spoils the weights there.

Sources: He et al. 2015 (arXiv:1512.03385), section 4.1; Yang et al. 2019 (arXiv:1902.08129); De & Smith 2020
(arXiv:2002.10444); He et al. 2015 (arXiv:1502.01852), for the initialisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .. import nn
from ..capture import capture
from ..engine import Tensor
from ..models import ResNet
from ..nn import functional as F
from .networks import digits, fit, network, running_statistics_kept
from .result import LINES, Finding, Result, Table, listed, number

RELU_RATE = math.sqrt(
    math.pi / (math.pi - 1)
)  # growth of the gradient's norm per layer of a wide plain network with BN


@dataclass
class Profile:
    """One network at one moment, from the input to the output.

    network, norm, step: which. loss: of the probe batch. stages: of each block, the number of its layer (1 to 3).
    sizes: height of each block's output, in pixels. gradient: norm of the loss's gradient with respect to it.
    activation: its root mean square. relative: norm of the gradient of each block's first convolution, over the norm of
    its weight.
    """

    network: str
    norm: bool
    step: int
    loss: float
    stages: np.ndarray
    sizes: np.ndarray
    gradient: np.ndarray
    activation: np.ndarray
    relative: np.ndarray

    depth = property(lambda self: int("".join(filter(str.isdigit, self.network))))
    residual = property(lambda self: not self.network.startswith("plain"))
    finite = property(lambda self: bool(np.isfinite(self.gradient).all()))

    @property
    def ratio(self) -> float:
        """|g| / |w| of the first block over that of the last."""
        return float(self.relative[0] / self.relative[-1])

    @property
    def range(self) -> float:
        """The largest |g| / |w| over the smallest."""
        return float(self.relative.max() / self.relative.min())

    @property
    def per_layer(self) -> float:
        """The factor by which the gradient's norm grows per convolution going back, within layers of one shape."""
        return float(np.sqrt(1 / self.growth(self.gradient)[0]))

    def growth(self, values: np.ndarray) -> tuple[float, float]:
        """The mean factor from one block to the next, going forward: within layers of one shape, and between them."""
        same = self.stages[1:] == self.stages[:-1]
        with np.errstate(all="ignore"):
            logs = np.diff(np.log(values))
            within, between = logs[same], logs[~same]
            return float(np.exp(within.mean())), float(np.exp(between.mean())) if len(between) else math.nan


def profile(model: ResNet, images: np.ndarray, labels: np.ndarray, name: str = "", step: int = 0) -> Profile:
    """Measure a network in training mode on a batch. Leaves no gradients, and BN's running statistics as they were."""
    names = list(model.blocks())
    model.zero_grad()
    with running_statistics_kept(model), capture(model, *names, grads=True) as seen:
        loss = F.cross_entropy(model(Tensor(images)), Tensor(labels))
        loss.backward()
    convolutions: list[nn.Conv2d] = [model.get_submodule(f"{name}.conv1") for name in names]  # pyright: ignore
    result = Profile(
        name,
        any(isinstance(module, nn.BatchNorm2d) for module in model.modules()),
        step,
        float(loss.array),
        np.array([model.layer_names.index(name.partition(".")[0]) + 1 for name in names]),
        np.array([seen[name].output.shape[2] for name in names]),
        np.array([_norm(seen[name].grad) for name in names]),
        np.array([float(np.sqrt(np.mean(seen[name].output.array.astype(np.float64) ** 2))) for name in names]),
        np.array([_norm(conv.weight.grad) / _norm(conv.weight) for conv in convolutions]),
    )
    model.zero_grad()
    return result


def _norm(tensor: Tensor | None) -> float:
    return math.nan if tensor is None else float(np.linalg.norm(tensor.array.astype(np.float64)))


@dataclass(repr=False)
class Gradients(Result):
    """profiles: of every network at every moment, in the order in which they were measured."""

    name: ClassVar[str] = "gradients"
    size: ClassVar[tuple[float, float]] = (10.0, 7.6)
    profiles: list[Profile]
    images: int
    lr: float
    seed: int

    def at(self, step: int, residual: bool, norm: bool) -> list[Profile]:
        """The profiles of one moment and kind, the shallow networks first."""
        found = [p for p in self.profiles if (p.step, p.residual, p.norm) == (step, residual, norm)]
        return sorted(found, key=lambda p: p.depth)

    @property
    def steps(self) -> list[int]:
        """The moments, ascending."""
        return sorted({p.step for p in self.profiles})

    def tables(self) -> list[Table]:
        rows = []
        for p in self.profiles:
            loss, ratio, activation = map(number, (p.loss, p.ratio, p.activation[-1] / p.activation[0]))
            per_layer = f"{p.per_layer:.3f}" if p.finite else "-"
            rows.append((p.network, "BN" if p.norm else "no BN", str(p.step), loss, ratio, per_layer, activation))
        title = (
            f"{self.images} images of digits; SGD, lr {self.lr:g}, seed {self.seed}. first/last: |g|/|w| of the first "
            "block's convolution over the last's. per layer: growth of the gradient, going back, per convolution."
        )
        head = ("network", "", "step", "loss", "first/last", "per layer", "activation last/first")
        return [Table(title, head, rows, (2, 3, 4, 5, 6))]

    def findings(self) -> list[Finding]:
        makers = (_myth, _healthy, _rate, _residual, _first_step, _level, _activations)
        return [finding for make in makers if (finding := make(self)) is not None]

    def draw(self, figure: Any) -> None:
        last = self.steps[-1]
        grid = figure.subplots(2, 2, sharey="row")
        for row, norm in zip(grid, (True, False), strict=True):
            for axes, residual in zip(row, (False, True), strict=True):
                for line, p in zip(LINES, self.at(0, residual, norm), strict=False):
                    _curve(axes, p, line, f"{p.depth} layers, at initialisation")
                for line, p in zip(LINES, self.at(last, residual, norm) if last else [], strict=False):
                    _curve(axes, p, {**line, "marker": "", "linewidth": 0.8}, f"{p.depth} layers, after {last} steps")
                kind = "with skip connections" if residual else "plain"
                axes.set(title=f"{kind}, {'BN' if norm else 'no BN'}", yscale="log", xlim=(0, 1))
                axes.grid(True, color="0.9")
        for axes in grid[1]:
            axes.set_xlabel("depth (share of the blocks; input left, output right)")
        for row in grid:
            row[0].set_ylabel("gradient norm, over the last block's")
        handles, labels = max((axes.get_legend_handles_labels() for axes in grid.flat), key=lambda pair: len(pair[0]))
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels) // 2 or 1))


def _curve(axes: Any, p: Profile, line: dict[str, Any], label: str) -> None:
    if p.finite:
        where = np.linspace(0, 1, len(p.gradient))
        axes.plot(
            where, p.gradient / p.gradient[-1], **line, markersize=4, markevery=max(1, len(where) // 9), label=label
        )


def gradients(
    depths: tuple[int, ...] = (20, 56, 110),
    steps: int = 20,
    images: int = 64,
    lr: float = 0.01,
    seed: int = 0,
    on_note: Callable[[str], Any] | None = None,
) -> Gradients:
    """Gradient norm by depth: plain and residual twins, with and without batch normalisation, before and in training.

    Parameters
    ----------
    depths
        Numbers of layers of the networks: 20, 32, 44, 56, 110.
    steps
        Steps of training, in batches of 64.
    images
        Images of the batch on which gradients are measured.
    lr
        Learning rate of these steps.
    seed
        Seed of the weights and of the batches.
    """
    if not depths or steps < 0 or images < 2:
        raise ValueError(f"depths={depths} must name networks, steps={steps} be at least 0, images={images} at least 2")
    names = [f"{kind}{depth}" for depth in sorted(set(depths)) for kind in ("plain", "resnet")]
    for name in names:
        network(name, seed)  # raises where there is no such network
    data, note = digits(), on_note or (lambda text: None)
    probe = np.random.default_rng(seed).permutation(len(data.labels))[:images]
    moments = {0, 1, steps} if steps else {0}
    found: list[Profile] = []
    for norm in (True, False):
        for name in names:
            note(f"{name}, {'with' if norm else 'without'} BN")
            model = network(name, seed, norm)

            def watch(step: int, model: ResNet = model, name: str = name) -> None:
                if step in moments:
                    found.append(profile(model, data.images[probe], data.labels[probe], name, step))

            with np.errstate(all="ignore"):  # without BN a network may diverge: that is a result
                fit(model, data, steps, lr, seed=seed, one_cycle=False, watch=watch)
    return Gradients(found, images, lr, seed)


# --- what the literature says, beside the measurement ---------------------------------------------------------------


def _each(profiles: Sequence[Profile], text: Callable[[Profile], str]) -> str:
    return listed([f"{text(p)} ({p.network})" for p in profiles])


def _myth(found: Gradients) -> Finding:
    plain = found.at(0, residual=False, norm=True)
    later = [p for step in found.steps[1:] for p in found.at(step, residual=False, norm=True)]
    gone, lost = ([p for p in group if p.finite and p.ratio < 0.1] for group in (plain, later))
    return Finding(
        "what textbooks say of plain networks",
        "The gradient vanishes on its way to the input, so deep ones do not train; skip connections bring it back.",
        f"first/last at initialisation, with BN: {_each(plain, lambda p: number(p.ratio))}",
        bool(gone),
        f"It does vanish later: {_each(lost, lambda p: f'{number(p.ratio)} after step {p.step}')}. But the explosion "
        f"comes first, and the first steps that it makes so large spoil the weights near the input."
        if lost and not gone
        else "A myth for these networks: nothing vanishes, before these steps or after them."
        if not gone
        else f"It falls below a tenth in {_each(gone, lambda p: number(p.ratio))}.",
    )


def _healthy(found: Gradients) -> Finding:
    plain = found.at(0, residual=False, norm=True)
    worst = max(p.ratio for p in plain)
    return Finding(
        "He et al. 2015 (arXiv:1512.03385), section 4.1",
        "Plain networks with BN: neither forward nor backward signals vanish; gradients have healthy norms.",
        f"first/last {_each(plain, lambda p: number(p.ratio))}",
        all(0.1 < p.ratio < 100 for p in plain),
        f"At initialisation they do not vanish. But with {number(worst)} times more at one end than at the other they "
        "are not healthy: no learning rate suits both ends. (The paper does not say when it measured, nor what.)"
        if worst > 100
        else "",
    )


def _rate(found: Gradients) -> Finding:
    plain = found.at(0, residual=False, norm=True)
    off = max(abs(math.log(p.per_layer) / math.log(RELU_RATE) - 1) for p in plain)
    return Finding(
        "Yang et al. 2019 (arXiv:1902.08129)",
        f"Plain networks with BN and ReLU explode: by sqrt(π / (π - 1)) = {RELU_RATE:.3f} per layer (wide, fully "
        "connected, at initialisation).",
        f"per layer {_each(plain, lambda p: f'{p.per_layer:.3f}')}",
        off < 0.3,
        f"The exponent is off by up to {off:.0%}: the theory is for width without end and unlike inputs; here there "
        "are 16 to 64 channels, and neighbouring pixels are alike."
        if off > 0.02
        else "",
    )


def _residual(found: Gradients) -> Finding | None:
    twins, plain = (found.at(0, residual, norm=True) for residual in (True, False))
    if len(twins) < 2:
        return None
    power = np.polyfit([math.log(p.depth) for p in twins], [math.log(p.ratio) for p in twins], 1)[0]
    return Finding(
        "De & Smith 2020 (arXiv:2002.10444)",
        "BN makes the residual branch smaller by about the square root of the depth, so that blocks are close to the "
        "identity: gradients grow as a power of the depth, not exponentially.",
        f"first/last {_each(twins, lambda p: number(p.ratio))}: about depth^{power:.1f}",
        twins[-1].ratio < math.sqrt(plain[-1].ratio),
        f"The plain twin of {twins[-1].network} is at {number(plain[-1].ratio)}.",
    )


def _first_step(found: Gradients) -> Finding | None:
    before = [p for p in found.at(0, residual=False, norm=True) if p.range > 100]
    after = [p for p in found.at(1, residual=False, norm=True) if p.network in {b.network for b in before}]
    if not before or len(after) != len(before) or not all(p.finite for p in after):
        return None
    return Finding(
        "Yang et al. 2019, on training",
        "After a single step the gradients of plain networks with BN differ much less between layers.",
        f"largest over smallest |g|/|w| after one step at lr {found.lr:g}: {_each(after, lambda p: number(p.range))}",
        all(a.range < b.range / 2 for a, b in zip(after, before, strict=True)),
        f"At initialisation: {_each(before, lambda p: number(p.range))}.",
    )


def _level(found: Gradients) -> Finding:
    """He's initialisation counts 9 taps for every pixel; zero padding leaves border pixels fewer.

    In one dimension the squared gradient goes from a row of S pixels to the next by a matrix with 1/3 on three
    diagonals, whose largest eigenvalue is (1 + 2 cos(π / (S + 1))) / 3: the share that stays, per dimension.
    """
    plain = found.at(0, residual=False, norm=False)
    same = plain[-1].stages[1:] == plain[-1].stages[:-1]
    stays = (1 + 2 * np.cos(np.pi / (plain[-1].sizes[1:][same] + 1))) / 3  # squared and two-dimensional: the same
    border = float(np.exp(np.log(stays).mean()))
    return Finding(
        "He et al. 2015 (arXiv:1502.01852), equation 14: without BN",
        "Weights of variance 2 / fan_out keep the gradient level: a factor of 1 per layer.",
        f"per layer {_each(plain, lambda p: f'{p.per_layer:.3f}')}",
        all(abs(p.per_layer - 1) < 0.02 for p in plain),
        f"The padding's zeros: at the border a pixel has fewer than 9 neighbours to hear from. That alone makes "
        f"{border:.3f} for images of {listed([str(s) for s in dict.fromkeys(plain[-1].sizes.tolist())])} pixels.",
    )


def _activations(found: Gradients) -> Finding:
    twins = found.at(0, residual=True, norm=False)
    grown = [p.growth(p.activation) for p in twins]
    return Finding(
        "the same in residual blocks without BN",
        f"x + F(x) has twice the variance of x: activations grow by sqrt(2) = {math.sqrt(2):.3f} per block.",
        f"per block {listed([f'{g:.3f} ({p.network})' for (g, _), p in zip(grown, twins, strict=True)])}; "
        f"loss at initialisation {_each(twins, lambda p: number(p.loss))}",
        abs(grown[-1][0] / math.sqrt(2) - 1) < 0.1,
        "That is within layers of one shape; where the image shrinks, option A's shortcut leaves half of the new "
        f"channels zero, and the factor is {listed([f'{between:.2f}' for _, between in grown])}.",
    )
