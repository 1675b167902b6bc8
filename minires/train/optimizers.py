"""The optimizer of a recipe."""

from __future__ import annotations

from typing import Any

from .. import optim
from ..nn import Module
from .recipe import Recipe


def make_optimizer(recipe: Recipe, model: Module) -> optim.Optimizer:
    """The recipe's optimizer over the model's parameters.

    Vectors are batch normalisation's weights and all biases. With `decay_norm` false they have a group of their own,
    without weight decay; under LARS also without scaling, as its paper has it.
    """
    kinds = {"sgd": optim.SGD, "adamw": optim.AdamW, "lars": optim.LARS}
    settings: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if recipe.optimizer != "adamw":
        settings["momentum"] = recipe.momentum
    if recipe.optimizer == "sgd":
        settings["nesterov"] = recipe.nesterov
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if not recipe.decay_norm:
        vectors: dict[str, Any] = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
        if recipe.optimizer == "lars":
            vectors["trust"] = None
        groups = [{"params": [p for p in model.parameters() if p.ndim != 1]}, vectors]
    return kinds[recipe.optimizer](groups, **settings)
