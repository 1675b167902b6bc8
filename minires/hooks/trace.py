"""Which ops and kernels run, on which shapes, and what they keep for backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .. import dispatch
from ..engine import Node, Tensor
from .base import Hook, module_path, table

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TraceRecord:
    """One op, in one direction.

    module: dotted name of the module in which it ran. kernels: names of those that dispatch ran for it, in order.
    inputs, outputs: shapes, None where there is no array; of a backward the gradient of the op's output, and the
    gradients of its inputs. saved_bytes: what the op keeps for backward and no op before it kept; parameters, which
    are there anyway, do not count. number: the op's, the same in both directions. held_bytes: what all ops together
    keep after this; backward drops what an op kept and no other one that is still to come back keeps.
    """

    direction: Literal["forward", "backward"]
    op: str
    module: str
    kernels: tuple[str, ...]
    inputs: tuple[Shape | None, ...]
    outputs: tuple[Shape | None, ...]
    saved_bytes: int
    number: int
    held_bytes: int


class TraceHook(Hook):
    """Keeps a `TraceRecord` of every op in `records`; `str()` of it is a table."""

    def __init__(self) -> None:
        self.records: list[TraceRecord] = []
        self._kernels: list[str] = []
        self._keepers: dict[int, int] = {}  # how many ops keep it, by the id of the memory
        self._held = 0

    @property
    def saved_bytes(self) -> int:
        """Bytes kept for backward by all ops together, each array counted once."""
        return sum(r.saved_bytes for r in self.records)

    def contexts(self) -> Iterable[contextlib.AbstractContextManager]:
        return (dispatch.observe(lambda kernel: self._kernels.append(kernel.name)),)

    def forward_pre(self, node: Node, arrays: Sequence[Any]) -> None:
        self._kernels.clear()

    def forward_post(self, node: Node, arrays: Sequence[Any], y: Any) -> None:
        saved = 0
        if any(node.needs_grad):
            parameters = {id(_owner(v.array)) for v in node.inputs if isinstance(v, Tensor)}
            for owner in _kept(node):
                if id(owner) not in parameters:
                    saved += 0 if id(owner) in self._keepers else owner.nbytes
                    self._keepers[id(owner)] = self._keepers.get(id(owner), 0) + 1
        self._held += saved
        self._record("forward", node, arrays, (y,), saved)

    def backward_pre(self, node: Node, dy: Any) -> None:
        self._kernels.clear()

    def backward_post(self, node: Node, dy: Any, grads: Sequence[Any]) -> None:
        for owner in _kept(node):
            if id(owner) in self._keepers:
                self._keepers[id(owner)] -= 1
                if not self._keepers[id(owner)]:
                    del self._keepers[id(owner)]  # it may be freed now, and its id used again
                    self._held -= owner.nbytes
        self._record("backward", node, (dy,), grads, 0)

    def _record(self, direction: Any, node: Node, inputs: Sequence[Any], outputs: Sequence[Any], saved: int) -> None:
        module, kernels = module_path(node.scope), tuple(self._kernels)
        shapes = _shapes(inputs), _shapes(outputs)
        record = TraceRecord(direction, node.name, module, kernels, *shapes, saved, node.number, self._held)
        self.records.append(record)

    def __str__(self) -> str:
        rows = [
            (r.direction, r.module, r.op, ", ".join(r.kernels), _text(r.inputs), _text(r.outputs), f"{r.saved_bytes:,}")
            for r in self.records
        ]
        rows.append(("", "", "", "", "", "", f"{self.saved_bytes:,}"))
        return table(("pass", "module", "op", "kernels", "in", "out", "bytes saved"), rows, right=(6,))


def _kept(node: Node) -> Iterable[Any]:
    """The memory that a node keeps for backward, as the arrays that own it, each once."""
    found, owners = [*(node.saved_for_backward or ()), *vars(node).values()], {}
    while found:
        item = found.pop()
        if isinstance(item, (tuple, list)):
            found.extend(item)
        elif hasattr(item, "nbytes"):
            owners[id(_owner(item))] = _owner(item)
    return owners.values()


def _owner(array: Any) -> Any:
    base = getattr(array, "base", None)
    return base if hasattr(base, "nbytes") else array


def _shapes(arrays: Sequence[Any]) -> tuple[Shape | None, ...]:
    return tuple(None if a is None else a.shape for a in arrays)


def _text(shapes: Sequence[Shape | None]) -> str:
    return " ".join("-" if s is None else "x".join(map(str, s)) or "()" for s in shapes)
