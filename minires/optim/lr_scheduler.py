"""Learning-rate schedules. Each one is a pure function of the step, `lr_at(step, base_lr, ...)`, and a thin object.

    CosineAnnealingLR.lr_at(30, 0.1, T_max=100)         the function: no optimizer, no history
    schedule = CosineAnnealingLR(optimizer, T_max=100)  the object: `schedule.step()` sets every group's lr

A step is whatever lies between two calls of `schedule.step()`: an epoch if it is called once per epoch, a batch if it
is called after every batch; all lengths (step_size, T_max, total_steps, ...) are in that unit. The object remembers the
number of steps and nothing else, so going on from a checkpoint needs that number alone. A group's `base_lr` is the lr
it had when its first schedule was made (kept as its "initial_lr"). Names and values are PyTorch's.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from .optimizer import Optimizer


class LRScheduler:
    """Base class: sets every group's lr to `lr_at(last_epoch, group's base lr, **settings)`.

    last_epoch: the number of steps made, less one where a new schedule is made from it (-1: start; PyTorch's name).
    """

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1, **settings: Any):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"a schedule needs an Optimizer, not {type(optimizer).__name__}")
        self.optimizer, self.settings, self.last_epoch = optimizer, settings, last_epoch + 1
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        self._set(self.last_epoch)

    @staticmethod
    def lr_at(step: int, base_lr: float, **settings: Any) -> float:
        """The learning rate of step `step` (from 0)."""
        raise NotImplementedError

    def lrs_at(self, step: int) -> list[float]:
        """The learning rate of every group at step `step`."""
        return [self.lr_at(step, base, **self.settings) for base in self.base_lrs]

    def step(self) -> None:
        """Go on by one step: call it after `optimizer.step()`."""
        self.last_epoch += 1
        self._set(self.last_epoch)

    def get_last_lr(self) -> list[float]:
        """The learning rate of every group now."""
        return self.lrs_at(self.last_epoch)

    def state_dict(self) -> dict[str, int]:
        """{"last_epoch": the number of steps made}."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go to the step of a `state_dict`, and set the learning rates of that step."""
        self.last_epoch = int(state_dict["last_epoch"])
        self._set(self.last_epoch)

    def _set(self, step: int) -> None:
        if len(self.base_lrs) != len(self.optimizer.param_groups):
            raise ValueError(
                f"the schedule was made for {len(self.base_lrs)} groups, the optimizer has "
                f"{len(self.optimizer.param_groups)}: make the schedule after add_param_group()"
            )
        for group, lr in zip(self.optimizer.param_groups, self.lrs_at(step), strict=True):
            group["lr"] = lr


class StepLR(LRScheduler):
    """lr = base_lr * gamma ** floor(step / step_size)."""

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1):
        _at_least_one(step_size=step_size)
        super().__init__(optimizer, last_epoch, step_size=step_size, gamma=gamma)

    @staticmethod
    def lr_at(step: int, base_lr: float, *, step_size: int, gamma: float = 0.1) -> float:
        """The learning rate of step `step` (from 0)."""
        return base_lr * gamma ** (step // step_size)


class MultiStepLR(LRScheduler):
    """lr = base_lr * gamma ** (number of milestones <= step). He et al. 2015 divide by 10 at two or three of them."""

    def __init__(self, optimizer: Optimizer, milestones: Sequence[int], gamma: float = 0.1, last_epoch: int = -1):
        super().__init__(optimizer, last_epoch, milestones=tuple(sorted(milestones)), gamma=gamma)

    @staticmethod
    def lr_at(step: int, base_lr: float, *, milestones: Sequence[int], gamma: float = 0.1) -> float:
        """The learning rate of step `step` (from 0); milestones in ascending order."""
        return base_lr * gamma ** bisect_right(milestones, step)


class CosineAnnealingLR(LRScheduler):
    """lr = eta_min + (base_lr - eta_min) * (1 + cos(pi * step / T_max)) / 2.

    Half a period of a cosine; after T_max it rises again. Loshchilov and Hutter 2017 (arXiv:1608.03983), eq. 5.
    """

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0, last_epoch: int = -1):
        _at_least_one(T_max=T_max)
        super().__init__(optimizer, last_epoch, T_max=T_max, eta_min=eta_min)

    @staticmethod
    def lr_at(step: int, base_lr: float, *, T_max: int, eta_min: float = 0.0) -> float:
        """The learning rate of step `step` (from 0)."""
        return eta_min + (base_lr - eta_min) * (1 + math.cos(math.pi * step / T_max)) / 2


class LinearLR(LRScheduler):
    """lr = base_lr * factor, the factor going linearly from start_factor to end_factor in total_iters steps."""

    def __init__(
        self,
        optimizer: Optimizer,
        start_factor: float = 1 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ):
        if not 0 < start_factor <= 1 or not 0 <= end_factor <= 1:
            raise ValueError(f"start_factor={start_factor} must be in (0, 1] and end_factor={end_factor} in [0, 1]")
        _at_least_one(total_iters=total_iters)
        settings = {"start_factor": start_factor, "end_factor": end_factor, "total_iters": total_iters}
        super().__init__(optimizer, last_epoch, **settings)

    @staticmethod
    def lr_at(
        step: int, base_lr: float, *, start_factor: float = 1 / 3, end_factor: float = 1.0, total_iters: int = 5
    ) -> float:
        """The learning rate of step `step` (from 0)."""
        return base_lr * (start_factor + (end_factor - start_factor) * min(step, total_iters) / total_iters)


class LambdaLR(LRScheduler):
    """lr = base_lr * lr_lambda(step). lr_lambda: a function of the step, or a list with one for each group."""

    def __init__(self, optimizer: Optimizer, lr_lambda: Any, last_epoch: int = -1):
        groups = len(optimizer.param_groups)
        self.lr_lambdas = list(lr_lambda) if isinstance(lr_lambda, (list, tuple)) else [lr_lambda] * groups
        if len(self.lr_lambdas) != groups:
            raise ValueError(f"LambdaLR got {len(self.lr_lambdas)} functions for {groups} parameter groups")
        super().__init__(optimizer, last_epoch)

    @staticmethod
    def lr_at(step: int, base_lr: float, *, lr_lambda: Callable[[int], float]) -> float:
        """The learning rate of step `step` (from 0)."""
        return base_lr * lr_lambda(step)

    def lrs_at(self, step: int) -> list[float]:
        """The learning rate of every group at step `step`."""
        pairs = zip(self.base_lrs, self.lr_lambdas, strict=True)
        return [self.lr_at(step, base, lr_lambda=function) for base, function in pairs]


class SequentialLR(LRScheduler):
    """schedulers[k] from step milestones[k - 1] on, counting its own steps from there."""

    def __init__(
        self, optimizer: Optimizer, schedulers: Sequence[LRScheduler], milestones: Sequence[int], last_epoch: int = -1
    ):
        self.schedulers, self.milestones = list(schedulers), list(milestones)
        if len(self.schedulers) != len(self.milestones) + 1 or self.milestones != sorted(self.milestones):
            raise ValueError(f"{len(self.schedulers)} schedulers need one ascending milestone less, not {milestones}")
        if any(s.optimizer is not optimizer for s in self.schedulers):
            raise ValueError("all schedulers of a SequentialLR must have its optimizer")
        super().__init__(optimizer, last_epoch)

    def lrs_at(self, step: int) -> list[float]:
        """The learning rate of every group at step `step`."""
        schedule, own = self._at(step)
        return schedule.lrs_at(own)

    def _at(self, step: int) -> tuple[LRScheduler, int]:
        """The schedule in force at `step`, and its own step then."""
        k = bisect_right(self.milestones, step)
        return self.schedulers[k], step - (self.milestones[k - 1] if k else 0)

    def _set(self, step: int) -> None:
        schedule, own = self._at(step)
        schedule._set(own)  # it may set more than lr


class LinearWarmup(SequentialLR):
    """From base_lr * start_factor up to base_lr in `steps` steps, linearly; then `after` from its step 0.

    after: a schedule of the same optimizer, by default the constant lr.

    Goyal et al. 2017 (arXiv:1706.02677), section 2.2: gradual warm-up, for large batches.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        steps: int,
        after: LRScheduler | None = None,
        start_factor: float = 0.1,
        last_epoch: int = -1,
    ):
        _at_least_one(steps=steps)
        warmup = LinearLR(optimizer, start_factor, 1.0, steps)
        super().__init__(optimizer, [warmup, after or LambdaLR(optimizer, lambda step: 1.0)], [steps], last_epoch)


class OneCycleLR(LRScheduler):
    """Up from max_lr / div_factor to max_lr, then down to max_lr / (div_factor * final_div_factor), in total_steps.

    total_steps: or epochs and steps_per_epoch, whose product it is; step it after every batch. pct_start: the share
    of the rise. anneal_strategy: "cos" or "linear". three_phase: come down as long as going up, then to the end.
    max_lr: a number, or a list with one for each group; it takes the place of the optimizer's lr. cycle_momentum:
    momentum (or beta1) moves against lr, from max_momentum to base_momentum and back. After total_steps, ValueError.
    Source: Smith and Topin 2017 (arXiv:1708.07120); the curve is PyTorch's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | Sequence[float],
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        cycle_momentum: bool = True,
        base_momentum: float = 0.85,
        max_momentum: float = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
    ):
        if total_steps is None:
            if epochs is None or steps_per_epoch is None:
                raise ValueError("OneCycleLR needs total_steps, or both epochs and steps_per_epoch")
            _at_least_one(epochs=epochs, steps_per_epoch=steps_per_epoch)
            total_steps = epochs * steps_per_epoch
        _at_least_one(total_steps=total_steps)
        if not 0 <= pct_start <= (0.5 if three_phase else 1):
            raise ValueError(f"pct_start={pct_start} must be in [0, 1], or [0, 0.5] for three phases")
        if anneal_strategy not in ("cos", "linear"):
            raise ValueError(f"anneal_strategy={anneal_strategy!r} must be 'cos' or 'linear'")
        groups = optimizer.param_groups
        peaks = list(max_lr) if isinstance(max_lr, Sequence) else [max_lr] * len(groups)
        if len(peaks) != len(groups):
            raise ValueError(f"OneCycleLR got {len(peaks)} values of max_lr for {len(groups)} parameter groups")
        if cycle_momentum and not {"momentum", "betas"} & set(groups[0]):
            raise ValueError("cycle_momentum=True needs an optimizer with momentum or betas")
        self.max_lrs, self.cycle_momentum = peaks, cycle_momentum
        self.momenta = (max_momentum, base_momentum)
        self.shape: dict[str, Any] = {"total_steps": total_steps, "pct_start": pct_start}
        self.shape.update(anneal_strategy=anneal_strategy, three_phase=three_phase)
        for group, peak in zip(groups, peaks, strict=True):
            group["initial_lr"] = peak / div_factor
        super().__init__(optimizer, last_epoch, div_factor=div_factor, final_div_factor=final_div_factor, **self.shape)

    @staticmethod
    def lr_at(
        step: int,
        max_lr: float,
        *,
        total_steps: int,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
    ) -> float:
        """The learning rate of step `step` (from 0)."""
        levels = (max_lr / div_factor, max_lr, max_lr / div_factor / final_div_factor)
        return _cycle(step, levels, total_steps, pct_start, anneal_strategy, three_phase)

    def momentum_at(self, step: int) -> float:
        """The momentum of step `step` (from 0), the same for every group."""
        high, low = self.momenta
        return _cycle(step, (high, low, high), **self.shape)

    def lrs_at(self, step: int) -> list[float]:
        """The learning rate of every group at step `step`."""
        return [self.lr_at(step, peak, **self.settings) for peak in self.max_lrs]

    def _set(self, step: int) -> None:
        super()._set(step)
        for group in self.optimizer.param_groups if self.cycle_momentum else ():
            momentum = self.momentum_at(step)
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            else:
                group["momentum"] = momentum


def _cycle(
    step: int,
    levels: tuple[float, float, float],
    total_steps: int,
    pct_start: float,
    anneal_strategy: str,
    three_phase: bool,
) -> float:
    """The value at `step` of a curve from levels[0] to levels[1] and on to levels[2] (three phases: by levels[0])."""
    if step > total_steps:
        raise ValueError(f"OneCycleLR was made for {total_steps} steps; this is step {step}")
    first, middle, last = levels
    peak = pct_start * total_steps - 1
    phases = [(peak, first, middle), (total_steps - 1, middle, last)]
    if three_phase:
        phases = [(peak, first, middle), (2 * peak, middle, first), (total_steps - 1, first, last)]
    k = min(bisect_left([end for end, _, _ in phases], step), len(phases) - 1)
    end, a, b = phases[k]
    begin = phases[k - 1][0] if k else 0.0
    share = (step - begin) / (end - begin) if end > begin else 1.0
    if anneal_strategy == "linear":
        return a + (b - a) * share
    return b + (a - b) / 2 * (1 + math.cos(math.pi * share))


def _at_least_one(**lengths: Any) -> None:
    for name, value in lengths.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an int of at least 1")
