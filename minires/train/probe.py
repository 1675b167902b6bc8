"""A linear probe: the features of frozen weights, computed once, and a multinomial logistic head trained on them.

    minimise  mean of cross_entropy(Z w^T + b, labels)  +  l2 / 2 * |w|^2        over w (K, D) and b (K)

Z (N, D) are the features, each scaled to mean 0 and variance 1; the scaling is put into the head's weights at the end.
The function is convex, so that where the search starts does not matter; L-BFGS finds its minimum in some tens of passes
over Z, each a pair of products of matrices: seconds, where fine-tuning takes minutes.

Source: Alain & Bengio 2016 (arXiv:1610.01644); Nocedal & Wright 2006, algorithm 7.4 (L-BFGS two-loop recursion).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..device import CPU, to_device
from ..engine import Tensor
from ..ops import cross_entropy
from ..state import no_grad
from .images import make_loader
from .loop import Run
from .metrics import count_right
from .recipe import Recipe
from .run_folder import RunFolder

_MEMORY = 10  # pairs of steps that stand for the curvature


@no_grad()
def features(model: Any, batches: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
    """(features (N, D) float32, labels (N,)): what the head of a ResNet is given, for batches of (images, labels)."""
    seen: list[np.ndarray] = []
    handle = model.fc.register_forward_pre_hook(lambda module, args: seen.append(to_device(args[0].array, CPU)))
    labels, training = [], model.training
    model.eval()
    try:
        for images, targets in batches:
            model(images)
            labels.append(to_device(targets.array, CPU))
    finally:
        handle.remove()
        model.train(training)
    return np.concatenate(seen).astype(np.float32, copy=False), np.concatenate(labels)


def fit_head(
    x: np.ndarray, labels: np.ndarray, classes: int, l2: float = 1e-3, steps: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """(weight (K, D), bias (K,)) float32 of the logistic regression of labels (N,) on features x (N, D).

    l2: see the page's head. steps: of L-BFGS, at most; it ends where the largest slope is below 1e-5. ValueError where
    features are not finite.
    """
    if not np.isfinite(x).all():
        raise ValueError("the weights give features that are NaN or infinite: they are damaged, or diverged")
    mean, scale = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    scale[scale < 1e-6 * max(1.0, float(np.abs(mean).max()))] = np.inf  # a constant feature says nothing
    z = ((x - mean) / scale).astype(np.float32)
    n, d = z.shape
    rows = np.arange(n)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = flat[: classes * d].reshape(classes, d), flat[classes * d :]
        y = (z @ w.T.astype(np.float32)).astype(np.float64) + b  # (N, K)
        y -= y.max(1, keepdims=True)
        p = np.exp(y)
        total = p.sum(1, keepdims=True)
        value = float((np.log(total[:, 0]) - y[rows, labels]).mean() + l2 / 2 * (w * w).sum())
        p /= total
        p[rows, labels] -= 1
        slope_w = (p.T.astype(np.float32) @ z).astype(np.float64) / n + l2 * w
        return value, np.concatenate([slope_w.ravel(), p.mean(0)])

    found = minimise(loss, np.zeros(classes * (d + 1)), steps)
    w = found[: classes * d].reshape(classes, d) / scale
    return w.astype(np.float32), (found[classes * d :] - w @ mean).astype(np.float32)


def minimise(
    function: Callable[[np.ndarray], tuple[float, np.ndarray]], x: np.ndarray, steps: int, tolerance: float = 1e-5
) -> np.ndarray:
    """Where `function`, which returns its value and its gradient, is smallest: L-BFGS from x, with backtracking."""
    value, slope = function(x)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in range(steps):
        if np.abs(slope).max() < tolerance:
            break
        direction = -_newton_like(slope, pairs)
        fall, length = float(slope @ direction), 1.0 if pairs else 1.0 / max(1.0, float(np.linalg.norm(slope)))
        for _ in range(40):
            there = x + length * direction
            new_value, new_slope = function(there)
            if new_value <= value + 1e-4 * length * fall:
                break
            length /= 2
        else:
            break  # no smaller value within the arithmetic's precision
        step, change = there - x, new_slope - slope
        if step @ change > 1e-10 * (change @ change):
            pairs = [*pairs[1 - _MEMORY :], (step, change)]
        x, value, slope = there, new_value, new_slope
    return x


def _newton_like(slope: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The slope times an inverse Hessian that agrees with the last steps (the two-loop recursion)."""
    q, shares = slope.copy(), []
    for step, change in reversed(pairs):
        shares.append((step @ q) / (step @ change))
        q -= shares[-1] * change
    if pairs:
        step, change = pairs[-1]
        q *= (step @ change) / (change @ change)
    for (step, change), share in zip(pairs, reversed(shares), strict=True):
        q += (share - (change @ q) / (step @ change)) * step
    return q


class ProbeRun(Run):
    """A run whose one step fits the head. The weight decay of the recipe is the l2 of the fit."""

    def __init__(self, recipe: Recipe, folder: RunFolder | None = None):
        super().__init__(recipe, folder)
        self.per_epoch = self.total = 1

    def _rest_of_epoch(self) -> None:
        if self.step:
            return
        self._look_for_signals()
        begun, images = time.perf_counter(), self.images
        loader = make_loader(self.recipe, images, images.train, 256, training=False)
        with self.train_step.region:
            x, labels = features(self.model, self._watched(loader.iterate(0)))
        seconds = time.perf_counter() - begun
        weight, bias = fit_head(x, labels, len(images.classes), self.recipe.weight_decay)
        fit = time.perf_counter() - begun - seconds
        self.said(f"features of {len(x):,} images in {seconds:.1f} s, the head fitted to them in {fit:.1f} s")
        head: Any = self.model.get_submodule("fc")
        head.load_state_dict({"weight": weight, "bias": bias})
        logits = x @ weight.T + bias
        loss = float(cross_entropy(Tensor(logits), Tensor(labels)).array)
        self.mean.add(loss, int(count_right(logits, labels)), len(labels))
        self.step = self.batch = 1
