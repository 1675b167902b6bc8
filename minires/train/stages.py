"""The stages of a residual network, from "stem" over "layer1", ... to "head": what fine-tuning freezes and paces.

The lower a stage, the more general its features are, so the less it should move: it may be frozen, thaw later, or have
a smaller learning rate. Batch normalisation has a second way to move: its running statistics, which follow the batches
whether its weights are trained or not. So in a frozen stage it runs in evaluation mode, unless told otherwise.

Source: Yosinski et al. 2014 (arXiv:1411.1792) on how general stages are; Howard & Ruder 2018 (arXiv:1801.06146),
section 3.2, on learning rates by layer and gradual unfreezing.
"""

from __future__ import annotations

from typing import Any

from ..nn import BatchNorm1d, BatchNorm2d, Module
from .recipe import Recipe


def stages_of(model: Any) -> dict[str, dict[str, Module]]:
    """{stage: {module's name: module}} of a ResNet, from input to output; every parameter is in one of them.

    Any other model is one stage, "head".
    """
    if not hasattr(model, "layer_names"):
        return {"head": {"": model}}
    stages: dict[str, dict[str, Module]] = {"stem": {}}
    stages.update({name: {} for name in model.layer_names})
    stages["head"] = {}
    for name, module in model.named_children():
        stage = name if name in stages else "stem" if name in ("conv1", "bn1", "maxpool") else "head"
        stages[stage][name] = module
    return stages


def lr_factors(recipe: Recipe, model: Any) -> dict[str, float]:
    """{stage: its learning rate as a multiple of the recipe's}: head_lr for the head; the stage below it 1, and each
    one below that layer_decay times the one above."""
    names = list(stages_of(model))
    below = {name: recipe.layer_decay**i for i, name in enumerate(reversed(names[:-1]))}
    return {**{name: below[name] for name in names[:-1]}, "head": recipe.head_lr}


class Freezing:
    """Which stages are trained in which epoch, and what batch normalisation does there; all as the recipe says.

    Raises ValueError for a `freeze_until` that is no stage.
    """

    def __init__(self, recipe: Recipe, model: Any):
        self.recipe, self.model, self.stages = recipe, model, stages_of(model)
        if recipe.freeze_until and recipe.freeze_until not in self.stages:
            known = ", ".join(self.stages)
            raise ValueError(f"freeze_until={recipe.freeze_until!r} is not a stage of {recipe.model}; it has {known}")

    def thaws(self) -> dict[str, int]:
        """{stage: the epoch, from 1, from which on it is trained; 0: never}."""
        names, every = list(self.stages), self.recipe.unfreeze_every
        first = names.index(self.recipe.freeze_until or names[0])
        epochs = [1 + every * (len(names) - 1 - i) for i in range(len(names))]
        return {name: epochs[i] if i >= first else 0 for i, name in enumerate(names)}

    def frozen(self, epoch: int) -> list[str]:
        """The stages that are not trained in an epoch (from 1)."""
        return [name for name, thaw in self.thaws().items() if not 0 < thaw <= epoch]

    def norms_in_eval(self, stage: str, frozen: bool) -> bool:
        """Whether batch normalisation in a stage goes by the running statistics."""
        return frozen if self.recipe.bn == "auto" else self.recipe.bn != "train"

    def train(self, epoch: int) -> None:
        """Put the model into training mode for an epoch: frozen parameters want no gradient."""
        self.model.train()
        frozen = self.frozen(epoch)
        for stage, modules in self.stages.items():
            for top in modules.values():
                for module in top.modules():
                    norm = isinstance(module, (BatchNorm1d, BatchNorm2d))
                    learn = stage not in frozen and not (norm and self.recipe.bn == "frozen")
                    for p in module.parameters(recurse=False):
                        p.requires_grad_(learn)
                    if norm and self.norms_in_eval(stage, stage in frozen):
                        module.eval()

    def table(self) -> list[str]:
        """A line per stage: learning rate, parameters, when it is trained, batch normalisation."""
        rows = [("stage", "lr", "parameters", "trained", "batch norm")]
        factors = lr_factors(self.recipe, self.model)
        for (name, thaw), modules in zip(self.thaws().items(), self.stages.values(), strict=True):
            count = sum(p.array.size for module in modules.values() for p in module.parameters())
            norms = any(isinstance(m, (BatchNorm1d, BatchNorm2d)) for top in modules.values() for m in top.modules())
            reached = 0 < thaw <= self.recipe.epochs
            trained = "no" if not reached else "yes" if thaw == 1 else f"from epoch {thaw}"
            modes = [self.norms_in_eval(name, frozen=True)] * (thaw != 1) + [self.norms_in_eval(name, False)] * reached
            words = dict.fromkeys(
                "eval (running statistics)" if fixed else "train (batch statistics)" for fixed in modes
            )
            norm = ", then ".join(words) if norms else "none"
            if norms and self.recipe.bn == "frozen":
                norm += ", weights frozen"
            rows.append((name, f"{self.recipe.lr * factors[name]:.3g}" if reached else "", f"{count:,}", trained, norm))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
