"""How a run shows itself: a progress bar on a terminal, a line per epoch on a pipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..train.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from ..train import Epoch, Step


class LineDisplay:
    """A line per epoch."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def __enter__(self):
        recipe = self.recipe
        self.note(f"{recipe.model} on {recipe.dataset}, {recipe.epochs} epochs, seed {recipe.seed}")
        if recipe.device == "cpu" and not compiled():
            self.note("compiling CPU kernels (once; about 20 s)")
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def note(self, text: str) -> None:
        """Show a line."""
        print(text, flush=True)

    def step(self, step: Step) -> None:
        """A step is done."""

    def epoch(self, epoch: Epoch) -> None:
        """An epoch is done."""
        test = ""
        if epoch.test_loss is not None and epoch.test_accuracy is not None:
            test = f"{_judged(self.recipe)} loss {epoch.test_loss:.4f}  accuracy {epoch.test_accuracy:.2%}  "
        self.note(
            f"epoch {epoch.epoch}/{self.recipe.epochs}  "
            f"train loss {epoch.train_loss:.4f}  accuracy {epoch.train_accuracy:.2%}  {test}"
            f"{epoch.images_per_second:,.0f} images/s  {epoch.seconds:.1f} s"
        )


class BarDisplay(LineDisplay):
    """A progress bar with loss, accuracy, images/s and the time left. It vanishes at the end."""

    def __init__(self, recipe: Recipe, console: Console | None = None):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__(recipe)
        self.started = False
        text = "{task.fields[loss]}  {task.fields[train]}  {task.fields[test]}  {task.fields[speed]}"
        columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn(text), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, transient=True)
        self.task = self.progress.add_task(
            f"epoch 1/{recipe.epochs}", start=False, total=None, loss="", train="", test="", speed=""
        )

    def __enter__(self):
        self.progress.start()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def note(self, text: str) -> None:
        """Show a line above the bar."""
        self.progress.console.print(text, highlight=False, markup=False)

    def step(self, step: Step) -> None:
        """A step is done."""
        if not self.started:  # the clock of the time left starts after compilation
            self.started = True
            self.progress.start_task(self.task)
            self.progress.update(self.task, total=step.steps - step.step)
            return
        self.progress.update(
            self.task,
            advance=1,
            description=f"epoch {step.epoch}/{self.recipe.epochs}",
            loss=f"loss {step.loss:.3f}",
            train=f"train {step.accuracy:.1%}",
            speed=f"{step.images_per_second:,.0f} images/s",
        )

    def epoch(self, epoch: Epoch) -> None:
        """An epoch is done."""
        if epoch.test_accuracy is not None:
            self.progress.update(self.task, test=f"{_judged(self.recipe)} {epoch.test_accuracy:.1%}")


def _judged(recipe: Recipe) -> str:
    """What the held-out images of an epoch are called."""
    return "val" if recipe.val else "test"


def make_display(recipe: Recipe) -> LineDisplay:
    """A bar on a terminal, lines elsewhere."""
    return (BarDisplay if sys.stdout.isatty() else LineDisplay)(recipe)


def compiled() -> bool:
    """Whether some CPU kernels of this very source were compiled before."""
    from minires.kernels.cpu.jit import cache_folder  # pyright: ignore[reportMissingImports]

    folder = cache_folder()
    return folder is not None and any(Path(folder).rglob("*.nbi"))
