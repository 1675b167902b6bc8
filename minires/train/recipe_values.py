"""Values of recipes: checked against their fields' types, with errors that name the field; and written as TOML."""

from __future__ import annotations

import json
import math
import types
import typing
from typing import Any, Literal


def typed(name: str, value: Any, kind: Any) -> Any:
    """The value as its field's type, where that changes nothing; else TypeError or ValueError naming the field."""
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, typing.get_args(kind)))}")
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{name}={value!r} must be a list of numbers")
        return tuple(typed(name, item, float) for item in value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise TypeError(f"{name}={value!r} must be {_words(kind)}, not {_words(type(value))}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite")
    return value


def toml(value: Any) -> str:
    """A value in TOML: bool, int, float and str are written as in JSON."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _words(kind: type | types.GenericAlias) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(kind, str(kind))  # type: ignore
