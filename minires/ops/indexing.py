"""Reading by index: y = x[index], with everything NumPy's indices can say; Tensors in it are taken as their arrays.

    dx = 0 everywhere, and dy added to every element that was read        scatter-add: one may be read several times

Saved for backward: the index, and the shape of x. Numbers, slices, None and Ellipsis read each element once and show
the memory of x; an index with lists, arrays or Tensors copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..device import namespace_of
from ..dispatch import call_noted, run
from ..engine import Function, Tensor
from .layout import Layout

ARRAY = "array"  # stands for an array in an index


class GetItem(Function):
    """index: its parts, with `ARRAY` for each of the `arrays`."""

    @staticmethod
    def forward(ctx, x, *arrays, index: tuple):
        ctx.layout = Layout.of(x)
        ctx.save_for_backward(*arrays)
        return x[_filled(index, arrays)]

    @staticmethod
    def backward(ctx, dy):
        arrays, xp = ctx.saved_for_backward, namespace_of(dy)
        index, layout = _filled(ctx.params["index"], arrays), ctx.layout
        if (around := _padding(index, layout.shape)) is not None and Layout.of(dy).order == layout.order:
            return run("pad", dy, **around, value=0.0), *[None] * len(arrays)
        dx = layout.view(xp.empty(layout.memory_shape(), dy.dtype))
        call_noted(_scatter, dx, index, dy)
        return dx, *[None] * len(arrays)


def _scatter(dx: Any, index: tuple, dy: Any) -> None:
    """dx = 0, and dy added to every element that was read."""
    dx[...] = 0
    if is_basic(index):
        dx[index] = dy
    else:
        namespace_of(dx).add.at(dx, index, dy)


def _padding(index: tuple, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """What is around what slices took; None where there is more than slices that go forward, or they took nothing."""
    whole = (slice(None),) * (len(shape) - len(index) + 1)
    at = index.index(...) if all(isinstance(part, slice) or part is ... for part in index) else None
    if at is None:
        return None
    taken = [range(n)[part] for n, part in zip(shape, (*index[:at], *whole, *index[at + 1 :]), strict=True)]
    if not all(taken) or any(r.step < 0 for r in taken):
        return None
    after = tuple(n - 1 - r[-1] for n, r in zip(shape, taken, strict=True))
    return dict(before=tuple(r.start for r in taken), after=after, interior=tuple(r.step - 1 for r in taken))


def getitem(input: Tensor, index: Any) -> Tensor:
    """input[index]. IndexError where it points outside."""
    parts, given = raw(index, input), index if isinstance(index, tuple) else (index,)
    arrays = [
        part if getattr(part, "array", None) is array else Tensor(array)  # the Tensor itself counts what is written
        for part, array in zip(given, parts, strict=False)
        if hasattr(array, "shape")
    ]
    return GetItem.apply(input, *arrays, index=tuple(ARRAY if hasattr(p, "shape") else p for p in parts))


def raw(index: Any, x: Tensor) -> tuple:
    """The index as a tuple for x's array library; always with an Ellipsis, so that NumPy gives arrays, not scalars."""
    parts = index if isinstance(index, tuple) else (index,)
    parts = tuple(_part(part, x) for part in parts)
    return parts if not is_basic(parts) or any(part is Ellipsis for part in parts) else (*parts, Ellipsis)


def is_basic(index: tuple) -> bool:
    """Whether it reads every element at most once, by strides alone."""
    return not any(isinstance(part, bool) or hasattr(part, "shape") for part in index)


def _filled(index: tuple, arrays: Sequence[Any]) -> tuple:
    rest = iter(arrays)
    return tuple(next(rest) if part is ARRAY else part for part in index)


def _part(part: Any, x: Tensor) -> Any:
    shared = isinstance(part, Tensor)
    if shared:
        part = part.array
    xp = namespace_of(x.array)
    if part is None or part is Ellipsis or isinstance(part, (int, slice)):
        return part
    if isinstance(part, np.integer):
        return int(part)
    part = (xp.asarray if shared else xp.array)(part)  # a list or array is copied: it may be written into later
    if part.size == 0:  # an empty list: NumPy makes it float
        part = part.astype(np.int64) if part.dtype.kind == "f" else part
    if part.dtype.kind not in "iub":
        raise IndexError(f"an index must hold integers or bools, not {part.dtype}")
    return part
