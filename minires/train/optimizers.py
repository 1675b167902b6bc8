"""The optimizer of a recipe."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .. import optim
from ..nn import Module
from .recipe import Recipe
from .stages import lr_factors, stages_of


def make_optimizer(recipe: Recipe, model: Module, pulled: Collection[str] = ()) -> optim.Optimizer:
    """The recipe's optimizer over the model's parameters, also those that are frozen for now.

    Vectors are batch normalisation's weights and all biases. With `decay_norm` false they have a group of their own,
    without weight decay; under LARS also without scaling, as its paper has it. Stages with another learning rate than
    `lr` have groups of their own (`lr_factors`). pulled: names of the parameters that L2-SP pulls to where they
    began, in place of weight decay, which pulls to zero.
    """
    kinds = {"sgd": optim.SGD, "adamw": optim.AdamW, "lars": optim.LARS}
    settings: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if recipe.optimizer != "adamw":
        settings["momentum"] = recipe.momentum
    if recipe.optimizer == "sgd":
        settings["nesterov"] = recipe.nesterov
    if recipe.cuda_graphs and recipe.optimizer != "lars":
        settings["capturable"] = True
    factors = lr_factors(recipe, model)
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for stage, modules in stages_of(model).items():
        for prefix, module in modules.items():
            for name, p in module.named_parameters(prefix):
                vector = p.ndim == 1 and not recipe.decay_norm
                key = (factors[stage], vector, name in pulled)
                group = groups.setdefault(key, {"params": [], "lr": recipe.lr * factors[stage]})
                group["params"].append(p)
                if vector or name in pulled:
                    group["weight_decay"] = 0.0
                if vector and recipe.optimizer == "lars":
                    group["trust"] = None
    return kinds[recipe.optimizer](groups.values(), **settings)
