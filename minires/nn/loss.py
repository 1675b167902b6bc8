"""Losses as modules; formulas are in ops/loss.py. reduction: "mean", "sum" or "none"."""

from __future__ import annotations

from ..engine import Tensor
from ..ops.loss import cross_entropy, mse_loss, nll_loss
from .module import Module


class _Loss(Module):
    def __init__(self, reduction: str):
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"{type(self).__name__}: reduction={reduction!r} must be 'mean', 'sum' or 'none'")
        self.reduction = reduction


class CrossEntropyLoss(_Loss):
    """-log of the softmax probability of the right class. Takes logits, not probabilities.

    weight: a factor per class (K,), kept as a buffer. ignore_index: targets that do not count. label_smoothing: the
    share of the target, in [0, 1], that is spread evenly over the classes.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ):
        super().__init__(reduction)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"CrossEntropyLoss: label_smoothing={label_smoothing} must be in [0, 1]")
        self.register_buffer("weight", weight)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input (N, K) logits; target (N,) class numbers, or (N, K) probabilities."""
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
        )


class NLLLoss(_Loss):
    """-input[target]: cross-entropy of log-probabilities. weight, ignore_index: as CrossEntropyLoss."""

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean"):
        super().__init__(reduction)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input (N, K) log-probabilities; target (N,) class numbers."""
        return nll_loss(input, target, weight=self.weight, reduction=self.reduction, ignore_index=self.ignore_index)


class MSELoss(_Loss):
    """(input - target) ** 2."""

    def __init__(self, reduction: str = "mean"):
        super().__init__(reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Two tensors of one shape."""
        return mse_loss(input, target, reduction=self.reduction)
