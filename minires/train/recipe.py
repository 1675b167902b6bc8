"""A recipe: all that decides how a training run goes. One dataclass = a TOML file = the flags of `minires train`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SHIPPED = Path(__file__).parent / "recipes"


def _field(default: Any, says: str, valid: Callable[[Any], bool] | None = None, must: str = "") -> Any:
    """A field, its line of help, and what its values must be."""
    return dataclasses.field(default=default, metadata={"help": says, "valid": valid, "must": must})


def _at_least(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda v: v >= least, f"be at least {least}"


_POSITIVE = (lambda v: v > 0, "be above 0")
_NOT_NEGATIVE = (lambda v: v >= 0, "not be negative")
_FRACTION = (lambda v: 0 <= v < 1, "be from 0 to below 1")


@dataclass(frozen=True)
class Recipe:
    """How to train. Raises ValueError or TypeError naming the field for a value that cannot be.

    The schedule sets the learning rate of every step. Over the share `warmup` of the run it climbs to `lr`, then:
    "one_cycle" (which climbs along a cosine too) falls along a cosine to almost 0 (Smith & Topin 2017), "cosine" falls
    along a cosine to 0, "multistep" is divided by 10 after each of `milestones` (He et al. 2015, section 4.2).
    """

    model: str = _field("resnet20", "name of the model; 'minires info' lists them")
    dataset: str = _field("digits", "'digits', or a folder that has train/CLASS/*.png and test/CLASS/*.png (or val/)")
    image_size: int = _field(16, "height and width that images are resized to, in pixels", *_at_least(1))
    epochs: int = _field(20, "passes over the training images", *_at_least(1))
    batch_size: int = _field(64, "images per step", *_at_least(1))
    lr: float = _field(0.1, "highest learning rate", *_POSITIVE)
    momentum: float = _field(0.9, "momentum of SGD", *_FRACTION)
    nesterov: bool = _field(True, "Nesterov's form of momentum")
    weight_decay: float = _field(5e-4, "L2 penalty on all parameters", *_NOT_NEGATIVE)
    schedule: Literal["one_cycle", "cosine", "multistep"] = _field("one_cycle", "how the learning rate moves")
    warmup: float = _field(0.0, "share of the run in which the learning rate climbs to its highest", *_FRACTION)
    milestones: tuple[float, ...] = _field((0.5, 0.75), "multistep: shares of the run after which lr is divided by 10")
    label_smoothing: float = _field(0.0, "share of each target spread over all classes", *_FRACTION)
    shift: int = _field(0, "shift training images at random by up to this many pixels", *_NOT_NEGATIVE)
    flip: bool = _field(False, "mirror half of the training images left to right (folders only)")
    seed: int = _field(0, "seed of initial weights, order and augmentation", *_NOT_NEGATIVE)
    device: str = _field("cpu", "'cpu', 'cuda' or 'cuda:N'")
    threads: int = _field(0, "CPU threads of the kernels; 0: all", *_NOT_NEGATIVE)
    workers: int = _field(0, "threads that load images ahead of time", *_NOT_NEGATIVE)
    out: str = _field("", "run folder, new or empty; by default runs/NAME-DATE-TIME")
    name: str = _field("custom", "name of the recipe")

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(Recipe)
        for field in dataclasses.fields(self):
            value = _typed(field.name, getattr(self, field.name), kinds[field.name])
            object.__setattr__(self, field.name, value)  # ints given for floats, lists given for tuples
            valid = field.metadata["valid"]
            if valid is not None and not valid(value):
                raise ValueError(f"{field.name}={value!r} must {field.metadata['must']}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=True needs momentum above 0; set nesterov to false")
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m < 1 for m in self.milestones):
            raise ValueError(f"milestones={self.milestones} must be rising fractions between 0 and 1")

    def to_toml(self) -> str:
        """The recipe as a TOML file that `load_recipe` reads back; without `out`: another run, another folder."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name != "out"}
        return "".join(f"{name} = {_toml(value)}\n" for name, value in fields.items())


def load_recipe(name_or_path: str = "digits", overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A shipped recipe by its name, or a TOML file by its path; `overrides` replace single fields.

    Raises ValueError, TypeError or FileNotFoundError in one line that names the file and the key.
    """
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise FileNotFoundError(
            f"no recipe {name_or_path!r}: it is neither a shipped one ({', '.join(shipped)}) nor a TOML file"
        )
    where = path.name if name_or_path in shipped else name_or_path
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not a TOML file: {error}") from error
    known = [field.name for field in dataclasses.fields(Recipe)]
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    fields = {"name": path.stem, **table}
    if not overrides:
        return _named(where, fields)
    try:  # a field that needs another one changed too (nesterov, momentum) is judged with all in place
        return Recipe(**{**fields, **overrides})
    except (ValueError, TypeError):
        _named(where, fields)  # blames the file, if it is wrong by itself
        raise


def _named(where: str, fields: dict[str, Any]) -> Recipe:
    try:
        return Recipe(**fields)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from error


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value as its field's type, where that changes nothing; else TypeError or ValueError naming the field."""
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, typing.get_args(kind)))}")
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{name}={value!r} must be a list of numbers")
        return tuple(_typed(name, item, float) for item in value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise TypeError(f"{name}={value!r} must be {_words(kind)}, not {_words(type(value))}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite")
    return value


def _words(kind: type | types.GenericAlias) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(kind, str(kind))  # type: ignore


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # bool, int, float and str are written alike in TOML and JSON
