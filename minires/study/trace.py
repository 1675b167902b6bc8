"""The walk of one training step, op by op: forward down the page, and beside each op its way back.

Of every op: the shapes, the kernels that ran, what it keeps for backward and how much is kept in all; of its backward
the kernels and the gradients that it made. The formulas stand below, once for every kind of op, with the file and line
of the page that derives them. Memory grows through forward and is given back by backward: the plot shows both.

What to look at: that forward's last line is backward's first; which ops keep nothing at all; that a convolution's
input is kept once, though the op before it keeps it as well; and with `--unfused`, which runs each op by itself, that a
fused op spares passes over memory, but nothing of what is kept.
"""

from __future__ import annotations

import html
import itertools
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .. import nn
from ..engine import Function, Node, Tensor
from ..hooks import TraceHook, TraceRecord
from ..models import create_model
from ..nn import functional as F
from ..random import get_rng_state, manual_seed, set_rng_state
from ..serialization import write_atomically
from ..state import unfused as run_unfused
from .op_pages import OpPage, op_page
from .result import Result, Table, data_url

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """An op, forward and backward. number: from 1, in forward's order. backward: None where no gradient came."""

    number: int
    module: str
    op: str
    page: OpPage
    forward: TraceRecord
    backward: TraceRecord | None


class _Walk(TraceHook):
    """Keeps the Function of every op, too."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: dict[int, type[Function]] = {}

    def forward_pre(self, node: Node, arrays: Sequence[Any]) -> None:
        super().forward_pre(node, arrays)
        self.functions[node.number] = node.fn


@dataclass(repr=False)
class Trace(Result):
    """steps: every op, in forward's order. loss: of the step. input_shape: of the images. parameter_bytes: of the
    weights."""

    name: ClassVar[str] = "trace"
    size: ClassVar[tuple[float, float]] = (10.0, 4.2)
    model: str
    input_shape: Shape
    loss: float
    parameter_bytes: int
    steps: list[Step]

    @property
    def folder(self) -> str:
        """The name of the folder that it is written to."""
        return f"trace-{self.model}"

    @property
    def held_bytes(self) -> np.ndarray:
        """What is kept for backward after each op, forward and then backward."""
        back = sorted((s.backward for s in self.steps if s.backward is not None), key=lambda r: -r.number)
        return np.array([s.forward.held_bytes for s in self.steps] + [r.held_bytes for r in back])

    @property
    def pages(self) -> dict[str, OpPage]:
        """The page of each kind of op, in the order of their first use."""
        return {s.op: s.page for s in self.steps}

    def rows(self) -> list[tuple[str, ...]]:
        """Of each op: number, module and op, forward, bytes; lines within a cell are separated by line breaks."""
        unit, _ = self._unit

        def size(n: int) -> str:
            return "-" if not n else f"{n / unit:.1f}" if n > 0.05 * unit else "<0.1"

        return [
            (
                str(s.number),
                f"{s.module}\n{s.op}",
                f"{_shape(s.forward.inputs[0])} → {_shape(s.forward.outputs[0])}\n{_kernels(s.forward)}",
                size(s.forward.saved_bytes),
                "no gradient needed" if s.backward is None else f"{_gradients(s.backward)}\n{_kernels(s.backward)}",
                "" if s.backward is None else size(s.backward.held_bytes),
            )
            for s in self.steps
        ]

    @property
    def head(self) -> tuple[str, ...]:
        """The names of the columns."""
        _, unit = self._unit
        return "", "module, op", "forward ↓", f"keeps\n{unit}", "backward ↑", f"left\n{unit}"

    @property
    def _unit(self) -> tuple[int, str]:
        return (2**20, "MiB") if self.held_bytes.max() >= 10 * 2**20 else (2**10, "KiB")

    def title(self) -> str:
        """What ran, in one line."""
        return (
            f"{self.model}, one training step on {_shape(self.input_shape)} images: {len(self.steps)} ops, "
            f"{_size(int(self.held_bytes.max()))} kept for backward, {_size(self.parameter_bytes)} of parameters"
        )

    def notes(self) -> str:
        """The formulas of the ops' backwards, and where each op is explained."""
        lines = []
        for page in self.pages.values():
            lines.append(f"{page.op}  {page.where}")
            for formula in page.formulas:
                lines += textwrap.wrap(
                    formula, 80, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False
                )
        return "\n".join(lines)

    def tables(self) -> list[Table]:
        rows: list[tuple[str, ...]] = []
        for cells in [self.head, *self.rows()]:
            rows += itertools.zip_longest(*(cell.split("\n") for cell in cells), fillvalue="")
        return [Table(self.title(), rows[0], rows[1:], (0, 3, 5))]

    def __str__(self) -> str:
        return f"{super().__str__()}\n\nBackward, and the page of each op\n\n{self.notes()}"

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        grid = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False, row_styles=("", "dim"))
        for i, name in enumerate(self.head):
            grid.add_column(name, justify="right" if i in (0, 3, 5) else "left", overflow="fold")
        for row in self.rows():
            grid.add_row(*map(Text, row))
        return Group(Text(self.title()), grid, Text("\nBackward, and the page of each op\n"), Text(self.notes()))

    def draw(self, figure: Any) -> None:
        axes, held, n = figure.subplots(), self.held_bytes / 2**20, len(self.steps)
        axes.fill_between(np.arange(len(held)), held, step="mid", color="0.85")
        axes.step(np.arange(len(held)), held, where="mid", color="0.0", linewidth=1.2)
        axes.axvline(n - 0.5, color="0.0", linestyle="--", linewidth=0.8)
        top = axes.get_ylim()[1] * 1.12
        axes.set(ylim=(0, top), xlim=(0, len(held) - 1))
        axes.text(0.01, 0.97, "forward →", transform=axes.transAxes, va="top")
        axes.text(0.51, 0.97, "backward →", transform=axes.transAxes, va="top")
        places, names = [], []
        for i, step in enumerate(self.steps):
            part = step.module.partition(".")[0]
            if part.startswith("layer") and part not in names:
                places.append(i)
                names.append(part)
        axes.set_xticks([*places, n - 0.5], [*names, "loss"])
        axes.set(title=self.title(), ylabel="kept for backward (MiB)", xlabel="op by op")
        axes.title.set_fontsize(10)
        axes.grid(True, axis="y", color="0.9")

    def to_json(self) -> dict[str, Any]:
        """As every result's, and what is kept after each op, in order of time."""
        return {**super().to_json(), "held_bytes": self.held_bytes.tolist()}

    def save(self, folder: str | Path) -> list[Path]:
        """Write result.json, trace.html and, where matplotlib is installed, trace.png into a folder."""
        files = super().save(folder)
        page = Path(folder) / "trace.html"
        write_atomically(page, lambda beside: beside.write_text(self.to_html(), encoding="utf-8"))
        return [*files, page]

    def to_html(self) -> str:
        """The walk as one page of HTML that needs nothing else."""
        image = self._repr_png_()
        plot = "" if image is None else f'<img alt="bytes kept for backward, op by op" src="{data_url(image)}">'
        rows = []
        for step, row in zip(self.steps, self.rows(), strict=True):
            formulas = html.escape("\n".join(step.page.formulas) or "see its page")
            back = f"<details><summary>{_cell(row[4])}</summary><pre>{formulas}</pre>{step.page.where}</details>"
            cells = [*map(_cell, row[:4]), back, _cell(row[5])]
            rows.append("<tr>" + "".join(f"<td>{text}</td>" for text in cells) + "</tr>")
        head = "".join(f"<th>{_cell(name)}</th>" for name in self.head)
        return _HTML.format(title=html.escape(self.title()), plot=plot, head=head, rows="\n".join(rows))

    def _repr_html_(self) -> str:
        return self.to_html()


_HTML = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; vertical-align: top; padding: .3em .8em; border-bottom: 1px solid #ddd }}
th {{ position: sticky; top: 0; background: #fff }}
td:nth-child(1), td:nth-child(4), td:nth-child(6) {{ text-align: right; white-space: nowrap }}
pre {{ margin: .4em 0; white-space: pre-wrap }}
summary {{ cursor: pointer }}
img {{ max-width: 100% }}
</style>
<h1>{title}</h1>
<p>Read forward down the page and backward up it. A click on a backward shows its formula and where it is derived.</p>
{plot}
<table><thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody></table>
</html>
"""


def trace(
    model: str,
    image_size: int | None = None,
    batch: int = 8,
    unfused: bool = False,
    seed: int = 0,
    on_note: Callable[[str], Any] | None = None,
) -> Trace:
    """Walk through one training step of a network on random images: shapes, kernels, kept bytes, backward's formulas.

    Parameters
    ----------
    model
        Name of the model; 'minires info' lists them.
    image_size
        Height and width of the images in pixels; by default as in the paper.
    batch
        Images in the batch.
    unfused
        Run batch normalisation, addition and ReLU one by one.
    seed
        Seed of the weights and the images.
    """
    if batch < 1 or (image_size is not None and image_size < 1):
        raise ValueError(f"batch={batch} and image_size={image_size} must be at least 1")
    before = get_rng_state()
    manual_seed(seed)
    network = create_model(model)
    set_rng_state(before)
    side, rng = image_size or network.image_size, np.random.default_rng(seed)
    images = rng.standard_normal((batch, 3, side, side)).astype(np.float32)
    labels = rng.integers(0, network.fc.out_features, batch)
    if not unfused:
        return walk(network, images, labels, model)
    with run_unfused():
        return walk(network, images, labels, model)


def walk(model: nn.Module, images: np.ndarray, labels: np.ndarray, name: str = "") -> Trace:
    """The walk of any network's training step: its cross-entropy with the labels, and backward."""
    model.zero_grad()
    with _Walk() as hook:
        loss = F.cross_entropy(model(Tensor(images)), Tensor(labels))
        loss.backward()
    back = {r.number: r for r in hook.records if r.direction == "backward"}
    forward = [r for r in hook.records if r.direction == "forward"]
    pages = {fn: op_page(fn) for fn in set(hook.functions.values())}
    steps = [
        Step(i, r.module or "loss", r.op, pages[hook.functions[r.number]], r, back.get(r.number))
        for i, r in enumerate(forward, 1)
    ]
    size = sum(p.array.nbytes for p in model.parameters())
    return Trace(name or type(model).__name__, images.shape, float(loss.array), size, steps)


def _shape(shape: Shape | None) -> str:
    return "-" if shape is None else "×".join(map(str, shape)) or "()"


def _kernels(record: TraceRecord) -> str:
    return "\n".join(record.kernels) or "no kernel"


def _gradients(record: TraceRecord) -> str:
    """The first gradient that an op's backward made, and how many more; each has the shape of its input."""
    made = [_shape(s) for s in record.outputs if s is not None]
    return made[0] if len(made) == 1 else f"{made[0]} + {len(made) - 1} more"


def _cell(text: str) -> str:
    """Text in HTML."""
    return html.escape(text).replace("\n", "<br>")


def _size(n: int) -> str:
    """Bytes in a unit that suits them."""
    return f"{n / 2**20:.1f} MiB" if n >= 2**20 else f"{n / 2**10:.1f} KiB"
