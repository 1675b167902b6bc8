"""Whose fault an error is: the user's, told in one line, or a bug in minires."""

from __future__ import annotations

import linecache
import sys
from types import TracebackType

from cyclopts import CycloptsError

_OURS = (ValueError, TypeError, RuntimeError, ArithmeticError)  # raised on purpose, or by a mistake


def is_use(error: BaseException) -> bool:
    """Whether an error tells of bad input: the system's, the command line's, or one that minires raises on purpose.

    On purpose is what a `raise` statement of ours raises. An error of the same kind that Python or NumPy raises (a
    wrong call, shapes that do not fit) went past our checks: a bug.
    """
    if isinstance(error, (CycloptsError, OSError, ImportError, MemoryError)):
        return True
    if not isinstance(error, _OURS) or error.__traceback__ is None:
        return False
    last = _last(error.__traceback__)
    line = linecache.getline(last.tb_frame.f_code.co_filename, last.tb_lineno)
    return last.tb_frame.f_globals.get("__name__", "").startswith("minires") and line.lstrip().startswith("raise")


def one_line(error: BaseException) -> str:
    """The error's message without line breaks, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def bug(error: BaseException) -> str:
    """One line for what is no error of use."""
    where = "" if error.__traceback__ is None else f" in {_place(_last(error.__traceback__))}"
    return f"internal error: {type(error).__name__}{where}: {one_line(error)} (a bug; --debug shows the traceback)"


def say(text: str) -> None:
    """A line beside the output: on standard error, after the program's name."""
    print(f"minires: {text}", file=sys.stderr, flush=True)


def _last(trace: TracebackType) -> TracebackType:
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _place(trace: TracebackType) -> str:
    return f"{trace.tb_frame.f_globals.get('__name__', '?')}, line {trace.tb_lineno}"
