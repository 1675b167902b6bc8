"""curves.png: loss and accuracy over the epochs. Told apart by dashes and markers, so that it reads in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..serialization import write_atomically
from .metrics import Epoch


def draw_curves(path: Path, epochs: Sequence[Epoch], title: str) -> bool:
    """Draw the curves; False where matplotlib, which draws them, is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title)
    loss, accuracy = figure.subplots(1, 2)
    number = [e.epoch for e in epochs]
    every = max(1, len(epochs) // 12)
    both: dict[str, Any] = {"markersize": 4, "markevery": every}
    train = {"label": "training", "color": "0.45", "linestyle": "--", "marker": "o", **both}
    test = {"label": "held out", "color": "0.0", "linestyle": "-", "marker": "s", **both}
    loss.plot(number, [e.train_loss for e in epochs], **train)
    judged = [(e.epoch, e.test_loss, 100 * (e.test_accuracy or 0)) for e in epochs if e.test_loss is not None]
    judged_at, test_loss, test_accuracy = zip(*judged, strict=True) if judged else ((), (), ())
    loss.plot(judged_at, test_loss, **test)
    loss.set(ylabel="cross-entropy (nats per image, log scale)", yscale="log")
    accuracy.plot(number, [100 * e.train_accuracy for e in epochs], **train)
    accuracy.plot(judged_at, test_accuracy, **test)
    accuracy.set(ylabel="accuracy (% of images)")
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch (passes over the training images)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, color="0.88")
        axes.legend()
    write_atomically(path, lambda beside: canvas.print_png(beside))
    return True
