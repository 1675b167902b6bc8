"""Fine-tuning: training that begins with pretrained weights.

    from minires.train.finetune import finetune

    summary = finetune("resnet18.pth", model="resnet18", dataset="folder", data_dir="photos", epochs=5)
    print(summary.test_accuracy, summary.folder)

It is `train` with a recipe that has `weights`; what the weights say about themselves (model, image size, normalisation)
goes into the recipe, so the run folder remembers it. `stages.py` tells what is frozen, `start.py` what becomes of the
head, `penalties.py` what holds weights near their start, `probe.py` how a linear head alone is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .pretrained import normalization, open_pretrained
from .recipe import Recipe, load_recipe, stated


def finetune(
    weights: str,
    recipe: str = "finetune",
    *,
    on_step: Callable[..., Any] | None = None,
    on_epoch: Callable[..., Any] | None = None,
    on_note: Callable[[str], Any] | None = None,
    **changes: Any,
) -> Any:
    """Begin with pretrained weights and train on other images; returns the run's `Summary`.

    weights: a run folder, a file (.safetensors, .pth, .pt, .th, .bin), or the name of published weights. recipe: name
    of a shipped recipe, or a TOML file. changes: fields of the recipe (`Recipe`): dataset, data_dir, epochs,
    freeze_until and so on. on_step, on_epoch, on_note: as `train` takes them. Raises as `train` does, and ValueError or
    OSError in one line for weights that cannot be read or do not fit.
    """
    from .loop import train

    note = on_note or (lambda text: None)
    return train(finetune_recipe(weights, recipe, changes, note), on_step, on_epoch, on_note)


def finetune_recipe(
    weights: str, recipe: str = "finetune", changes: Mapping[str, Any] | None = None, note: Any = lambda text: None
) -> Recipe:
    """The recipe of a fine-tuning run: what `changes` and the recipe's file leave open is as the weights say.

    With `val`, the run ends with the weights of its best epoch, unless told otherwise. note: called with a line where
    something is taken for granted. Raises as `finetune` does.
    """
    given = {**(changes or {}), "weights": weights}
    decided = {**stated(recipe), **given}
    found = open_pretrained(weights)
    says: dict[str, Any] = {"model": found.model, "image_size": found.image_size}
    says["mean"], says["std"] = normalization(found, decided.get("mean", ()), decided.get("std", ()), note)
    name = decided.get("model") or found.model
    if not name:
        raise ValueError(f"whose weights are {found.source}? Name the model (--model resnet18)")
    if not found.image_size:
        says["image_size"] = found.build(name).image_size
    if decided.get("val") and "final" not in decided:
        says["final"] = "best"
    if decided.get("probe"):
        given |= {"epochs": 1, "shift": 0, "flip": False, "cutout": 0, "mixup": 0.0}  # each image is seen once
        given.setdefault("weight_decay", 1e-3)
    return load_recipe(recipe, {**{k: v for k, v in says.items() if v and k not in decided}, **given})
