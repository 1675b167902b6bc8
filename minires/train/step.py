"""One step of training: forward, backward, and the optimizer's step, unless something is not finite.

In float16 losses are scaled (amp.py), and a step that is not finite is left out: the scale was too large. Only where
it has fallen below what any gradient could need has the run diverged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..cuda import GraphedStep, is_current_stream_capturing, make_graphed_step
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

_LEAST_SCALE = 2.0**-14  # float16's least normal number: what overflows at this scale is not finite
_CHANGING = ("params", "lr", "initial_lr")  # of a parameter group: what a captured step does not depend on


class Diverged(RuntimeError):
    """The loss or a gradient is not a number any more."""


class TrainStep:
    """`step(images, targets)` changes the model's weights; targets are classes (N,) or probabilities (N, K).

    With `cuda_graphs` gradients are one graph and the optimizer's step another, and in between the host looks at loss
    and norm, as ever. note: called with a line on why steps run without.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Module,
        optimizer: Optimizer,
        penalty: Penalty | None = None,
        note: Callable[[str], Any] | None = None,
    ):
        self.recipe, self.model, self.optimizer, self.penalty = recipe, model, optimizer, penalty
        self.region, self.scaler = precision.region(recipe), precision.scaler(recipe)
        self.graphs: tuple[GraphedStep, GraphedStep] | None = None
        if recipe.cuda_graphs:
            first = make_graphed_step(self._whole_gradient, depends=self._stage, note=note)

            def again() -> int:
                return first.captures  # captured anew, its gradients lie elsewhere

            self.graphs = first, make_graphed_step(optimizer.step, 1, again, note, recipe.device)

    def __call__(self, number: int, images: Tensor, targets: Tensor) -> tuple[float, list[Any]]:
        """The mean loss of the batch, and the model's outputs as arrays, one per part; both from before the step.

        number: of the step, for messages. Raises Diverged, before the weights change, where the loss or a gradient
        is NaN or infinite; in float16 the step is then left out, and the loss may be NaN or infinite.
        """
        numbers = get_rng_state()
        compute = self.graphs[0] if self.graphs else self._whole_gradient
        losses, outputs, norm, overflow = compute(images, targets)
        self.scaler.unscaled(self.optimizer, overflow)
        loss = sum(float(part) / self.recipe.accumulate for part in losses)
        wrong = "" if math.isfinite(loss) else f"the loss is {loss}"
        if norm is not None:
            norm = float(norm)
            wrong = wrong or ("" if math.isfinite(norm) else f"the norm of the gradient is {norm}")
        left_out = self.scaler.overflowed(self.optimizer) and self.scaler.get_scale() > _LEAST_SCALE
        if wrong and not left_out:
            set_rng_state(numbers)
            raise Diverged(f"{wrong} in step {number}: {self._explain(images, targets)}")
        if self.graphs and self.graphs[0].replayed and not self.scaler.overflowed(self.optimizer):
            self.graphs[1]()
        else:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss, outputs

    def _whole_gradient(self, images: Tensor, targets: Tensor) -> tuple[list[Any], list[Any], Any, Any]:
        """Gradients unscaled, with penalties, and clipped: (loss of each part, outputs, norm of the gradient, whether
        it overflowed), arrays on the device. The norm is None where a loss is not finite and nothing is scaled."""
        self.optimizer.zero_grad()
        self.scaler.unscaled(self.optimizer, None)
        losses, outputs = self._gradients(images, targets)
        if not _is_finite(losses[-1]) and not self.scaler.is_enabled():
            return losses, outputs, None, None
        self.scaler.unscale_(self.optimizer)
        if self.penalty is not None:
            self.penalty.add_gradients()
        norm = clip_grad_norm_(self.model.parameters(), self.recipe.clip or math.inf).array
        return losses, outputs, norm, self.scaler.overflow(self.optimizer)

    def _gradients(self, images: Tensor, targets: Tensor) -> tuple[list[Any], list[Any]]:
        """Add the gradients of the batch, part by part, scaled; stops at the first loss that is not finite, where
        there is no scaler to leave the step out. The losses of the parts, and the outputs."""
        parts, n = self.recipe.accumulate, images.shape[0]
        losses, outputs = [], []
        for i in range(parts):
            rows = slice(i * n // parts, (i + 1) * n // parts)
            x, t = (images, targets) if parts == 1 else (Tensor(images.array[rows]), Tensor(targets.array[rows]))
            with self.region:
                logits = self.model(x)
                loss = cross_entropy(logits, t, label_smoothing=self.recipe.label_smoothing)
            losses.append(loss.array)
            outputs.append(logits.array)
            if not _is_finite(loss.array) and not self.scaler.is_enabled():
                break
            self.scaler.scale(loss if parts == 1 else mul(loss, 1 / parts)).backward()
        return losses, outputs

    def _stage(self) -> Any:
        """What a captured step depends on beside its inputs and the learning rate."""
        settings = [{k: v for k, v in g.items() if k not in _CHANGING} for g in self.optimizer.param_groups]
        trained = [p.requires_grad for p in self.model.parameters()]
        return settings, trained, [module.training for module in self.model.modules()]

    def _explain(self, images: Tensor, targets: Tensor) -> str:
        """Where the NaN or infinity began: the op and the module, forward or backward."""
        self.optimizer.zero_grad()
        with AnomalyHook():
            try:
                self._gradients(images, targets)
            except AnomalyError as anomaly:
                return f"{anomaly}; try a smaller lr than {self.recipe.lr}"
        return "all values are finite when the batch is computed again; try a smaller lr"


def _is_finite(loss: Any) -> bool:
    """Whether a loss is; where a CUDA graph is captured, the host may not look, and looks later."""
    return is_current_stream_capturing() or math.isfinite(float(loss))
