"""What a recipe's `precision` means: the region that its forward passes run in, and the scaler of its losses."""

from __future__ import annotations

from ..amp import GradScaler, autocast
from ..device import device
from .recipe import Recipe


def region(recipe: Recipe) -> autocast:
    """Where the model computes: for "fp32" a region that casts nothing."""
    kind = device(recipe.device).type
    if recipe.precision == "bf16":
        from ml_dtypes import bfloat16

        return autocast(kind, bfloat16)
    return autocast(kind, "float16", enabled=recipe.precision == "fp16")


def scaler(recipe: Recipe) -> GradScaler:
    """Scales losses where gradients are float16."""
    return GradScaler(recipe.device, enabled=recipe.precision == "fp16")
