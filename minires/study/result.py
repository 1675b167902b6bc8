"""What an experiment hands back: numbers as arrays, a text to read, a plot, and the literature beside it.

found = minires.study.shatter(seeds=3)
print(found)                # tables, then what was published beside what was measured
found.plot()                # a matplotlib figure; in a notebook `found` alone shows text and plot
found.save("runs/shatter")  # result.json, shatter.png
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..hooks.base import table
from ..serialization import write_atomically

WIDTH = 100  # columns of text

# Lines that can be told apart in grey: by dashes and markers first, by shade second.
LINES: tuple[dict[str, Any], ...] = (
    {"color": "0.0", "linestyle": "-", "marker": "o"},
    {"color": "0.45", "linestyle": "--", "marker": "s"},
    {"color": "0.0", "linestyle": ":", "marker": "^"},
    {"color": "0.6", "linestyle": "-.", "marker": "D"},
    {"color": "0.25", "linestyle": (0, (5, 1)), "marker": "v"},
    {"color": "0.7", "linestyle": "-", "marker": "x"},
    {"color": "0.0", "linestyle": (0, (1, 1)), "marker": "*"},
    {"color": "0.45", "linestyle": "-", "marker": "+"},
)


@dataclass(frozen=True)
class Finding:
    """A statement of the literature beside what came out here.

    source: paper and place. published: what it says. measured: what was found. agrees: whether the two say the same,
    None where they cannot be compared. why: what explains the difference, as far as the measurement tells.
    """

    source: str
    published: str
    measured: str
    agrees: bool | None
    why: str = ""

    def __str__(self) -> str:
        verdict = {True: "agrees", False: "differs", None: "not comparable"}[self.agrees]
        rows = [("published", self.published), ("measured", self.measured), (verdict, self.why)]
        lines = [self.source]
        for name, text in rows:
            head = f"  {name:<14} "
            lines += textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head)) or [
                head.rstrip()
            ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; the columns numbered in `right` are set flush right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[int] = ()

    def __str__(self) -> str:
        title = textwrap.fill(self.title, WIDTH, subsequent_indent="  ")
        return f"{title}\n\n{textwrap.indent(table(self.head, self.rows, self.right), '  ')}"


class Result:
    """Base of the results: a dataclass whose fields are settings, names and arrays. A subclass says the rest."""

    name: ClassVar[str]  # of the experiment
    size: ClassVar[tuple[float, float]] = (9.0, 4.0)  # of the plot, in inches

    @property
    def folder(self) -> str:
        """The name of the folder that it is written to."""
        return self.name

    def tables(self) -> list[Table]:
        """The measured numbers, to read."""
        raise NotImplementedError

    def findings(self) -> list[Finding]:
        """The literature beside them."""
        return []

    def draw(self, figure: Any) -> None:
        """Draw the plot into an empty matplotlib figure."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: print it, .plot() it, .save(folder) it>"

    def __str__(self) -> str:
        parts = [str(t) for t in self.tables()]
        if found := self.findings():
            parts.append("What was published, and what came out here\n\n" + "\n\n".join(map(str, found)))
        return "\n\n".join(parts)

    def plot(self) -> Any:
        """The plot as a matplotlib Figure. RuntimeError where matplotlib is not installed."""
        if (kind := _figure_class()) is None:
            raise RuntimeError("a plot needs matplotlib: pip install 'minires[demo]'")
        figure = kind(figsize=self.size, layout="constrained")
        self.draw(figure)
        return figure

    def png(self) -> bytes:
        """The plot as a PNG file. RuntimeError where matplotlib is not installed."""
        file = io.BytesIO()
        self.plot().savefig(file, format="png", dpi=120)
        return file.getvalue()

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON can hold it; what is not a finite number is None."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]
        return {"experiment": self.name, **plain(fields), "findings": plain(self.findings())}

    def save(self, folder: str | Path) -> list[Path]:
        """Write result.json and, where matplotlib is installed, NAME.png into a folder; the files that were written."""
        from ..train.state import threads, versions

        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        files = [where / "result.json"]
        text = json.dumps({**self.to_json(), "versions": versions(), "threads": threads()}, indent=1) + "\n"
        write_atomically(files[0], lambda beside: beside.write_text(text, encoding="utf-8"))
        if (image := self._repr_png_()) is not None:
            files.append(where / f"{self.name}.png")
            write_atomically(files[1], lambda beside: beside.write_bytes(image))
        return files

    def _repr_png_(self) -> bytes | None:
        return None if _figure_class() is None else self.png()  # without matplotlib there is the text

    def _repr_html_(self) -> str:
        image = self._repr_png_()
        plot = "" if image is None else f'<img alt="{self.name}" src="{data_url(image)}">'
        return f"<pre>{html.escape(str(self))}</pre>{plot}"


def _figure_class() -> Any:
    """matplotlib's Figure, None where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure


def data_url(png: bytes) -> str:
    """A PNG file as the address of an image within an HTML page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def plain(value: Any) -> Any:
    """Arrays, dataclasses and NumPy's numbers as lists, dicts and numbers; None for what is not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(x: float) -> str:
    """A number in a few digits: 0.0123, 4.4, 36, 7.7e+03."""
    if not math.isfinite(x):
        return "not finite"
    return f"{x:.2g}" if abs(x) < 9.95 or abs(x) >= 999.5 else f"{x:.0f}"


def listed(words: Sequence[str]) -> str:
    """Words in a sentence: a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
