"""The folder of a run. A file in it is whole or absent: each is written beside its place, then moved there."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .metrics import Epoch, Summary
from .recipe import Recipe


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write a file beside `path`, and move it there once it is on the disk."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class RunFolder:
    """recipe.toml, then metrics.jsonl and model.safetensors after every epoch, summary.json and curves.png at the end.

    path: `recipe.out`, which must be new or empty, else a new folder runs/NAME-DATE-TIME.
    """

    def __init__(self, recipe: Recipe):
        self.epochs: list[Epoch] = []
        self.path = Path(recipe.out) if recipe.out else _unused(f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        if self.path.is_dir() and any(self.path.iterdir()):
            raise FileExistsError(f"out={recipe.out!r} is not empty; a run wants a new or an empty folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self.write("recipe.toml", recipe.to_toml())

    def write(self, name: str, text: str) -> None:
        """Write a text file."""
        write_atomically(self.path / name, lambda beside: beside.write_text(text, encoding="utf-8"))

    def add(self, epoch: Epoch) -> None:
        """Write an epoch's line of metrics.jsonl."""
        self.epochs.append(epoch)
        self.write("metrics.jsonl", "".join(json.dumps(dataclasses.asdict(e)) + "\n" for e in self.epochs))

    def finish(self, summary: Summary) -> None:
        """Write summary.json."""
        self.write("summary.json", json.dumps(dataclasses.asdict(summary), indent=2, ensure_ascii=False) + "\n")


def _unused(name: str) -> Path:
    path, number = Path("runs") / name, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path
