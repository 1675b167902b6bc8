"""The base class of the hooks, and what they share: the name of the module in which an op ran, and tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, Self

from ..engine import Node, Scope, Vertex, state


class Hook:
    """What can watch the engine, in the thread that entered it: `with TraceHook() as trace: ...`.

    A subclass defines the methods that it needs. It must not write into an array; it may keep one.
    """

    _entered: contextlib.ExitStack | None = None

    def forward_pre(self, node: Node, arrays: Sequence[Any]) -> None:
        """Before an op's forward, with its input arrays."""

    def forward_post(self, node: Node, arrays: Sequence[Any], y: Any) -> None:
        """After an op's forward, with its output array."""

    def written(self, array: Any, index: Any, value: Any) -> None:
        """After `array[index] = value`, an op in place without a graph; what made the value came before."""

    def backward_pre(self, node: Node, dy: Any) -> None:
        """Before an op's backward, with the whole gradient of its output."""

    def backward_post(self, node: Node, dy: Any, grads: Sequence[Any]) -> None:
        """After an op's backward, with the gradients of its inputs."""

    def addend(self, vertex: Vertex, consumer: Node, slot: int, share: Any) -> None:
        """`consumer` hands `share` to its input number `slot`, `vertex`, before shares are summed there."""

    def contexts(self) -> Iterable[contextlib.AbstractContextManager]:
        """Context managers to be entered and left together with the hook."""
        return ()

    def __enter__(self) -> Self:
        if self._entered is not None:
            raise RuntimeError(f"this {type(self).__name__} is entered already; make a second one")
        with contextlib.ExitStack() as stack:  # all of them or none
            for context in self.contexts():
                stack.enter_context(context)
            self._entered = stack.pop_all()
        state.hooks.append(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        state.hooks.remove(self)
        entered, self._entered = self._entered, None
        if entered is not None:
            entered.close()


def module_path(scope: Scope | None) -> str:
    """The dotted name, in the outermost running module, of the module in which an op ran: "layer1.0.conv1".

    For the outermost module itself its class's name; "" outside of all modules. A module that its caller does not
    own goes by its class's name.
    """
    names = []
    while scope is not None:
        names.append(_name(scope))
        scope = scope.parent
    below = names[-2::-1]  # the outermost one has no name
    return ".".join(below) if below else "".join(names)


def _name(scope: Scope) -> str:
    module = scope.module
    if scope.parent is not None:
        owner = scope.parent.module
        for named in (owner.named_children, owner.named_modules):  # the direct children are few
            for name, candidate in named():
                if candidate is module and candidate is not owner:
                    return name
    return type(module).__name__


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Text in columns; those numbered in `right` are set flush right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    pad = [str.rjust if i in right else str.ljust for i in range(len(head))]
    return "\n".join(
        "  ".join(p(cell, w) for p, cell, w in zip(pad, line, widths, strict=True)).rstrip() for line in lines
    )
