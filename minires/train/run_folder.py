"""The folder of a run. A file in it is whole or absent; in records, a line is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path

from ..serialization import write_atomically
from .checkpoint import Checkpoints, sweep
from .metrics import Summary
from .recipe import Recipe, load_recipe


class RunFolder:
    """recipe.toml; checkpoints/; after every epoch metrics.jsonl, metrics.csv and model.safetensors; at the end
    summary.json and curves.png.

    Made by `RunFolder.new(recipe)` or `RunFolder.existing(path)`. While a process holds one, no other can.
    """

    def __init__(self, path: Path, keep: int):
        self.path, self.checkpoints = path, Checkpoints(path / "checkpoints", keep)
        self._lock = _lock(path)

    @classmethod
    def new(cls, recipe: Recipe) -> RunFolder:
        """`recipe.out`, which must be new or empty, else a new folder runs/NAME-DATE-TIME."""
        path = Path(recipe.out) if recipe.out else _unused(f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        if path.is_dir() and any(path.iterdir()):
            raise FileExistsError(f"out={recipe.out!r} is not empty; a run wants a new or an empty folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # a file is there, or nothing may be written
            raise OSError(f"out={str(path)!r}: no folder can be made there ({error.strerror}); give another") from error
        folder = cls(path, recipe.keep)
        try:
            folder.write_recipe(recipe)
        except OSError:  # a full disk
            folder.close()
            with contextlib.suppress(OSError):
                path.rmdir()  # it is empty
            raise
        return folder

    @classmethod
    def existing(cls, path: Path, keep: int) -> RunFolder:
        """The folder of a run that was begun; what killed processes left half written is removed."""
        folder = cls(path, keep)
        sweep(path)
        return folder

    @property
    def summary_path(self) -> Path:
        """Where the summary of a run that is done lies."""
        return self.path / "summary.json"

    def write(self, name: str, text: str) -> None:
        """Write a text file."""
        write_atomically(self.path / name, lambda beside: beside.write_text(text, encoding="utf-8"))

    def write_recipe(self, recipe: Recipe) -> None:
        """Write recipe.toml."""
        self.write("recipe.toml", recipe.to_toml())

    def finish(self, summary: Summary) -> None:
        """Write summary.json."""
        self.write("summary.json", json.dumps(dataclasses.asdict(summary), indent=2, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Let other processes have it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def recipe_of(path: Path) -> Recipe:
    """The recipe of a run folder. FileNotFoundError where it is none."""
    if not (path / "recipe.toml").is_file():
        what = "has no recipe.toml: it is no run folder" if path.is_dir() else "is no folder"
        raise FileNotFoundError(f"{str(path)!r} {what}")
    return load_recipe(str(path / "recipe.toml"))


def _lock(path: Path) -> int | None:
    """A lock on the folder itself, which ends with the process; None where the system has none."""
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RuntimeError(f"another process is training in {str(path)!r}") from None
    except OSError:  # a file system without locks
        with contextlib.suppress(OSError):
            os.close(descriptor)
        return None
    return descriptor


def _unused(name: str) -> Path:
    path, number = Path("runs") / name, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path
