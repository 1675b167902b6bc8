"""What is switched on in this thread: gradients, hooks, mixed precision, and the module whose `forward` is running."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast, overload

F = TypeVar("F", bound=Callable[..., Any])


class Scope(NamedTuple):
    """A link of the chain of modules whose `forward` is running, innermost first; `hooks` turns it into a name."""

    module: Any
    parent: Scope | None


class _State(threading.local):
    """grad_enabled: whether ops remember what backward needs. fuse: whether fused ops run as one. hooks: those entered
    with `with SomeHook():`, outermost first. scope: the innermost running module. autocast: what to cast to, by device
    type; casts: weights that are cast already, None outside of regions (autocast.py). reads: how often the numbers of a
    tensor were given to Python or NumPy."""

    def __init__(self) -> None:
        self.grad_enabled = self.fuse = True
        self.hooks: list[Any] = []
        self.scope: Scope | None = None
        self.autocast: dict[str, Any] = {}
        self.casts: dict[Any, Any] | None = None
        self.reads = 0


state = _State()


class _Gradients:
    """A context manager and decorator: within it, ops remember what backward needs, or do not."""

    def __init__(self, enabled: bool):
        self.enabled, self.saved = enabled, state.grad_enabled

    def __enter__(self) -> None:
        self.saved, state.grad_enabled = state.grad_enabled, self.enabled

    def __exit__(self, *_: object) -> None:
        state.grad_enabled = self.saved

    def __call__(self, function: F) -> F:
        @functools.wraps(function)
        def within(*args: Any, **kwargs: Any) -> Any:
            with _Gradients(self.enabled):  # one of its own: several threads may be in the function
                return function(*args, **kwargs)

        return cast(F, within)


class set_grad_enabled(_Gradients):
    """Whether ops remember what backward needs: from now on, or within `with set_grad_enabled(phase == "train"): ...`,
    or as a decorator within the function."""

    def __init__(self, enabled: bool):
        super().__init__(enabled)
        state.grad_enabled = enabled

    def __enter__(self) -> None:  # what to go back to is what was before the call
        state.grad_enabled = self.enabled

    def __call__(self, function: F) -> F:
        state.grad_enabled = self.saved
        return super().__call__(function)


@overload
def no_grad() -> _Gradients: ...
@overload
def no_grad(function: F) -> F: ...
def no_grad(function: Any = None) -> Any:
    """Within it, nothing is remembered for backward. Also a decorator: `@no_grad()` or `@no_grad`."""
    return _Gradients(False) if function is None else _Gradients(False)(function)


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Within it, fused ops run their readable line, one op after another: every value in between can be seen."""
    saved, state.fuse = state.fuse, False
    try:
        yield
    finally:
        state.fuse = saved
