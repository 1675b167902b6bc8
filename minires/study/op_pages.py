"""Where an op is explained, and the formula of its backward, read from the docstring of its page in `minires/ops`.

A page lists its formulas indented, y first and the gradients after it. Where it explains several ops, each line begins
with the name of its op:

    relu       y = max(x, 0)               dx = dy where y > 0, else 0

An op of one's own may say it in its class's docstring.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ..engine import Function

_GRADIENT = re.compile(r"(?<![\w.])d[a-z]\w*(\[[^]]*\])?\s* = ")  # dx = , dw[k] = , dgamma =
_NAMED = re.compile(r"    ([a-z]\w*)  +[^=\s]")  # the line's first column is the name of an op
_ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class OpPage:
    """An op: its name, the formulas of its backward (may be none), the file (from the package's folder on) and line."""

    op: str
    formulas: tuple[str, ...]
    file: str
    line: int

    where = property(lambda self: f"{self.file}:{self.line}")


def op_page(fn: type[Function]) -> OpPage:
    """The page of an op. One that was typed in has no file: its module's name stands instead, line 0."""
    try:
        path, line = Path(inspect.getsourcefile(fn) or ""), inspect.getsourcelines(fn)[1]
    except (OSError, TypeError):
        path, line = Path(fn.__module__), 0
    file = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path
    own = tuple(row[m.start() :] for row in (inspect.getdoc(fn) or "").splitlines() if (m := _GRADIENT.search(row)))
    page = getattr(sys.modules.get(fn.__module__), "__doc__", None) or ""
    return OpPage(fn.__name__, own or backward_formulas(page, fn.__name__), file.as_posix(), line)


def backward_formulas(docstring: str, op: str) -> tuple[str, ...]:
    """The lines of a page with gradients: those under the op's name if there are such, else those under no name."""
    found: dict[str, list[str]] = {}
    name, going = "", False
    for line in docstring.splitlines():
        if not line.startswith("    "):
            name, going = "", False
            continue
        named, gradient = _NAMED.match(line), _GRADIENT.search(line)
        if named:
            name = named[1].replace("_", "")
        if gradient:
            found.setdefault(name, []).append(re.sub(r"\s{2,}", "    ", line[gradient.start() :]))
        elif going and line.lstrip().startswith("= "):
            found[name][-1] += " " + line.strip()
        going = gradient is not None or (going and line.lstrip().startswith("= "))
    return tuple(found.get(op.lower(), found.get("", [])))
