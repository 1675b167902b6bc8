"""Training by recipe: `train(load_recipe("digits"))`.

What computes is imported on first use, so that `minires --help` is quick.
"""

from typing import TYPE_CHECKING, Any

from .recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from .interrupt import Interrupted
    from .loop import Diverged, Run, evaluate, resume, train
    from .metrics import Epoch, Step, Summary

__all__ = [
    "Diverged",
    "Epoch",
    "Interrupted",
    "Recipe",
    "Run",
    "Step",
    "Summary",
    "evaluate",
    "load_recipe",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import loop, metrics

    return getattr(loop if hasattr(loop, name) else metrics, name)
