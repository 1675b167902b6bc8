"""The learning rate of every step, as the recipe's `schedule` says."""

from __future__ import annotations

from ..optim import Optimizer
from ..optim.lr_scheduler import CosineAnnealingLR, LinearWarmup, LRScheduler, MultiStepLR, OneCycleLR
from .recipe import Recipe


def make_schedule(recipe: Recipe, optimizer: Optimizer, steps: int) -> LRScheduler:
    """The recipe's schedule over a run of so many steps: a function of the step, to be stepped after each."""
    warmup = round(recipe.warmup * steps)
    if recipe.schedule == "one_cycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, peaks, steps, pct_start=warmup / steps, cycle_momentum=False)
    if recipe.schedule == "cosine":
        after: LRScheduler = CosineAnnealingLR(optimizer, max(1, steps - warmup))
    else:
        after = MultiStepLR(optimizer, [round(share * steps) - warmup for share in recipe.milestones])
    return LinearWarmup(optimizer, warmup, after) if warmup else after
