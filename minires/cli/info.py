"""`minires info`: a network's layers and what they cost."""

from __future__ import annotations

from .values import Whole


def info(model: str | None = None, /, *, image_size: Whole | None = None, batch: Whole = 1) -> None:
    """List a network's layers: output shape, parameters, multiply-adds, bytes saved for backward.

    Parameters
    ----------
    model
        Name of the model; without it, the names of all models are listed.
    image_size
        Height and width of its images in pixels; by default as in the paper.
    batch
        Images per batch.
    """
    from rich.console import Console
    from rich.table import Table

    from .. import models

    if model is None:
        print("\n".join(models.list_models()))
        return
    described = models.describe(model, image_size, batch)
    header, *rows, total = described.table()
    shape = " × ".join(map(str, described.input_shape))
    table = Table(title=f"{described.name}, input {shape}", box=None, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number > 2 else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    table.add_section()
    table.add_row(*total, style="bold")
    console = Console()
    if not console.is_terminal:  # a pipe has no width: cut nothing off
        console = Console(width=200)
    console.print(table)
