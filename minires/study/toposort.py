"""Why backward walks in an order: a skip connection makes the obvious recursion wrong.

h = f(h) + h uses h twice, so the gradient of h has two addends. The obvious backward calls itself on the inputs of
every node as soon as it has given them their share:

    def backward(node):
        for input, slope in node.inputs:
            input.grad += slope * node.grad
        for input, _ in node.inputs:
            backward(input)

The node behind a block is then visited twice, the first time with half of its gradient, the second time with all of
it: what it handed on the first time is counted again. Over n blocks h_0 is visited 2^n times, and its gradient is
wrong from the second block on. With f(h) = h / 2 the true gradient is 1.5^n: 2.25 at two blocks, where the recursion
finds 5.25 (4.25 where the skip is the first addend: it even depends on the order of a sum).

What helps: hand on each share alone (`by_paths`: right, but still 2^n visits, one for every path), or wait until all
shares have come (the engine: every node once, the last made first).

What to look at: the counts of visits, and that the engine's stays a straight line up to a thousand blocks.

Source: the question that readers of micrograd ask most (github.com/karpathy/micrograd, issue 64). The order is that of
Linnainmaa 1970 and Speelpenning 1980: reverse accumulation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..creation import ones
from ..engine import Node, Tensor
from ..hooks import Hook
from .result import LINES, Finding, Result, Table, number


class Scalar:
    """A number that knows which numbers it was computed from, each with the slope d self / d input."""

    def __init__(self, *inputs: tuple[Scalar, float]):
        self.inputs, self.grad = inputs, 0.0


def chain(blocks: int, skip_first: bool = False) -> tuple[Scalar, Scalar]:
    """(h_0, h_n) of n times h = f(h) + h with f(h) = c * h, c = 1/2 being a node as well."""
    start = h = Scalar()
    for _ in range(blocks):
        residual = Scalar((h, 0.5), (Scalar(), 1.0))
        h = Scalar((h, 1.0), (residual, 1.0)) if skip_first else Scalar((residual, 1.0), (h, 1.0))
    return start, h


def naive(node: Scalar) -> int:
    """The obvious backward from a node whose grad is set; returns how many visits it took."""
    for below, slope in node.inputs:
        below.grad += slope * node.grad
    return 1 + sum(naive(below) for below, _ in node.inputs)


def by_paths(node: Scalar, share: float) -> int:
    """The recursion that hands on each share alone: right, one visit for every path."""
    node.grad += share
    return 1 + sum(by_paths(below, slope * share) for below, slope in node.inputs)


@dataclass(repr=False)
class Toposort(Result):
    """blocks: their numbers, ascending. By number of blocks: the true gradient of h_0, the gradients and visits of the
    naive recursion (NaN and -1 beyond `naive_blocks`), of the recursion by paths, and of the engine; `skip_first`: the
    naive gradient where the sum is written the other way round."""

    name: ClassVar[str] = "toposort"
    size: ClassVar[tuple[float, float]] = (9.0, 4.2)
    blocks: np.ndarray
    true: np.ndarray
    naive: np.ndarray
    skip_first: np.ndarray
    by_paths: np.ndarray
    engine: np.ndarray
    naive_visits: np.ndarray
    engine_visits: np.ndarray

    def tables(self) -> list[Table]:
        rows = []
        for i, n in enumerate(self.blocks):
            known = self.naive_visits[i] >= 0
            found = [self.naive[i], self.skip_first[i], self.by_paths[i]]
            cells = [f"{g:.6g}" if known else "-" for g in found]
            visits = f"{self.naive_visits[i]:,}" if known else "-"
            rows.append(
                (str(n), f"{self.true[i]:.6g}", *cells, f"{self.engine[i]:.6g}", visits, f"{self.engine_visits[i]:,}")
            )
        head = ("blocks", "true", "naive", "naive, skip first", "by paths", "engine", "visits", "engine's")
        return [
            Table("Gradient of h_0 after n blocks h = h/2 + h, and the nodes that were visited", head, rows, range(8))
        ]

    def findings(self) -> list[Finding]:
        wrong = [n for n, a, b in zip(self.blocks, self.naive, self.true, strict=True) if np.isfinite(a) and a != b]
        exact = bool(np.allclose(self.engine, self.true, rtol=1e-6 * self.blocks.max()))
        counted = self.naive_visits >= 0
        formula = bool((self.naive_visits[counted] == 4 * 2.0 ** self.blocks[counted] - 3).all())
        last = int(self.blocks[-1])
        return [
            Finding(
                "micrograd, issue 64: why topological order?",
                "Calling backward on each input in turn counts shares again where a value is used twice.",
                f"The naive gradient is wrong from {min(wrong)} blocks on."
                if wrong
                else "The naive gradient is right.",
                bool(wrong),
                f"At {max(wrong)} blocks it is {number(self.naive[list(self.blocks).index(max(wrong))])} instead of "
                f"{number(self.true[list(self.blocks).index(max(wrong))])}."
                if wrong
                else "One block has one join: nothing behind it hands on a part. Take more --blocks.",
            ),
            Finding(
                "counting paths: two ways at each join",
                "2^n visits of h_0, 4 * 2^n - 3 of all nodes.",
                f"{self.naive_visits[counted][-1]:,} visits at {self.blocks[counted][-1]} blocks; "
                f"the engine needs {self.engine_visits[-1]:,} for {last}.",
                formula,
            ),
            Finding(
                "this engine",
                "Every node once, after all of its consumers: 1.5^n.",
                f"{number(self.engine[-1])} at {last} blocks, {number(self.true[-1])} expected.",
                exact,
            ),
        ]

    def draw(self, figure: Any) -> None:
        value, visits = figure.subplots(1, 2)
        counted = self.naive_visits >= 0
        value.plot(self.blocks[counted], self.naive[counted], label="naive recursion", **LINES[1])
        value.plot(self.blocks[counted], self.engine[counted], label="engine", **LINES[0])
        value.plot(
            self.blocks[counted],
            self.true[counted],
            label="true, 1.5$^n$",
            color="0.0",
            linestyle=":",
            marker="+",
            markersize=11,
        )
        value.set(title="gradient of the first value", ylabel="gradient (log scale)", yscale="log")
        visits.plot(self.blocks[counted], self.naive_visits[counted], label="naive recursion, 4·2$^n$ − 3", **LINES[1])
        visits.plot(self.blocks, self.engine_visits, label="engine, 2n", **LINES[0])
        visits.set(title="work", ylabel="nodes visited (log scale)", yscale="log", xscale="log")
        for axes in (value, visits):
            axes.set_xlabel("residual blocks" + (" (log scale)" if axes is visits else ""))
            axes.grid(True, color="0.9")
            axes.legend()


class _Visits(Hook):
    """Counts the nodes that backward visits."""

    def __init__(self) -> None:
        self.nodes = 0

    def backward_pre(self, node: Node, dy: Any) -> None:
        self.nodes += 1


def _engine(blocks: int) -> tuple[float, int]:
    """(gradient of h_0, nodes visited) by minires."""
    start = ones((), dtype="float64", requires_grad=True)
    h: Tensor = start
    for _ in range(blocks):
        h = h / 2 + h
    with _Visits() as visits:
        h.backward()
    return float(start.grad.array) if start.grad is not None else 0.0, visits.nodes


def toposort(
    blocks: tuple[int, ...] = (1, 2, 3, 5, 10, 16, 100, 1000),
    naive_blocks: int = 16,
    on_note: Callable[[str], Any] | None = None,
) -> Toposort:
    """How often a naive backward counts the gradient of a chain of residual blocks, and that the engine does not.

    Parameters
    ----------
    blocks
        Numbers of blocks to try.
    naive_blocks
        The most blocks that are given to the naive recursion, which needs 2^n visits.
    """
    if not blocks or min(blocks) < 1:
        raise ValueError(f"blocks={blocks} must be numbers of at least 1")
    if min(blocks) > naive_blocks:
        raise ValueError(f"naive_blocks={naive_blocks} leaves none of blocks={blocks} to the naive recursion")
    if naive_blocks > 22:
        raise ValueError(f"naive_blocks={naive_blocks} would need 4 * 2^{naive_blocks} visits; take at most 22")
    rows = []
    for n in sorted(set(blocks)):
        row = {"blocks": n, "true": 1.5**n, "naive": np.nan, "skip_first": np.nan, "by_paths": np.nan}
        row["naive_visits"] = -1
        if n <= naive_blocks:
            (start, end), (start2, end2), (start3, end3) = chain(n), chain(n, skip_first=True), chain(n)
            end.grad = end2.grad = 1.0
            row["naive_visits"] = naive(end)
            naive(end2)
            by_paths(end3, 1.0)
            row.update(naive=start.grad, skip_first=start2.grad, by_paths=start3.grad)
        row["engine"], row["engine_visits"] = _engine(n)
        rows.append(row)
    return Toposort(**{key: np.array([row[key] for row in rows]) for key in rows[0]})
