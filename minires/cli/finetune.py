"""`minires finetune`: pretrained weights, trained on for one's own images."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from ..train.recipe import FLAGS
from .train import begin, flags_of, given_of, go_on

Flags: Any = flags_of(sorted(FLAGS, key=lambda field: "group" not in field.metadata))
_NONE_GIVEN = Flags()


def finetune(
    *,
    recipe: str | None = None,
    resume: str | None = None,
    extend: bool = False,
    flags: Annotated[Flags, Parameter(name="*")] = _NONE_GIVEN,  # type: ignore
) -> int:
    """Train pretrained weights on other images, and write a run folder.

    minires finetune --weights resnet18.pth --model resnet18 --data folder --data-dir photos

    Model, image size and normalisation are as the weights say, where they say it (run folders, published weights).

    Parameters
    ----------
    recipe
        Name of a shipped recipe, or a TOML file; flags go before what it says. By default finetune.
    resume
        Go on with the run in this folder, to the same weights as without the break.
    extend
        With --resume: take another --epochs or --steps than the run's.
    """
    given = given_of(flags)
    if resume is not None:
        if recipe is not None:
            raise ValueError(f"--recipe {recipe} does not go with --resume: a run goes on with its own recipe")
        return go_on(resume, given, extend)
    if extend:
        raise ValueError("--extend goes with --resume RUN: a new run takes --epochs as it is")
    if "weights" not in given:
        raise ValueError("--weights says what to begin with: a file, a run folder, or the name of published weights")
    from ..train.finetune import finetune_recipe

    return begin(finetune_recipe(given.pop("weights"), recipe or "finetune", given, note=print))
