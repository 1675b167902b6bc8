"""How a hook is taken away again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

_numbers = itertools.count()


class Handle:
    """Removes a hook: `handle.remove()`, or at the end of `with tensor.register_hook(hook): ...`.

    hooks: the table that the owner calls, in order; `hook` is added to it.
    """

    def __init__(self, hooks: dict[int, Callable], hook: Callable):
        if not callable(hook):
            raise TypeError(f"a hook must be callable, not {type(hook).__name__}")
        self._hooks, self._key = hooks, next(_numbers)
        hooks[self._key] = hook

    def remove(self) -> None:
        """Take the hook away; a second time does nothing."""
        self._hooks.pop(self._key, None)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()
