"""One step of training: forward, backward, and the optimizer's step, unless something is not finite.

In float16 losses are scaled (amp.py), and a step that is not finite is left out: the scale was too large. Only where
it has fallen below what any gradient could need has the run diverged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..cuda import GraphedStep, is_current_stream_capturing, make_graphed_step
from ..device import CPU, device, namespace_of, to_device
from ..engine import Tensor, state
from ..hooks import AnomalyError, AnomalyHook
from ..jit import trace
from ..nn import Module
from ..nn.utils import clip_grad_norm_
from ..ops import cross_entropy, mul
from ..optim import Optimizer
from ..random import get_rng_state, set_rng_state
from . import precision
from .metrics import count_right
from .penalties import Penalty
from .recipe import Recipe

_LEAST_SCALE = 2.0**-14  # float16's least normal number: what overflows at this scale is not finite


class Diverged(RuntimeError):
    """The loss or a gradient is not a number any more."""


class TrainStep:
    """`step(images, targets)` changes the model's weights; targets are classes (N,) or probabilities (N, K).

    With `cuda_graphs` the whole step is one graph, the optimizer's step included: whether the loss and the gradient are
    finite is then a number on the GPU, at which the update leaves everything as it is, and the host reads it
    afterwards. note: called with a line on why steps run without.
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
        # On the CPU the model's forward and backward are launches, rehearsed on a copy of it (jit/training.py).
        self.forward = trace(model) if device(recipe.device).type == "cpu" else model
        self.graph: GraphedStep | None = None
        if recipe.cuda_graphs:
            self.graph = make_graphed_step(self._compute, depends=self._stage, note=note)

    def __call__(self, number: int, images: Tensor, targets: Tensor) -> tuple[float, int]:
        """(the mean loss of the batch, how many of it are right), both from before the step.

        number: of the step, for messages. Raises Diverged, and leaves the weights as they are, where the loss or a
        gradient is NaN or infinite; in float16 the step is then left out, and the loss may be NaN or infinite.
        """
        numbers, counts = get_rng_state(), self.optimizer.counts() if self.graph else []
        compute = self.graph if self.graph and self._has_state() else self._compute
        *losses, norm, right, overflow = _on_host(compute(images, targets))
        replayed = self.graph is not None and compute is self.graph and self.graph.replayed
        if replayed and self.scaler.is_enabled():
            self.scaler.unscaled(self.optimizer, [np.array([overflow])])
        loss = sum(part / self.recipe.accumulate for part in losses)
        wrong = "" if math.isfinite(loss) else f"the loss is {loss}"
        wrong = wrong or ("" if math.isfinite(norm) else f"the norm of the gradient is {norm}")
        if replayed and (wrong or overflow):
            self.optimizer.set_counts(counts)
        overflowed = self.scaler.overflowed(self.optimizer)
        if wrong and not (overflowed and self.scaler.get_scale() > _LEAST_SCALE):
            set_rng_state(numbers)
            raise Diverged(f"{wrong} in step {number}: {self._explain(images, targets)}")
        if not replayed:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss, int(right)

    def _compute(self, images: Tensor, targets: Tensor) -> Any:
        """Loss of each part, norm of the gradient, how many are right, overflow: numbers, or arrays of one each.

        The gradient is unscaled, with penalties, and clipped. Where a graph is captured, the optimizer's step is in it,
        and the result is one array; else the caller looks at the numbers first.
        """
        self.optimizer.zero_grad()
        self.scaler.unscaled(self.optimizer, None)
        losses, right = self._gradients(images, targets)
        if not _is_finite(losses[-1]) and not self.scaler.is_enabled():
            return [*losses, math.nan, right, 0.0]
        self.scaler.unscale_(self.optimizer)
        if self.penalty is not None:
            self.penalty.add_gradients()
        norm = clip_grad_norm_(self.model.parameters(), self.recipe.clip or math.inf).array
        if not is_current_stream_capturing():
            return [*losses, norm, right, 0.0]
        xp = namespace_of(norm)
        seen = xp.zeros(len(losses) + 3, "float64")
        for i, value in enumerate((*losses, norm, right)):
            seen[i] = value
        for flag in self.scaler.overflow(self.optimizer) or ():
            seen[-1:] += flag
        found = ~xp.isfinite(seen[:-2].sum()) | (seen[-1] != 0)
        self.optimizer.step(found=found.astype("float32").reshape(1))
        return seen

    def _gradients(self, images: Tensor, targets: Tensor) -> tuple[list[Any], Any]:
        """Add the gradients of the batch, part by part, scaled; stops at the first loss that is not finite, where
        there is no scaler to leave the step out. The losses of the parts, and how many of the batch are right."""
        parts, n = self.recipe.accumulate, images.shape[0]
        forward = self.model if state.hooks else self.forward  # hooks name modules as the model does
        losses, right = [], 0
        for i in range(parts):
            rows = slice(i * n // parts, (i + 1) * n // parts)
            x, t = (images, targets) if parts == 1 else (Tensor(images.array[rows]), Tensor(targets.array[rows]))
            with self.region:
                logits = forward(x)
                loss = cross_entropy(logits, t, label_smoothing=self.recipe.label_smoothing)
            losses.append(loss.array)
            right = right + count_right(logits.array, t.array)
            if not _is_finite(loss.array) and not self.scaler.is_enabled():
                break
            self.scaler.scale(loss if parts == 1 else mul(loss, 1 / parts)).backward()
        return losses, right

    def _has_state(self) -> bool:
        """Whether the optimizer has made a step with all that had a gradient: what it remembers begins with that."""
        learned = (p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None)
        return all(p in self.optimizer.state for p in learned)

    def _stage(self) -> Any:
        """What a captured step depends on beside its inputs and the optimizer's settings."""
        trained = [p.requires_grad for p in self.model.parameters()]
        return trained, [module.training for module in self.model.modules()]

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


def _on_host(values: Any) -> list[float]:
    """Numbers, or arrays of one number each, or an array of numbers on a GPU: read at once."""
    return to_device(values, CPU).tolist() if not isinstance(values, list) else [float(value) for value in values]
