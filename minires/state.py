"""What is switched on in this thread: gradients, hooks, and the module whose `forward` is running."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple


class Scope(NamedTuple):
    """A link of the chain of modules whose `forward` is running, innermost first; `hooks` turns it into a name."""

    module: Any
    parent: Scope | None


class _State(threading.local):
    """grad_enabled: whether ops remember what backward needs. fuse: whether fused ops run as one. hooks: those entered
    with `with SomeHook():`, outermost first. scope: the innermost running module."""

    def __init__(self) -> None:
        self.grad_enabled = self.fuse = True
        self.hooks: list[Any] = []
        self.scope: Scope | None = None


state = _State()


@contextlib.contextmanager
def set_grad_enabled(enabled: bool) -> Iterator[None]:
    """Within it, ops remember what backward needs, or do not: `with set_grad_enabled(phase == "train"): ...`."""
    saved, state.grad_enabled = state.grad_enabled, enabled
    try:
        yield
    finally:
        state.grad_enabled = saved


def no_grad() -> contextlib._GeneratorContextManager[None]:
    """Within it, nothing is remembered for backward. Also a decorator: `@no_grad()`."""
    return set_grad_enabled(False)


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Within it, fused ops run their readable line, one op after another: every value in between can be seen."""
    saved, state.fuse = state.fuse, False
    try:
        yield
    finally:
        state.fuse = saved
