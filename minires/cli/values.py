"""How the words of the command line become values, where cyclopts is more lenient than is good: it rounds 2.5 to 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter


def whole(kind: Any, tokens: Sequence[Any]) -> int:
    """A whole number in decimal digits; ValueError for anything else."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f'"{tokens[0].value}" is not a whole number') from None


def times(kind: Any, tokens: Sequence[Any]) -> float:
    """A multiple, written "10x"; ValueError for anything else, also for a bare number, which could mean a rate."""
    text = tokens[0].value
    try:
        if text[-1:] in ("x", "×"):
            return float(text[:-1])
    except ValueError:
        pass
    raise ValueError(f'"{text}" is not a multiple; write 10x for ten times') from None


Whole = Annotated[int, Parameter(converter=whole)]
