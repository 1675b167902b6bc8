"""`minires study`: every experiment of `minires.study` as a command, whose flags are its function's parameters."""

from __future__ import annotations

import functools
import inspect
import json as jsonlib
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from .. import study
from ..study import exercises
from .errors import say
from .values import Whole, whole

RUNS = Path("runs/study")
_WHOLE: dict[Any, Any] = {
    int: Whole,
    int | None: Annotated[int | None, Parameter(converter=whole)],
    tuple[int, ...]: tuple[Whole, ...],
}

app = App(name="study", help="Experiments on backpropagation through skip connections.")
app.default_parameter = Parameter(consume_multiple=True, negative=())


@app.command(name="list", sort_key=0)
def list_experiments() -> None:
    """List the experiments: their names and their questions."""
    known = {**study.EXPERIMENTS, "trace": study.trace}
    pages = {name: sys.modules[experiment.__module__] for name, experiment in known.items()} | {"exercise": exercises}
    width = max(map(len, pages))
    for name, page in pages.items():
        print(f"{name:<{width}}  {_first_line(page)}")


@app.command(name="all", sort_key=1)
def run_all(*, out: Path = RUNS) -> int:
    """Run every experiment as it is, with its default settings.

    Parameters
    ----------
    out
        The folder in which each writes a folder of its name.
    """
    for name, experiment in study.EXPERIMENTS.items():
        print(f"\n{name}: {_first_line(sys.modules[experiment.__module__])}\n")
        _show(experiment(on_note=say), out / name, json=False)
    return 0


def command_of(function: Callable[..., study.Result]) -> Callable[..., int]:
    """The function as a command: its parameters but for `on_note`, and `--out` and `--json`."""

    @functools.wraps(function)
    def command(*arguments: Any, out: Path | None = None, json: bool = False, **settings: Any) -> int:
        result = function(*arguments, **settings, on_note=say)
        return _show(result, out or RUNS / result.folder, json)

    kinds = typing.get_type_hints(function)
    parameters = [
        p.replace(
            annotation=_WHOLE.get(kinds[p.name], kinds[p.name]),
            kind=p.POSITIONAL_ONLY if p.default is p.empty else p.KEYWORD_ONLY,
        )
        for p in inspect.signature(function).parameters.values()
        if p.name != "on_note"
    ]
    own = inspect.signature(_own_flags, eval_str=True).parameters.values()
    command.__signature__ = inspect.Signature([*parameters, *own], return_annotation=int)  # pyright: ignore
    command.__annotations__ = {p.name: p.annotation for p in (*parameters, *own)}
    del command.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]  (else its signature would be read)
    return command


def _own_flags(
    *,
    out: Annotated[Path | None, Parameter(help="The folder to write to; by default runs/study/NAME.")] = None,
    json: Annotated[bool, Parameter(help="Print one JSON object instead of tables.", negative=())] = False,
) -> None:
    """What every experiment's command has."""


def _show(result: study.Result, folder: Path, json: bool) -> int:
    files = [str(path) for path in result.save(folder)]
    if json:
        print(jsonlib.dumps({**result.to_json(), "files": files}, ensure_ascii=False))
        return 0
    from rich.console import Console

    console = Console()
    if isinstance(result, study.Trace) and console.is_terminal:
        console.print(result)
    else:
        print(result)
    print(f"\nwritten: {', '.join(files)}")
    if not any(file.endswith(".png") for file in files):
        say("no plot: drawing it needs matplotlib (pip install 'minires[demo]')")
    return 0


def _first_line(module: Any) -> str:
    return (module.__doc__ or "").partition("\n")[0]


for _place, (_name, _experiment) in enumerate(study.EXPERIMENTS.items(), 2):
    app.command(command_of(_experiment), name=_name, sort_key=_place)
app.command(command_of(study.trace), name="trace", sort_key=len(study.EXPERIMENTS) + 2)
app.command("minires.cli.exercise:exercise", name="exercise", sort_key=len(study.EXPERIMENTS) + 3)
