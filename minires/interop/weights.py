"""Weights into a network: from a file, by the name of published ones, or from a state dict."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine import Tensor
from ..nn.module import Module, StateDictError
from .load import load
from .names import find_state_dict, our_names

# How to get the file of published weights, by name; `minires.models.weights` enters them.
PUBLISHED: dict[str, Callable[[], Path]] = {}
_OPTIONAL = "num_batches_tracked"  # files from before PyTorch 0.4.1 lack it


@dataclass
class LoadReport:
    """What `load_weights` did: `print(report)` says it in a line.

    source: where the weights come from. loaded: our names of what was loaded. renamed: our name by theirs, where they
    differ. missing: what the model has and the weights lack. unexpected: the reverse. mismatched: (their shape, ours)
    of what has another shape. The last three are empty when loading was strict.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{len(self.loaded)} tensors from {self.source}"
        for what in ("renamed", "missing", "unexpected", "mismatched"):
            found = getattr(self, what)
            text += f"; {len(found)} {what}: {_listed(list(found))}" if found else ""
        return text


def read_weights(weights: str | os.PathLike[str] | Mapping[str, Any], part: str | None = None) -> dict[str, Tensor]:
    """The state dict in a file, of published weights by name, or in what `minires.load` returned; see
    `find_state_dict`."""
    if isinstance(weights, Mapping):
        return find_state_dict(weights, part)
    path = resolve(weights)
    try:
        return find_state_dict(load(path), part)
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]}") from error


def resolve(weights: str | os.PathLike[str]) -> Path:
    """The file: itself if it exists, else that of the published weights of that name.

    FileNotFoundError where there is neither.
    """
    path = Path(weights)
    if path.exists():
        return path
    if str(weights) in PUBLISHED:
        return PUBLISHED[str(weights)]()
    near = difflib.get_close_matches(str(weights), PUBLISHED)
    hint = f" (did you mean {' or '.join(near)}?)" if near else "; minires.models.list_weights() lists them"
    raise FileNotFoundError(f"there is no file {str(weights)!r}, and no published weights have that name{hint}")


def load_weights(
    model: Module,
    weights: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
    part: str | None = None,
    source: str | None = None,
) -> LoadReport:
    """Copy weights into a model, under the model's names, keeping its dtypes and devices.

    weights: the path of a file that `minires.load` reads, the name of published weights, or a state dict.
    part: see `find_state_dict`. source: what messages call a state dict. strict: every tensor of one side must be in
    the other, in the same shape; else StateDictError, whose first line counts what does not fit and whose others name
    it, and nothing is loaded. Not strict: what fits is loaded, and the report names the rest.
    """
    source = source or ("the state dict" if isinstance(weights, Mapping) else str(weights))
    state = read_weights(weights, part)
    ours = model.state_dict()
    names = our_names(state, ours)
    report = LoadReport(source, renamed={theirs: name for theirs, name in names.items() if theirs != name})
    fitting = {}
    for theirs, name in names.items():
        if name not in ours:
            report.unexpected.append(theirs)
        elif state[theirs].shape != ours[name].shape:
            report.mismatched[name] = (tuple(state[theirs].shape), tuple(ours[name].shape))
        else:
            fitting[name] = state[theirs]
    here = set(names.values())
    report.missing = [name for name in ours if name not in here and not name.endswith(_OPTIONAL)]
    report.loaded = list(fitting)
    if strict:
        _check(report, type(model).__name__)
    model.load_state_dict(fitting, strict=False)
    return report


def _check(report: LoadReport, model: str) -> None:
    """StateDictError where something does not fit."""
    if report.mismatched and report.mismatched.keys() <= {"fc.weight", "fc.bias"}:
        theirs, ours = next(iter(report.mismatched.values()))
        if not report.missing and not report.unexpected and theirs[1:] == ours[1:]:
            raise StateDictError(
                f"{report.source} is for {theirs[0]} classes, the model has {ours[0]}: create it with "
                f"num_classes={theirs[0]}, or let `minires finetune` give the weights a new head"
            )
    lines = []
    if report.mismatched:
        shapes = [f"{name} {theirs} not {ours}" for name, (theirs, ours) in report.mismatched.items()]
        lines.append(f"{len(shapes)} of another shape: {_listed(shapes)}")
    for what in ("missing", "unexpected"):
        if found := getattr(report, what):
            lines.append(f"{len(found)} {what}: {_listed(found)}")
    if lines:
        total = len(report.missing) + len(report.unexpected) + len(report.mismatched)
        raise StateDictError(f"{report.source} does not fit {model}, {total} differences:\n  " + ";\n  ".join(lines))


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
