"""Mixing the images of a batch in pairs: MixUp and CutMix. Labels become shares of classes, (B, K) float32.

`DataLoader(..., batch_transform=MixUp(...))`: the numbers are keyed by (seed, epoch, step).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..device import namespace_of
from ..engine import Tensor
from .randomness import generator


class _Mix:
    def __init__(self, num_classes: int, alpha: float = 1.0, p: float = 1.0):
        who = type(self).__name__
        if num_classes < 2:
            raise ValueError(f"{who}: num_classes={num_classes} must be at least 2")
        if not alpha > 0:
            raise ValueError(f"{who}: alpha={alpha} must be above 0")
        if not 0 <= p <= 1:
            raise ValueError(f"{who}: p={p} must be from 0 to 1")
        self.num_classes, self.alpha, self.p = num_classes, alpha, p

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, C, H, W) float, labels (B,) int64 -> images as before, targets (B, K) float32.

        Raises ValueError where shapes, or a label and `num_classes`, do not fit.
        """
        x, y, who = images.array, labels.array, type(self).__name__
        if x.ndim != 4 or y.shape != x.shape[:1] or y.dtype.kind not in "iu":
            raise ValueError(
                f"{who} takes images (B, C, H, W) and int labels (B,), not {x.shape} and {y.dtype} {y.shape}"
            )
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.num_classes:
            raise ValueError(f"{who}: labels from {y.min()} to {y.max()} do not fit num_classes={self.num_classes}")
        xp, g = namespace_of(x), generator()
        mixes, share, partner = g.random() < self.p, g.beta(self.alpha, self.alpha), g.permutation(len(y))
        one_hot = xp.eye(self.num_classes, dtype=np.float32)[y]
        if not mixes:
            return images, Tensor(one_hot)
        partner = xp.asarray(partner)
        nhwc, share = self._mixed(x.transpose(0, 2, 3, 1), partner, float(share), g)
        targets = one_hot * np.float32(share) + one_hot[partner] * np.float32(1 - share)
        return Tensor(nhwc.transpose(0, 3, 1, 2)), Tensor(targets)

    def _mixed(self, x: Any, partner: Any, share: float, g: np.random.Generator) -> tuple[Any, float]:
        raise NotImplementedError


class MixUp(_Mix):
    """x_i <- share * x_i + (1 - share) * x_j, and targets alike; share ~ Beta(alpha, alpha), one for the batch.

    j: a random permutation of the batch. p: probability that a batch is mixed. num_classes: K.
    Source: Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization", equation (1); alpha = 0.2 is common for
    ImageNet, 1 for CIFAR.
    """

    def _mixed(self, x: Any, partner: Any, share: float, g: np.random.Generator) -> tuple[Any, float]:
        own = x.dtype.type
        y = x[partner]
        y *= own(1 - share)
        y += x * own(share)
        return y, share


class CutMix(_Mix):
    """A box of x_i is replaced by the same box of x_j; targets in the shares of area. One box for the batch.

    The box has the image's proportions and 1 - share of its area, share ~ Beta(alpha, alpha), is centred anywhere in
    the image and clipped at its border. j, p and num_classes: as in MixUp.
    Source: Yun et al. 2019, "CutMix", equations (1) and (2).
    """

    def _mixed(self, x: Any, partner: Any, share: float, g: np.random.Generator) -> tuple[Any, float]:
        _, h, w, _ = x.shape
        side = math.sqrt(1 - share)
        (top, bottom), (left, right) = (_span(size, side, g.random()) for size in (h, w))
        y = x.copy()
        y[:, top:bottom, left:right] = x[partner, top:bottom, left:right]
        return y, 1 - (bottom - top) * (right - left) / (h * w)


def _span(size: int, fraction: float, u: float) -> tuple[int, int]:
    """A part of 0 ... size, centred at u * size and clipped."""
    centre, half = int(u * size), int(size * fraction) // 2
    return max(centre - half, 0), min(centre + half, size)
