"""The command `minires`: train, finetune, evaluate, predict, export, info, kernels, study.

Errors of use are one line and exit code 2, a bug is one line that says so and 70; `--debug` adds the traceback. A run
that was stopped by SIGINT or SIGTERM ends with 130 or 143.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Sequence

from cyclopts import App

from ..train.interrupt import Interrupted
from .errors import bug, is_use, one_line, say
from .evaluate import evaluate
from .export import export
from .finetune import finetune
from .info import info
from .predict import predict
from .train import train

EXIT_USE, EXIT_BUG = 2, 70  # 70 is what sysexits.h calls an internal software error
EXIT_INTERRUPTED, EXIT_PIPE = 130, 141  # the shell's 128 + SIGINT and + SIGPIPE

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
app.command(finetune)
app.command(evaluate)
app.command(predict)
app.command(export)
app.command(info)
app.command("minires.cli.kernels:app", name="kernels", help="List the registered kernels, or check some.")
app.command("minires.cli.study:app", name="study", help="Experiments on backpropagation through skip connections.")


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
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fail(f"error: {one_line(error)}", EXIT_USE) if is_use(error) else _fail(bug(error), EXIT_BUG)
    return result if isinstance(result, int) else 0


def _fail(text: str, code: int) -> int:
    with contextlib.suppress(OSError):  # the disk that standard error goes to may be full
        say(text)
    return code
