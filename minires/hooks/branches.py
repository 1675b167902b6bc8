"""The gradient at a join, path by path.

Where a value is used more than once, its gradient is a sum with one addend per use. The input x of a residual block
y = F(x) + x is used twice, and

    dx = dy (through the skip: the identity's share) + J_F(x)ᵀ dy (through the residual branch's convolutions)

After the sum nobody can tell them apart; this hook looks before. It is what carries the gradient through a hundred
layers that it makes visible: how large the identity's share is, and whether the branch's agrees with it (cosine).

Source: He et al. 2016 (arXiv:1603.05027), equation 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..engine import Node, Tensor, Vertex
from .base import Hook, module_path, table

# Input slots whose gradient is dy itself, at most moved, cut, spread or averaged: op name -> slots, None for all.
_HANDS_ON: dict[str, tuple[int, ...] | None] = {
    "Add": None,
    "Sub": (0,),
    "BatchNorm": (3,),  # the residual of the fused op; its ReLU's zeros apply
    "ConvBnChain": (1,),
    "GetItem": (0,),
    "Pad": (0,),
    "Reshape": (0,),
    "Permute": (0,),
    "Expand": (0,),
    "Cat": None,
    "AvgPool2d": (0,),
    "Sum": (0,),
    "Mean": (0,),
    "Clone": (0,),
    "Move": (0,),
    "InputMark": (0,),
    "OutputMark": (0,),
}


@dataclass
class Share:
    """One addend of a gradient.

    op, module: the op that used the value and sends the share, and where it ran. slot: as which of its inputs.
    identity: whether the share is that op's own gradient, at most moved, cut, spread or averaged (the skip of a
    residual block, also one that pads or strides), and not one multiplied by weights. norm: Euclidean. array: the
    share itself, with `arrays=True`.
    """

    op: str
    module: str
    slot: int
    identity: bool
    norm: float
    array: Any = None


@dataclass
class Join:
    """A value that was used more than once, and what each use sends back.

    op, module: what made the value, and where ("leaf" and "" for a leaf). shares: in the order of arrival, the last
    use first. gram[i][j]: the inner product of shares i and j.
    """

    op: str
    module: str
    shape: tuple[int, ...]
    shares: list[Share] = field(default_factory=list)
    gram: list[list[float]] = field(default_factory=list)

    @property
    def identity(self) -> Share | None:
        """The share that came past the weights, if there is just one such."""
        found = [s for s in self.shares if s.identity]
        return found[0] if len(found) == 1 else None

    @property
    def branch(self) -> Share | None:
        """The share that came through the weights, if there is just one such."""
        found = [s for s in self.shares if not s.identity]
        return found[0] if len(found) == 1 else None

    @property
    def norm(self) -> float:
        """The norm of the whole gradient, the sum of the shares."""
        return math.sqrt(max(0.0, sum(map(sum, self.gram))))

    def cosine(self, i: int = 0, j: int = 1) -> float:
        """The cosine of the angle between shares i and j; NaN where one is zero."""
        scale = math.sqrt(self.gram[i][i] * self.gram[j][j])
        return self.gram[i][j] / scale if scale else math.nan


class BranchGradHook(Hook):
    """Keeps a `Join` for every value whose gradient has several addends, in `joins`; `str()` of it is a table.

    Enter it around backward. arrays: keep the shares themselves too.
    """

    def __init__(self, arrays: bool = False) -> None:
        self.arrays = arrays
        self.joins: list[Join] = []
        self._waiting: dict[Vertex, tuple[list[Share], list[Any], Join]] = {}  # gradients that may get more shares

    def addend(self, vertex: Vertex, consumer: Node, slot: int, share: Any) -> None:
        slots = _HANDS_ON.get(consumer.name, ())
        identity = slots is None or slot in slots
        mine = Share(
            consumer.name, module_path(consumer.scope), slot, identity, math.nan, share if self.arrays else None
        )
        if vertex not in self._waiting:  # most values are used once: look closer only when there is a second share
            op, scope = ("leaf", None) if isinstance(vertex, Tensor) else (vertex.name, vertex.scope)
            self._waiting[vertex] = [mine], [share], Join(op, module_path(scope), share.shape)
            return
        shares, arrays, join = self._waiting[vertex]
        shares.append(mine)
        arrays.append(share)
        if not join.shares:
            join.shares = shares
            join.gram.append([_inner(arrays[0], arrays[0])])
            shares[0].norm = math.sqrt(join.gram[0][0])
            self.joins.append(join)
        products = [_inner(share, other) for other in arrays]
        for row, product in zip(join.gram, products, strict=False):
            row.append(product)
        join.gram.append(products)
        mine.norm = math.sqrt(products[-1])

    def backward_pre(self, node: Node, dy: Any) -> None:
        if self._waiting.pop(node, None) is None:  # nobody sent it a share: a new backward() begins here
            self._waiting.clear()

    def __exit__(self, *exception: Any) -> None:
        self._waiting.clear()
        super().__exit__(*exception)

    def __str__(self) -> str:
        rows = []
        for join in self.joins:
            where = f"{join.module} {join.op}".strip()
            for i, s in enumerate(join.shares):
                others = [f"{join.cosine(i, j):+.3f}" for j in range(len(join.shares)) if j != i]
                kind = "identity" if s.identity else "weights"
                rows.append((where, f"{s.module} {s.op}".strip(), kind, f"{s.norm:.4g}", " ".join(others)))
                where = ""
        return table(("value", "share from", "through", "norm", "cosine"), rows, right=(3, 4))


def _inner(a: Any, b: Any) -> float:
    return float((a.astype("float64") * b).sum())
