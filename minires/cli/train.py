"""`minires train`: the flags are the recipe's fields. `--resume RUN` goes on with a run that was stopped."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ..train.recipe import FLAGS, Recipe, load_recipe
from .values import times, whole

_KINDS = typing.get_type_hints(Recipe)
_ALIASES = {"dataset": ("--dataset", "--data")}
_CONVERTERS = {"head_lr": times}


def _flag(field: dataclasses.Field) -> tuple[str, Any, Any]:
    """A field of the recipe as a flag that is None unless given, so that the recipe file decides it."""
    group = {"group": field.metadata["group"]} if "group" in field.metadata else {}
    about = Parameter(
        name=_ALIASES.get(field.name),
        help=field.metadata["help"],
        negative_iterable=(),
        consume_multiple=True,
        converter=_CONVERTERS.get(field.name, whole if _KINDS[field.name] is int else None),
        **group,
    )
    return field.name, Annotated[_KINDS[field.name] | None, about], dataclasses.field(default=None)


def flags_of(fields: Iterable[dataclasses.Field]) -> Any:
    """A class with a flag per field, for the command line."""
    return dataclasses.make_dataclass(
        "Flags",
        [_flag(field) for field in fields],
        namespace={"__module__": __name__},  # else it is taken for a class of the standard library
    )


def given_of(flags: Any) -> dict[str, Any]:
    """The fields whose flags were given."""
    return {name: value for name, value in dataclasses.asdict(flags).items() if value is not None}


Flags = flags_of(field for field in FLAGS if "group" not in field.metadata)
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
    given = given_of(flags)
    if resume is None and extend:
        raise ValueError("--extend goes with --resume RUN: a new run takes --epochs as it is")
    if resume is not None and recipe is not None:
        raise ValueError(f"--recipe {recipe} does not go with --resume: a run goes on with its own recipe")
    if resume is not None:
        return go_on(resume, given, extend)
    return begin(load_recipe(recipe or "digits", given))


def begin(recipe: Recipe) -> int:
    """Train as the recipe says, in sight."""
    from ..train import loop
    from .display import make_display

    with make_display(recipe) as display:
        summary = loop.train(recipe, **_watch(display))
    print(last_line(summary))
    return 0


def go_on(resume: str, given: dict[str, Any], extend: bool) -> int:
    """Resume the run in a folder, in sight."""
    recipe = _resumed(resume, given, extend)
    from ..train import loop
    from .display import make_display

    with make_display(recipe) as display:
        summary = loop.resume(resume, given, extend, **_watch(display))
    print(last_line(summary))
    return 0


def _watch(display: Any) -> dict[str, Any]:
    return {"on_step": display.step, "on_epoch": display.epoch, "on_note": display.note}


def _resumed(path: str, given: dict[str, Any], extend: bool) -> Recipe:
    from ..train.state import resumed_recipe

    return resumed_recipe(Path(path), given, extend)


def last_line(summary: Any) -> str:
    """What a run ends with: its result, and where it lies."""
    right = round(summary.test_accuracy * summary.test_images)
    share = f"{summary.test_accuracy:.2%} ({right} of {summary.test_images} images)"
    return f"test accuracy {share}; {summary.seconds:.0f} s; run folder {summary.folder}"
