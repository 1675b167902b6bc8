"""What an evaluation looks like: the confusion matrix as a table and a picture, and the worst mistakes.

Pictures need matplotlib; where it is not installed, they are left out.
"""

from __future__ import annotations

import csv
import io
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from ..serialization import write_atomically
from .evaluation import Evaluation

_COLUMNS = 6  # of mistakes


def write_confusion(found: Evaluation, folder: Path) -> list[Path]:
    """Write confusion.csv and, where matplotlib is installed, confusion.png; the files that were written."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["class / taken for", *found.classes])
    table.writerows([name, *row] for name, row in zip(found.classes, found.confusion.tolist(), strict=True))
    files = [folder / "confusion.csv", folder / "confusion.png"]
    write_atomically(files[0], lambda beside: beside.write_bytes(text.getvalue().encode()))
    return files if _draw(found, files[1]) else files[:1]


def _draw(found: Evaluation, path: Path) -> bool:
    """Shares of each class in grey, darker for more; numbers where they can be read."""
    if (canvas_and_figure := _figure()) is None:
        return False
    new_canvas, new_figure = canvas_and_figure
    k = len(found.classes)
    side = min(14.0, 2.5 + 0.45 * k)
    figure = new_figure(figsize=(side, side), layout="constrained")
    canvas, axes = new_canvas(figure), figure.subplots()
    share = found.confusion / np.maximum(1, found.confusion.sum(1, keepdims=True))
    axes.imshow(share, cmap="Greys", vmin=0, vmax=1)
    axes.set(
        title=f"{found.correct} of {found.total} images right ({found.top1:.2%})", xlabel="taken for", ylabel="class"
    )
    if k <= 30:
        axes.set_xticks(range(k), found.classes, rotation=90)
        axes.set_yticks(range(k), found.classes)
        for i, j in zip(*np.nonzero(found.confusion), strict=True):
            shade = "white" if share[i, j] > 0.5 else "black"
            axes.text(j, i, str(found.confusion[i, j]), ha="center", va="center", fontsize=8, color=shade)
    write_atomically(path, lambda beside: canvas.print_png(beside))
    return True


def write_mistakes(found: Evaluation, folder: Path) -> list[Path]:
    """Write mistakes.png, the images of `found.mistakes`; the files that were written."""
    drawn = [m for m in found.mistakes if m.image is not None]
    if not drawn or (canvas_and_figure := _figure()) is None:
        return []
    new_canvas, new_figure = canvas_and_figure
    rows = -(-len(drawn) // _COLUMNS)
    figure = new_figure(figsize=(1.9 * _COLUMNS, 2.4 * rows + 0.5), layout="constrained")
    canvas = new_canvas(figure)
    figure.suptitle(
        f"{len(drawn)} of {found.total - found.correct:,} mistakes: those that the network was most sure of"
    )
    for axes in (grid := figure.subplots(rows, _COLUMNS, squeeze=False).ravel()):
        axes.axis("off")
    for axes, m in zip(grid, drawn, strict=False):
        image: Any = m.image
        axes.imshow(image[:, :, 0] if image.shape[2] == 1 else image, cmap="gray", vmin=0, vmax=255)
        names = [textwrap.shorten(name, 20, placeholder="...") for name in (m.label, m.taken_for)]
        axes.set_title(f"{names[0]}\ntaken for {names[1]}\n{m.sure:.1%} sure", fontsize=9)
    path = folder / "mistakes.png"
    write_atomically(path, lambda beside: canvas.print_png(beside))
    return [path]


def _figure() -> Any:
    """matplotlib's classes (canvas, figure), or None."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return FigureCanvasAgg, Figure
