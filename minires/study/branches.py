"""How much of a gradient comes past the weights? At every skip connection, before, during and after training.

A block y = F(x) + x sends its input two gradients: dy itself, by the identity, and J_F(x)ᵀ dy, through the weights of
the residual branch. They are summed before the walk back goes on. `BranchGradHook` sees them apart:

    g = g_id + g_res                     share of the identity = <g_id, g> / <g, g>,  of the branch likewise

so that the two shares sum to 1. (One can be above 1 and the other below 0, where the branch pulls back.) Two networks:
in the first ResNet a ReLU follows the sum, so that dy loses what the ReLU cuts off; with pre-activation nothing does.

What to look at: how small the branch's part is in the deep blocks of a layer before training (BN divides it by a
deviation that grows from block to block), and what training does to it. The branches' shares summed over the blocks
say how many branches a gradient passes on its way, of all that it could: few.

Sources: He et al. 2016 (arXiv:1603.05027), equation 5; De & Smith 2020 (arXiv:2002.10444), section 3; Veit et al. 2016
(arXiv:1605.06431), section 5.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..engine import Tensor
from ..hooks import BranchGradHook, Join
from ..models import ResNet
from ..nn import functional as F
from .networks import Digits, digits, error_rate, fit, network, running_statistics_kept, steps_of
from .result import LINES, Finding, Result, Table, listed, number


@dataclass
class Shares:
    """The gradients at the joins of one network at one moment, from the input to the output.

    epoch: the moment. blocks: the block that each join's value enters. identity, branch: the norms of the two
    gradients; cosine: of the angle between them. identity_share, branch_share: of the whole, summing to 1.
    activation: root mean square of each block's input.
    """

    epoch: int
    blocks: list[str]
    identity: np.ndarray
    branch: np.ndarray
    cosine: np.ndarray
    identity_share: np.ndarray
    branch_share: np.ndarray
    activation: np.ndarray


def shares(model: ResNet, images: np.ndarray, labels: np.ndarray, epoch: int = 0) -> Shares:
    """Measure a network in training mode on a batch. Leaves no gradients, and BN's running statistics as they were."""
    inputs: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda block, args, output: inputs.update({name: float(np.sqrt((args[0].array ** 2).mean()))})

    model.zero_grad()
    with contextlib.ExitStack() as stack:
        stack.enter_context(running_statistics_kept(model))
        for name, block in model.blocks().items():
            stack.enter_context(block.register_forward_hook(watch(name)))
        loss = F.cross_entropy(model(Tensor(images)), Tensor(labels))
        hook = stack.enter_context(BranchGradHook())
        loss.backward()
    model.zero_grad()
    rows = [row for join in reversed(hook.joins) if (row := _row(join, model)) is not None]
    if not rows:
        raise ValueError("the network has no skip connections: take a resnet, not a plain one")
    blocks, numbers = [block for block, _ in rows], np.array([values for _, values in rows])
    identity, branch, cosine, identity_share, branch_share = numbers.T
    activation = np.array([inputs[block] for block in blocks])
    return Shares(epoch, blocks, identity, branch, cosine, identity_share, branch_share, activation)


def _row(join: Join, model: ResNet) -> tuple[str, tuple[float, ...]] | None:
    """(block, numbers) of a join whose value enters a block by its first layer and by its skip connection."""
    modules = [share.module for share in join.shares]
    for block in model.blocks():
        into = [i for i, module in enumerate(modules) if module in (f"{block}.conv1", f"{block}.bn1")]
        if len(into) == 1 and len(modules) == 2:
            b, s, gram = into[0], 1 - into[0], np.array(join.gram)
            parts = gram.sum(1) / gram.sum()
            return block, (join.shares[s].norm, join.shares[b].norm, join.cosine(), parts[s], parts[b])
    return None


@dataclass(repr=False)
class Branches(Result):
    """shares: by the network's name, of every moment. errors: by name, the error on the test images in percent at the
    end. epochs, images, seed: settings."""

    name: ClassVar[str] = "branches"
    size: ClassVar[tuple[float, float]] = (10.0, 6.6)
    shares: dict[str, list[Shares]]
    errors: dict[str, float]
    epochs: int
    images: int
    seed: int

    def tables(self) -> list[Table]:
        tables = []
        for name, every in self.shares.items():
            moments = [every[i] for i in sorted({0, 1, 2, len(every) // 2, len(every) - 1}) if i < len(every)]
            rows = []
            for i, block in enumerate(moments[0].blocks):
                cells = [f"{100 * m.branch_share[i]:.0f}" for m in moments]
                ends = [number(m.branch[i] / m.identity[i]) for m in (moments[0], moments[-1])]
                angles = [f"{m.cosine[i]:+.2f}" for m in (moments[0], moments[-1])]
                rows.append((block, *cells, "  ", *ends, *angles))
            sums = [f"{m.branch_share.sum():.1f}" for m in moments]
            rows.append((f"sum, of {len(moments[0].blocks)}", *sums, *[""] * 5))
            last = f"{moments[-1].epoch}"
            head = [
                "block",
                *(f"epoch {m.epoch}" for m in moments),
                "",
                "|res|/|id| at 0",
                f"at {last}",
                "cosine at 0",
                f"at {last}",
            ]
            title = (
                f"{name}: share of the gradient (%) that comes through the residual branch; the rest by the skip. "
                f"{self.images} images of digits; after {last} epochs {self.errors[name]:.1f} % of the test images are "
                "wrong."
            )
            tables.append(Table(title, head, rows, range(1, len(head))))
        return tables

    def findings(self) -> list[Finding]:
        return [*(make(name, m) for name, m in self.shares.items() for make in (_identity, _depth, _paths))]

    def draw(self, figure: Any) -> None:
        grid = np.atleast_1d(figure.subplots(len(self.shares), 1, sharex=False))
        for axes, (name, moments) in zip(grid, self.shares.items(), strict=True):
            few = sorted({0, 1, len(moments) // 2, len(moments) - 1} & set(range(len(moments))))
            where = np.arange(len(moments[0].blocks))
            for line, m in zip(LINES, (moments[i] for i in few), strict=False):
                label = "before training" if not m.epoch else f"after epoch {m.epoch}"
                axes.plot(where, 100 * m.branch_share, **line, markersize=4, label=label)
            for at in [i for i, block in enumerate(moments[0].blocks) if block.endswith(".0") and i]:
                axes.axvline(at - 0.5, color="0.8", linewidth=6, zorder=0)
            axes.axhline(0, color="0.0", linewidth=0.6)
            every = 1 + len(where) // 16
            axes.set_xticks(where[::every], [b.removeprefix("layer") for b in moments[0].blocks[::every]])
            axes.set(title=name, ylabel="share of the branch (%)")
            axes.grid(True, axis="y", color="0.9")
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        grid[-1].set_xlabel("block (layer.number; input left, output right; grey: where the image shrinks)")


def branches(
    models: tuple[str, ...] = ("resnet56", "preact_resnet56"),
    epochs: int = 8,
    images: int = 128,
    lr: float = 0.1,
    seed: int = 0,
    on_note: Callable[[str], Any] | None = None,
) -> Branches:
    """Share of the gradient that comes by the identity and by the residual branch at every join, as training goes on.

    Parameters
    ----------
    models
        Names of networks with skip connections.
    epochs
        Passes over the training images.
    images
        Images of the batch on which gradients are measured.
    lr
        Highest learning rate.
    seed
        Seed of the weights and of the batches.
    """
    if not models or epochs < 0 or images < 2:
        raise ValueError(
            f"models={models} must name networks, epochs={epochs} be at least 0, images={images} at least 2"
        )
    networks = {name: network(name, seed) for name in models}
    for name, model in networks.items():
        if not any(block.skip for block in model.blocks().values()):
            raise ValueError(f"{name} has no skip connections: take a resnet")
    data, note = digits(), on_note or (lambda text: None)
    found, errors = {}, {}
    for name, model in networks.items():
        note(f"{name}, {epochs} epochs")
        found[name] = _through_training(model, data, epochs, images, lr, seed)
        errors[name] = error_rate(model, data.test_images, data.test_labels)
    return Branches(found, errors, epochs, images, seed)


def _through_training(model: ResNet, data: Digits, epochs: int, images: int, lr: float, seed: int) -> list[Shares]:
    probe = np.random.default_rng(seed).permutation(len(data.labels))[:images]
    every, found = steps_of(1, data), []

    def watch(step: int) -> None:
        if step % every == 0:
            found.append(shares(model, data.images[probe], data.labels[probe], step // every))

    fit(model, data, epochs * every, lr, seed=seed, watch=watch)
    return found


# --- what the literature says, beside the measurement ---------------------------------------------------------------


def _identity(name: str, moments: list[Shares]) -> Finding:
    least = min(m.identity_share.min() for m in moments)
    where = next(
        (m.epoch, m.blocks[int(m.identity_share.argmin())]) for m in moments if m.identity_share.min() == least
    )
    total = float(np.mean([m.identity_share.mean() for m in moments]))
    return Finding(
        f"He et al. 2016, equation 5 ({name})",
        "The identity hands the gradient of a deep block to every shallower one undiminished; the branch's part is "
        "added, and is unlikely to cancel it.",
        f"The identity brings {100 * total:.0f} % on the mean of all joins and moments, at least {100 * least:.0f} % "
        f"(at {where[1]}, epoch {where[0]}).",
        bool(least > 0 and total > 0.5),
    )


def _depth(name: str, moments: list[Shares]) -> Finding:
    first, preact = moments[0], name.startswith("preact")
    place = np.arange(len(first.blocks))
    if preact:  # where the image shrinks, the shortcut reads relu(BN(x)): counting begins anew
        place = np.array([int(block.rpartition(".")[2]) for block in first.blocks])
    k, relative = place[place > 0], (first.branch / first.identity)[place > 0]
    power, grows = (_power(k, values) for values in (relative, first.activation[place > 0]))
    ends = [number(float(relative[k == i].mean())) for i in (1, k.max())]
    return Finding(
        f"De & Smith 2020 ({name})",
        "At initialisation BN scales the k-th branch of a network down by about sqrt(k): |res|/|id| ~ k^-0.5.",
        f"k^{power:.2f}, {'counted within layers' if preact else 'from the input'}: {ends[0]} at k = 1, {ends[1]} at "
        f"k = {k.max()}",
        bool(-0.65 < power < -0.35),
        f"BN divides by the size of what comes in; its root mean square grows like k^{grows:.2f} here"
        + (
            "."
            if preact
            else ", not like k^0.5: a ReLU follows the sum, and where the image shrinks half of the channels are zeros."
        ),
    )


def _power(k: np.ndarray, values: np.ndarray) -> float:
    """The exponent p of the k^p that fits best."""
    return float(np.polyfit(np.log(k), np.log(values), 1)[0]) if len(set(k.tolist())) > 1 else np.nan


def _paths(name: str, moments: list[Shares]) -> Finding:
    n, sums = len(moments[0].blocks), [float(m.branch_share.sum()) for m in (moments[0], moments[-1])]
    parts = [s / n for s in sums]
    return Finding(
        f"Veit et al. 2016 ({name})",
        "Nearly all of the gradient of ResNet-110 comes by paths through 5 to 17 of its 54 branches: 9 to 31 %.",
        f"the branches' shares sum to {listed([f'{s:.1f}' for s in sums])} of {n}, before and after training: "
        f"{listed([f'{100 * p:.0f} %' for p in parts])}",
        0.09 <= parts[-1] <= 0.31,
        "The paper sampled whole paths of a trained network; the sum counts branches join by join.",
    )
