"""LARS: momentum SGD whose step is scaled, per parameter tensor, to the length of that tensor. For large batches.

    r = trust * |p| / (|g| + weight_decay * |p| + eps)        r = 1 where |p| or |g| is 0
    b <- momentum * b + lr * r * (g + weight_decay * p)
    p <- p - b

|.| is the Euclidean norm over the tensor. The learning rate is accumulated in the buffer, as the paper writes it.
Biases and batch normalisation are usually left out: put them in a group with trust=None, where r = 1.
Source: You, Gitman and Ginsburg 2017 (arXiv:1708.03888), algorithm 1 and eq. 6.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from .optimizer import Optimizer, check_at_least_zero, kept_array


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling; see the page's head for the formula.

    lr: per step, shared by all tensors. trust: the paper's eta, or None for no scaling. weight_decay: inside r, as in
    the paper. State: momentum_buffer, like the parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float | None = 1e-3,
        eps: float = 0.0,
    ):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps}
        )

    def check(self, group: dict[str, Any]) -> None:
        """ValueError for a negative setting."""
        check_at_least_zero(group, "lr", "momentum", "weight_decay", "eps")
        if group["trust"] is not None:
            check_at_least_zero(group, "trust")

    def update(self, p: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step of one parameter."""
        decay, b = float(group["weight_decay"]), kept_array(state, "momentum_buffer", p)
        r = 1.0
        if group["trust"] is not None:
            length, slope = math.sqrt(float((p * p).sum())), math.sqrt(float((g * g).sum()))
            if length > 0 and slope > 0:
                r = float(group["trust"]) * length / (slope + decay * length + float(group["eps"]))
        b *= float(group["momentum"])
        b += (float(group["lr"]) * r) * (g + decay * p)
        p -= b
