"""`minires train`: the flags are the recipe's fields. `--resume RUN` goes on with a run that was stopped."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ..train.recipe import FLAGS, Recipe, load_recipe
from .values import whole

_KINDS = typing.get_type_hints(Recipe)
_ALIASES = {"dataset": ("--dataset", "--data")}


def _flag(field: dataclasses.Field) -> tuple[str, Any, Any]:
    """A field of the recipe as a flag that is None unless given, so that the recipe file decides it."""
    about = Parameter(
        name=_ALIASES.get(field.name),
        help=field.metadata["help"],
        negative_iterable=(),
        consume_multiple=True,
        converter=whole if _KINDS[field.name] is int else None,
    )
    return field.name, Annotated[_KINDS[field.name] | None, about], dataclasses.field(default=None)


Flags = dataclasses.make_dataclass(
    "Flags",
    [_flag(field) for field in FLAGS],
    namespace={"__module__": __name__},  # else it is taken for a class of the standard library
)
_NONE_GIVEN = Flags()


def train(
    *,
    recipe: str | None = None,
    resume: str | None = None,
    extend: bool = False,
    flags: Annotated[Flags, Parameter(name="*")] = _NONE_GIVEN,  # type: ignore
) -> int:
    """Train a network on images, and write a run folder.

    Without flags: ResNet-20 on handwritten digits, in about a minute. Ctrl-C finishes the step and saves; a second one
    stops at once.

    Parameters
    ----------
    recipe
        Name of a shipped recipe, or a TOML file; flags go before what it says. By default digits.
    resume
        Go on with the run in this folder, to the same weights as without the break.
    extend
        With --resume: take another --epochs or --steps than the run's.
    """
    given = {name: value for name, value in dataclasses.asdict(flags).items() if value is not None}
    if resume is None and extend:
        raise ValueError("--extend goes with --resume RUN: a new run takes --epochs as it is")
    if resume is not None and recipe is not None:
        raise ValueError(f"--recipe {recipe} does not go with --resume: a run goes on with its own recipe")
    chosen = load_recipe(recipe or "digits", given) if resume is None else _resumed(resume, given, extend)
    from ..train import loop
    from .display import make_display

    with make_display(chosen) as display:
        watch: dict[str, Any] = {"on_step": display.step, "on_epoch": display.epoch, "on_note": display.note}
        summary = loop.train(chosen, **watch) if resume is None else loop.resume(resume, given, extend, **watch)
    print(last_line(summary))
    return 0


def _resumed(path: str, given: dict[str, Any], extend: bool) -> Recipe:
    from ..train.state import resumed_recipe

    return resumed_recipe(Path(path), given, extend)


def last_line(summary: Any) -> str:
    """What a run ends with: its result, and where it lies."""
    right = round(summary.test_accuracy * summary.test_images)
    share = f"{summary.test_accuracy:.2%} ({right} of {summary.test_images} images)"
    return f"test accuracy {share}; {summary.seconds:.0f} s; run folder {summary.folder}"
