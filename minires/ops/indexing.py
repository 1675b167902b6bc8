"""Reading by index: y = x[index], with everything NumPy's indices can say; Tensors in it are taken as their arrays.

    dx = 0 everywhere, and dy added to every element that was read        scatter-add: one may be read several times

Saved for backward: the index, and the shape of x. Numbers, slices, None and Ellipsis read each element once and show
the memory of x; an index with lists, arrays or Tensors copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..device import namespace_of
from ..engine import Function, Tensor
from .layout import Layout


class GetItem(Function):
    @staticmethod
    def forward(ctx, x, *, index: tuple):
        ctx.layout = Layout.of(x)
        return x[index]

    @staticmethod
    def backward(ctx, dy):
        index, xp = ctx.params["index"], namespace_of(dy)
        dx = ctx.layout.full(0, dy.dtype, xp)
        if is_basic(index):
            dx[index] = dy
        else:
            xp.add.at(dx, index, dy)
        return dx


def getitem(input: Tensor, index: Any) -> Tensor:
    """input[index]. IndexError where it points outside."""
    return GetItem.apply(input, index=raw(index, input))


def raw(index: Any, x: Tensor) -> tuple:
    """The index as a tuple for x's array library; always with an Ellipsis, so that NumPy gives arrays, not scalars."""
    parts = index if isinstance(index, tuple) else (index,)
    parts = tuple(_part(part, x) for part in parts)
    return parts if not is_basic(parts) or any(part is Ellipsis for part in parts) else (*parts, Ellipsis)


def is_basic(index: tuple) -> bool:
    """Whether it reads every element at most once, by strides alone."""
    return not any(isinstance(part, bool) or hasattr(part, "shape") for part in index)


def _part(part: Any, x: Tensor) -> Any:
    if isinstance(part, Tensor):
        part = part.array
    if part is None or part is Ellipsis or isinstance(part, (int, slice)):
        return part
    if isinstance(part, np.integer):
        return int(part)
    part = namespace_of(x.array).asarray(part)
    if part.size == 0:  # an empty list: NumPy makes it float
        part = part.astype(np.int64) if part.dtype.kind == "f" else part
    if part.dtype.kind not in "iub":
        raise IndexError(f"an index must hold integers or bools, not {part.dtype}")
    return part
