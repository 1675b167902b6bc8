"""A process of its own for one rival: asked by lines of JSON, it answers by lines of JSON and sleeps in between.

What a peer's process imports must not import minires, which changes how memory is kept and how threads wait.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import ENVIRONMENT

_LOG_LINES = 12


class Worker:
    """`python -m MODULE ARGUMENTS...`, with this process's environment as it was when it began.

    What it prints beside its answers goes to a file whose end is shown should it fail.
    """

    def __init__(self, module: str, *arguments: object):
        self.name = " ".join([module, *map(str, arguments)])
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=Path(__file__).parent.parent,
            env=ENVIRONMENT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def read(self) -> dict[str, Any]:
        """Its next answer. Raises RuntimeError, with the last lines that it printed, where it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            said = "".join(self.log.readlines()[-_LOG_LINES:])
            raise RuntimeError(f"{self.name} ended with code {self.process.returncode}:\n{said}")
        return json.loads(line)

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send a message and wait for its answer."""
        assert self.process.stdin is not None
        try:
            print(json.dumps(message), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # `read` says why
        return self.read()

    def measure(self, seconds: float) -> float:
        """Seconds per call, as a rival of `turns.in_turn`."""
        return self.ask(do="measure", seconds=seconds)["seconds"]

    def close(self) -> None:
        """End it: at once if it sleeps, by force if it does not listen."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


def burst(call: Callable[[], object], seconds: float) -> float:
    """Seconds per call, called again and again for at least `seconds`."""
    start, n = time.perf_counter(), 0
    while True:
        call()
        n += 1
        spent = time.perf_counter() - start
        if spent >= seconds:
            return spent / n


def serve(first: dict[str, Any], answer: Callable[[dict[str, Any]], dict[str, Any]], channel: Any) -> None:
    """In the worker: send `first`, then the answer to every message."""
    print(json.dumps(first), file=channel, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=channel, flush=True)


def take_channel() -> Any:
    """In the worker, before anything can print: the stream for answers; what others print goes to standard error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel
