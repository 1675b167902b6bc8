"""With which weights a run begins: newly drawn ones, or pretrained ones with a head for the classes at hand.

What a run began with is kept in its folder, so that it can be resumed, and L2-SP knows where to pull to, when the file
that it came from is gone:

    start.safetensors       a checkpoint (`checkpoint.py`) of the weights that were taken over, without a new head
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine import Tensor
from ..models import create_model
from ..models.weights import options_of
from ..random import manual_seed
from .checkpoint import read_checkpoint, write_checkpoint
from .pretrained import open_pretrained
from .recipe import Recipe

_FILE = "start.safetensors"
_HEAD = "fc."


@dataclass
class Start:
    """taken: the pretrained Tensors that the run began with, by name. said: lines about them for people."""

    taken: Mapping[str, Tensor] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Keep it in the folder of a new run."""
        if self.taken:
            write_checkpoint(folder / _FILE, {k: t.array for k, t in self.taken.items()}, {"said": self.said})

    @classmethod
    def of(cls, folder: Path) -> Start | None:
        """What a run that is resumed began with; None where nothing was kept."""
        if not (folder / _FILE).is_file():
            return None
        arrays, rest = read_checkpoint(folder / _FILE)
        return cls({name: Tensor(array) for name, array in arrays.items()}, rest["said"])


def new_model(recipe: Recipe, classes: Sequence[str], channels: int, folder: Path | None = None) -> tuple[Any, Start]:
    """The model of a run before its first step, and where its weights come from.

    folder: of a run that is resumed. Raises ValueError or OSError in one line for weights that do not fit.
    """
    start = Start()
    if recipe.weights:
        start = (folder and Start.of(folder)) or _taken_over(recipe, classes, channels)
    options: dict[str, Any] = {"stem": recipe.stem} if recipe.stem else {}
    if start.taken:
        options = {k: v for k, v in options_of(start.taken).items() if k in ("stem", "shortcut")}
    if recipe.checkpoint_blocks:
        options["checkpoint_blocks"] = True
    manual_seed(recipe.seed)
    model = create_model(recipe.model, len(classes), channels, **options)
    if start.taken:
        model.load_state_dict(start.taken, strict=False)  # all but a new head
    return model, start


def _taken_over(recipe: Recipe, classes: Sequence[str], channels: int) -> Start:
    found = open_pretrained(recipe.weights)
    if found.channels != channels:
        raise ValueError(
            f"{found.source} are for images of {found.channels} channels, {recipe.dataset!r} has {channels}"
        )
    state = found.build(recipe.model).state_dict()
    if recipe.head == "keep" and found.outputs != len(classes):
        raise ValueError(
            f"head='keep' does not go: {found.source} tell {found.outputs} classes apart, and {recipe.dataset!r} has "
            f"{len(classes)}"
        )
    keep = recipe.head != "new" and not recipe.probe and found.outputs == len(classes)
    names = ", ".join(classes) if len(classes) <= 12 else f"{', '.join(classes[:11])}, ..."
    if keep:
        head = f"kept, {len(classes)} classes as in the weights"
        if found.classes and found.classes != tuple(classes):
            head += f", but theirs have other names ({', '.join(found.classes[:3])}, ...): --head new draws a new one"
    else:
        state = {name: value for name, value in state.items() if not name.startswith(_HEAD)}
        head = f"new, {len(classes)} classes ({names}); the weights had {found.outputs}"
    copies = {name: Tensor(value.array.copy()) for name, value in state.items()}
    return Start(copies, [f"weights: {found.source}", f"head: {head}"])
