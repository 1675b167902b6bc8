"""Where the time goes: seconds inside the ops' forward and backward, per op and per module."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..device import is_cuda_array
from ..engine import Node
from .base import Hook, module_path, table


@dataclass
class Times:
    """forward, backward: seconds. calls: how often forward ran."""

    forward: float = 0.0
    backward: float = 0.0
    calls: int = 0

    def add(self, other: Times) -> None:
        """Add the other's seconds and calls to these."""
        self.forward += other.forward
        self.backward += other.backward
        self.calls += other.calls


class TimerHook(Hook):
    """Measures every op; `str()` of it is two tables.

    The first run of a kernel includes its compilation. On a GPU every op is waited for, so that its time is its own;
    the whole then takes longer than without the hook.
    """

    def __init__(self) -> None:
        self._times: dict[tuple[str, str], Times] = {}  # by module and op
        self._start = 0.0

    def by_op(self) -> dict[str, Times]:
        """Seconds by name of the op, most first."""
        return self._grouped(lambda module, op: [op])

    def by_module(self) -> dict[str, Times]:
        """Seconds by dotted name of the module, those of the modules inside it included, most first."""
        return self._grouped(lambda module, op: _prefixes(module))

    @property
    def total(self) -> Times:
        """Of all ops together."""
        return self._grouped(lambda module, op: [""]).get("", Times())

    def _grouped(self, keys: Any) -> dict[str, Times]:
        groups: dict[str, Times] = {}
        for (module, op), times in self._times.items():
            for key in keys(module, op):
                groups.setdefault(key, Times()).add(times)
        return dict(sorted(groups.items(), key=lambda item: -(item[1].forward + item[1].backward)))

    def forward_pre(self, node: Node, arrays: Sequence[Any]) -> None:
        self._start = _now(next((a for a in arrays if a is not None), None))

    def forward_post(self, node: Node, arrays: Sequence[Any], y: Any) -> None:
        now = _now(y)
        self._add(node, Times(forward=now - self._start, calls=1))
        self._start = now  # the ops that an op runs (`nn.checkpoint`) are not counted once more in its own time

    def backward_pre(self, node: Node, dy: Any) -> None:
        self._start = _now(dy)

    def backward_post(self, node: Node, dy: Any, grads: Sequence[Any]) -> None:
        self._add(node, Times(backward=_now(dy) - self._start))

    def _add(self, node: Node, times: Times) -> None:
        self._times.setdefault((module_path(node.scope), node.name), Times()).add(times)

    def __str__(self) -> str:
        def row(name: str, t: Times) -> tuple[str, ...]:
            return name, f"{1e3 * t.forward:.3f}", f"{1e3 * t.backward:.3f}", str(t.calls)

        tables = [
            table((title, "forward ms", "backward ms", "calls"), [row(*item) for item in groups.items()], (1, 2, 3))
            for title, groups in (("op", {**self.by_op(), "total": self.total}), ("module", self.by_module()))
        ]
        return "\n\n".join(tables)


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _now(array: Any) -> float:
    if array is not None and is_cuda_array(array):
        sys.modules["cupy"].cuda.Device(array.device.id).synchronize()
    return time.perf_counter()
