"""Do neighbouring inputs have similar gradients? In deep plain networks they do not: shattered gradients.

A network maps one number x to one number y; its weights are random, it is not trained. We look at the slope dy/dx at
256 points of [-2, 2]. If the slopes of neighbours are alike (a walk), a step of gradient descent that helps one point
helps its neighbours. If they are as unlike as white noise, it helps nobody.

The autocorrelation at lag k says how alike slopes are that lie k points apart: 1 for the same, 0 for noise.

    plain:     h <- relu(BN(W h))                     residual:  h <- h + beta * W relu(BN(h))

BN here takes the statistics of the 256 points as constants, so that each slope is that of a function of x alone.

What to look at: the plain network's autocorrelation falls to zero as it gets deeper, the residual network's does not,
the less so the smaller beta is. Skip connections do not only keep gradients large, they keep them *alike*.

Source: Balduzzi et al. 2017 (arXiv:1702.08591), figures 1 and 2, theorems 1 to 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .. import nn
from ..engine import Tensor
from ..nn import functional as F
from .result import LINES, Finding, Result, Table, listed


class Deep(nn.Module):
    """depth layers of `width` between two linear maps. beta: None for a plain network, else how much of each branch is
    added to the skip connection."""

    def __init__(self, depth: int, width: int, beta: float | None, rng: np.random.Generator):
        super().__init__()
        self.beta = beta
        self.enter, self.leave = _linear(1, width, 1.0, rng), _linear(width, 1, 1.0, rng)
        self.enter.bias.array[...] = rng.standard_normal(width)  # so that the units bend at different x
        self.layers = nn.ModuleList([_linear(width, width, 2.0, rng) for _ in range(depth)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(width, momentum=1.0, dtype="float64") for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        """y (N, 1) of x (N, 1)."""
        h = self.enter(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = F.relu(norm(layer(h))) if self.beta is None else h + layer(F.relu(norm(h))) * self.beta
        return self.leave(h)


def _linear(inputs: int, outputs: int, gain: float, rng: np.random.Generator) -> Any:
    """Weights of variance gain / inputs, in float64; no shift."""
    layer = nn.Linear(inputs, outputs, dtype="float64")
    layer.weight.array[...] = rng.standard_normal((outputs, inputs)) * np.sqrt(gain / inputs)
    layer.bias.array[...] = 0  # pyright: ignore[reportOptionalMemberAccess]
    return layer


def slopes(model: Deep, points: int = 256) -> np.ndarray:
    """dy/dx at so many points of [-2, 2]."""
    grid = np.linspace(-2, 2, points)[:, None]
    model.train()
    model(Tensor(grid))  # momentum 1: the running statistics are now those of the grid
    model.eval()
    x = Tensor(grid, requires_grad=True)
    model(x).sum().backward()
    return np.array([]) if x.grad is None else x.grad.array[:, 0]


def autocorrelation(values: np.ndarray, lags: int) -> np.ndarray:
    """At lags 0 to `lags`: sum of v[i] v[i + k] over sum of v[i]², v = values less their mean."""
    v = values - values.mean()
    return np.array([v[: len(v) - k] @ v[k:] for k in range(lags + 1)]) / (v @ v)


@dataclass(repr=False)
class Shatter(Result):
    """kinds: names of the networks. depths, betas: of each (beta NaN: plain). slopes: of each the dy/dx of its first
    seed, (kinds, points). autocorrelation: (kinds, seeds, lags + 1)."""

    name: ClassVar[str] = "shatter"
    size: ClassVar[tuple[float, float]] = (10.0, 6.4)
    kinds: list[str]
    depths: np.ndarray
    betas: np.ndarray
    slopes: np.ndarray
    autocorrelation: np.ndarray
    width: int

    @property
    def lag1(self) -> np.ndarray:
        """(kinds,): the mean over seeds of the autocorrelation at lag 1."""
        return self.autocorrelation[:, :, 1].mean(1)

    def tables(self) -> list[Table]:
        lags = [k for k in (1, 2, 5, 10, 15) if k < self.autocorrelation.shape[2]]
        rows = []
        for kind, each in zip(self.kinds, self.autocorrelation, strict=True):
            spread = f"± {each[:, 1].std():.2f}" if len(each) > 1 else ""
            rows.append((kind, *(f"{each[:, k].mean():+.2f}" for k in lags), spread))
        title = (
            f"Autocorrelation of dy/dx at {self.slopes.shape[1]} points; width {self.width}, mean of "
            f"{self.autocorrelation.shape[1]} seeds, last column their deviation at lag 1"
        )
        return [Table(title, ("network", *(f"lag {k}" for k in lags), ""), rows, range(1, len(lags) + 2))]

    def _of(self, plain: bool) -> list[int]:
        """Indices of the plain or the residual networks, shallow ones first."""
        return sorted((i for i, b in enumerate(self.betas) if np.isnan(b) == plain), key=lambda i: self.depths[i])

    def _says(self, which: list[int]) -> str:
        return listed([f"{self.lag1[i]:+.2f} ({self.kinds[i]})" for i in which])

    def findings(self) -> list[Finding]:
        plain, residual = self._of(True), self._of(False)
        found = []
        if plain:
            deepest = plain[-1]
            noise = 2 / np.sqrt(self.slopes.shape[1])  # two deviations of the autocorrelation of white noise
            found.append(
                Finding(
                    "Balduzzi et al. 2017, theorem 1 and figure 2: plain",
                    "Gradients of plain networks become white noise; their correlation falls exponentially, 1/2^depth.",
                    f"lag 1: {self._says(plain)}; of white noise it would be within ± {noise:.2f}.",
                    bool(abs(self.lag1[deepest]) < noise) and all(np.diff(self.lag1[plain]) < noise),
                    f"{self.kinds[deepest]} still has {self.lag1[deepest]:.2f}: it is not deep enough."
                    if abs(self.lag1[deepest]) >= noise
                    else "",
                )
            )
        if plain and residual:
            best = {b: max(i for i in residual if self.betas[i] == b) for b in self.betas[residual]}
            deep = [i for i in plain if self.depths[i] <= min(self.depths[residual])] or plain
            worst = max(deep, key=lambda i: self.depths[i])
            found.append(
                Finding(
                    "Balduzzi et al. 2017, theorems 2 and 3: skip connections",
                    "The correlation in residual networks falls far more slowly, with BN and rescaling like "
                    "1 / (beta sqrt(depth)).",
                    f"lag 1: {self._says(residual)}",
                    all(self.lag1[i] > self.lag1[worst] + 0.1 for i in residual),
                    f"{self.kinds[worst]} is at {self.lag1[worst]:+.2f}.",
                )
            )
            betas = sorted(best)
            if len(betas) > 1:
                low, high = best[betas[0]], best[betas[-1]]
                found.append(
                    Finding(
                        "Balduzzi et al. 2017: rescaling",
                        "A small beta keeps the gradients of a deep residual network like those of a shallow one.",
                        f"lag 1: {self._says([low, high])}",
                        bool(self.lag1[low] > self.lag1[high]),
                        f"The shallowest plain network here, {self.kinds[plain[0]]}, is at {self.lag1[plain[0]]:+.2f}.",
                    )
                )
        return found

    def draw(self, figure: Any) -> None:
        few = self._of(True)[:: max(1, len(self._of(True)) - 1)][:2] + self._of(False)[:2]
        top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.15))
        grid = np.linspace(-2, 2, self.slopes.shape[1])
        for column, (axes, i) in enumerate(zip(np.atleast_1d(top.subplots(1, len(few))), few, strict=True)):
            axes.plot(grid, self.slopes[i] / np.abs(self.slopes[i]).max(), color="0.0", linewidth=0.8)
            axes.set_title(self.kinds[i], fontsize=10)
            axes.set(xlabel="x", ylim=(-1.1, 1.1))
            axes.set_ylabel("dy/dx (largest = 1)" if column == 0 else "")
        axes = bottom.subplots()
        for i, kind in enumerate(self.kinds):
            axes.plot(self.autocorrelation[i].mean(0), label=kind, markersize=4, **LINES[i % len(LINES)])
        axes.axhline(0, color="0.0", linewidth=0.6)
        axes.set(xlabel="lag (points of the grid)", ylabel="autocorrelation of dy/dx")
        axes.grid(True, color="0.9")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def shatter(
    depths: tuple[int, ...] = (2, 10, 24, 50),
    residual_depths: tuple[int, ...] = (50, 100),
    betas: tuple[float, ...] = (0.1, 1.0),
    width: int = 200,
    seeds: int = 5,
    points: int = 256,
    lags: int = 15,
    on_note: Callable[[str], Any] | None = None,
) -> Shatter:
    """Autocorrelation of gradients over neighbouring inputs: white noise in deep plain networks, not in residual ones.

    Parameters
    ----------
    depths
        Numbers of layers of the plain networks.
    residual_depths
        Numbers of layers of the residual networks.
    betas
        Factors of their residual branches.
    width
        Units per layer.
    seeds
        Networks of each kind, drawn from seeds 0, 1, ....
    points
        Points of the grid on [-2, 2].
    lags
        The largest distance between points that is looked at.
    """
    if min(width, seeds) < 1 or not 1 <= lags < points or not depths or min(*depths, *residual_depths, 1) < 1:
        raise ValueError(
            f"depths={depths}, residual_depths={residual_depths}, width={width} and seeds={seeds} must be at least 1, "
            f"lags={lags} from 1 to below points={points}"
        )
    note = on_note or (lambda text: None)
    kinds: list[tuple[str, int, float | None]] = [(f"plain, {n} layers", n, None) for n in depths]
    kinds += [(f"residual, {n} layers, β {beta:g}", n, beta) for beta in betas for n in residual_depths]
    shown, correlations = [], []
    for kind, depth, beta in kinds:
        note(kind)
        each = [slopes(Deep(depth, width, beta, np.random.default_rng(seed)), points) for seed in range(seeds)]
        shown.append(each[0])
        correlations.append([autocorrelation(values, lags) for values in each])
    return Shatter(
        [kind for kind, _, _ in kinds],
        np.array([depth for _, depth, _ in kinds]),
        np.array([np.nan if beta is None else beta for _, _, beta in kinds]),
        np.array(shown),
        np.array(correlations),
        width,
    )
