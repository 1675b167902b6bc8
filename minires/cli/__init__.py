"""The command `minires`: train, evaluate, info, kernels.

Errors of use are one line and exit code 2; `--debug` adds the traceback.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import traceback
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from ..train.interrupt import Interrupted
from .evaluate import evaluate
from .info import info
from .train import train

EXIT_USE, EXIT_INTERRUPTED, EXIT_PIPE = 2, 130, 141  # the last two are the shell's 128 + SIGINT and + SIGPIPE

app = App(
    name="minires",
    help="ResNets from scratch on NumPy and CuPy.",
    help_epilogue="With --debug, an error comes with its traceback.",
    help_format="plaintext",
    version=lambda: importlib.metadata.version("minires"),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app.command(train)
app.command(evaluate)
app.command(info)
app.command("minires.cli.kernels:app", name="kernels", help="List the registered kernels, or check some.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) and return the exit code."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    try:
        result = app(tokens, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except Interrupted as stop:
        return _fail(str(stop), stop.exit_code)
    except BrokenPipeError:  # `minires info | head -1`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
        return EXIT_PIPE
    except (CycloptsError, ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        if debug:
            traceback.print_exc()
        return _fail(f"error: {' '.join(str(error).split()) or type(error).__name__}", EXIT_USE)
    return result if isinstance(result, int) else 0


def _fail(text: str, code: int) -> int:
    print(f"minires: {text}", file=sys.stderr)
    return code
