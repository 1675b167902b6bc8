"""One step of training: forward, backward, and the optimizer's step, unless something is not finite.

In float16 losses are scaled (amp.py), and a step that is not finite is left out: the scale was too large. Only where
it has fallen below what any gradient could need has the run diverged.
"""

from __future__ import annotations

import math
from typing import Any

from ..engine import Tensor
from ..hooks import AnomalyError, AnomalyHook
from ..nn import Module
from ..nn.utils import clip_grad_norm_
from ..ops import cross_entropy, mul
from ..optim import Optimizer
from ..random import get_rng_state, set_rng_state
from . import precision
from .penalties import Penalty
from .recipe import Recipe

_LEAST_SCALE = (
    2.0**-14
)  # float16's least normal number: what overflows at this scale is not too large, it is not finite


class Diverged(RuntimeError):
    """The loss or a gradient is not a number any more."""


class TrainStep:
    """`step(images, targets)` changes the model's weights; targets are classes (N,) or probabilities (N, K)."""

    def __init__(self, recipe: Recipe, model: Module, optimizer: Optimizer, penalty: Penalty | None = None):
        self.recipe, self.model, self.optimizer, self.penalty = recipe, model, optimizer, penalty
        self.region, self.scaler = precision.region(recipe), precision.scaler(recipe)

    def __call__(self, number: int, images: Tensor, targets: Tensor) -> tuple[float, list[Any]]:
        """The mean loss of the batch, and the model's outputs as arrays, one per part; both from before the step.

        number: of the step, for messages. Raises Diverged, before the weights change, where the loss or a gradient
        is NaN or infinite; in float16 the step is then left out, and the loss may be NaN or infinite.
        """
        numbers = get_rng_state()
        self.optimizer.zero_grad()
        loss, outputs = self._gradients(images, targets)
        wrong = "" if math.isfinite(loss) else f"the loss is {loss}"
        if not wrong or self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
            if self.penalty is not None:
                self.penalty.add_gradients()
            norm = float(clip_grad_norm_(self.model.parameters(), self.recipe.clip or math.inf).array)
            wrong = wrong or ("" if math.isfinite(norm) else f"the norm of the gradient is {norm}")
        left_out = self.scaler.overflowed(self.optimizer) and self.scaler.get_scale() > _LEAST_SCALE
        if wrong and not left_out:
            set_rng_state(numbers)
            raise Diverged(f"{wrong} in step {number}: {self._explain(images, targets)}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss, outputs

    def _gradients(self, images: Tensor, targets: Tensor) -> tuple[float, list[Any]]:
        """Add the gradients of the batch, part by part, scaled; stops at the first loss that is not finite, where
        there is no scaler to leave the step out."""
        parts, n = self.recipe.accumulate, images.shape[0]
        total, outputs = 0.0, []
        for i in range(parts):
            rows = slice(i * n // parts, (i + 1) * n // parts)
            x, t = (images, targets) if parts == 1 else (Tensor(images.array[rows]), Tensor(targets.array[rows]))
            with self.region:
                logits = self.model(x)
                loss = cross_entropy(logits, t, label_smoothing=self.recipe.label_smoothing)
            total += float(loss.array) / parts
            outputs.append(logits.array)
            if not math.isfinite(total) and not self.scaler.is_enabled():
                break
            self.scaler.scale(loss if parts == 1 else mul(loss, 1 / parts)).backward()
        return total, outputs

    def _explain(self, images: Tensor, targets: Tensor) -> str:
        """Where the NaN or infinity began: the op and the module, forward or backward."""
        self.optimizer.zero_grad()
        with AnomalyHook():
            try:
                self._gradients(images, targets)
            except AnomalyError as anomaly:
                return f"{anomaly}; try a smaller lr than {self.recipe.lr}"
        return "all values are finite when the batch is computed again; try a smaller lr"
