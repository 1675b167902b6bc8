"""Checkpoints that survive: what a run needs to go on, in one safetensors file per checkpoint.

    checkpoints/step-00001200.safetensors       arrays; in its head `state` (JSON text) and `sha256` of all of it

A file appears whole or not at all (written beside its place, fsync, renamed, fsync of the folder), and is believed only
if its checksum is right. The last `keep` ones stay, and the best one. A damaged one is put aside, and the one before
it is taken.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..serialization import TEMPORARY, load_arrays, save

_FORMAT = "minires checkpoint 1"
_NAME = re.compile(r"step-(\d+)\.safetensors")


class Checkpoint(NamedTuple):
    """arrays by name, and the rest: what JSON can hold."""

    arrays: dict[str, np.ndarray]
    state: dict[str, Any]


class DamagedCheckpoint(ValueError):
    """A file that is not the checkpoint that was written."""


def write_checkpoint(path: Path, arrays: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
    """Write a checkpoint: whole or not at all. OSError where the disk is full or may not be written."""
    text = json.dumps(state)
    save(arrays, path, {"format": _FORMAT, "state": text, "sha256": _digest(arrays, text)})


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and verify its checksum. DamagedCheckpoint where the file is not what was written."""
    try:
        arrays, metadata = load_arrays(path)
    except ValueError as error:  # cut off, or its head is damaged
        raise DamagedCheckpoint(f"{path} is damaged: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise DamagedCheckpoint(f"{path} is damaged, or no checkpoint: its head does not say {_FORMAT!r}")
    text = metadata.get("state", "")
    if _digest(arrays, text) != metadata.get("sha256"):
        raise DamagedCheckpoint(f"{path} is damaged: its checksum is wrong")
    return Checkpoint(arrays, json.loads(text))


def _digest(arrays: Mapping[str, np.ndarray], text: str) -> str:
    """SHA-256 of names, dtypes, shapes, values (in C order) and the text."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        digest.update(f"\0{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of a run, in a folder of their own. keep: how many of the last ones stay, besides the best."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def path(self, step: int) -> Path:
        """Where the checkpoint after so many steps lies."""
        return self.folder / f"step-{step:08d}.safetensors"

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, ascending."""
        matches = map(_NAME.fullmatch, (p.name for p in self.folder.iterdir())) if self.folder.is_dir() else ()
        return sorted(int(match[1]) for match in matches if match)

    def save(self, step: int, arrays: Mapping[str, np.ndarray], state: Mapping[str, Any], best: int = -1) -> Path:
        """Write the checkpoint after `step` steps; then let go of old ones, but never of that of step `best`."""
        self.folder.mkdir(exist_ok=True)
        write_checkpoint(self.path(step), arrays, state)
        before = [s for s in self.steps() if s < step]
        for old in before[: max(0, len(before) + 1 - self.keep)]:
            if old != best:
                self.path(old).unlink(missing_ok=True)
        return self.path(step)

    def load(self, note: Callable[[str], Any] = lambda text: None) -> Checkpoint | None:
        """The newest checkpoint that is intact; None where there is none at all.

        `note` is called with a line for every damaged one, which is renamed to *.damaged. DamagedCheckpoint where
        all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return read_checkpoint(self.path(step))
            except DamagedCheckpoint as error:
                before = [s for s in steps if s < step]
                if not before:
                    raise DamagedCheckpoint(f"{error}; there is no earlier one") from error
                note(f"warning: {error}; going back to step {before[-1]}")
                self.path(step).replace(self.path(step).with_suffix(".damaged"))
        return None


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written, here and in the folders directly below."""
    for path in [*folder.glob(f".*{TEMPORARY}*"), *folder.glob(f"*/.*{TEMPORARY}*")]:
        path.unlink(missing_ok=True)
