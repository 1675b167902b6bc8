"""`minires train`: the flags are the recipe's fields."""

from __future__ import annotations

import dataclasses
import typing
from typing import Annotated, Any

from cyclopts import Parameter

from ..train.recipe import Recipe, load_recipe

_KINDS = typing.get_type_hints(Recipe)


def _flag(field: dataclasses.Field) -> tuple[str, Any, Any]:
    """A field of the recipe as a flag that is None unless given, so that the recipe file decides it."""
    about = Parameter(help=field.metadata["help"], negative_iterable=(), consume_multiple=True)
    return field.name, Annotated[_KINDS[field.name] | None, about], dataclasses.field(default=None)


Flags = dataclasses.make_dataclass(
    "Flags",
    [_flag(field) for field in dataclasses.fields(Recipe) if field.name != "name"],
    namespace={"__module__": __name__},  # else it is taken for a class of the standard library
)
_NONE_GIVEN = Flags()


def train(*, recipe: str = "digits", flags: Annotated[Flags, Parameter(name="*")] = _NONE_GIVEN) -> int:  # type: ignore
    """Train a network on images, and write a run folder.

    Without flags: ResNet-20 on handwritten digits, in about two minutes.

    Parameters
    ----------
    recipe
        Name of a shipped recipe, or a TOML file; flags go before what it says.
    """
    given = {name: value for name, value in dataclasses.asdict(flags).items() if value is not None}
    chosen = load_recipe(recipe, given)
    from ..train import loop
    from .display import make_display

    with make_display(chosen) as display:
        summary = loop.train(chosen, on_step=display.step, on_epoch=display.epoch, on_note=display.note)
    print(last_line(summary))
    return 0


def last_line(summary: Any) -> str:
    """What a run ends with: its result, and where it lies."""
    right = round(summary.test_accuracy * summary.test_images)
    share = f"{summary.test_accuracy:.2%} ({right} of {summary.test_images} images)"
    return f"test accuracy {share}; {summary.seconds:.0f} s; run folder {summary.folder}"
