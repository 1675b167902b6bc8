"""One launch for many tensors (`include/tensors.cuh`): their addresses travel by value, with the launch itself.

Nothing is copied to the GPU first, so that such a launch can be captured in a CUDA graph as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .launch import Function, Launch, blocks, launch

MOST, _CHUNK = (
    80,
    4096,
)  # tensors of a launch, numbers of a block: as in include/tensors.cuh; arguments take 4 KB at most
_CHUNKS = np.dtype([("tensors", np.int32), ("size", np.int32, MOST), ("first", np.int32, MOST)])  # struct Chunks


def launch_group(function: Function, roles: Sequence[list[Any]], *args: Any) -> None:
    """Launch for every `MOST` tensors: (struct Tensors, struct Chunks, *args). roles: lists of dense arrays."""
    for begin in range(0, len(roles[0]), MOST):
        part = [role[begin : begin + MOST] for role in roles]
        sizes = np.array([a.size for a in part[0]])
        ends = np.cumsum([blocks(size, _CHUNK) for size in sizes.tolist()])
        about = np.zeros((), _CHUNKS)
        about["tensors"], about["size"][: len(sizes)] = len(sizes), sizes
        about["first"][1 : len(sizes)] = ends[:-1]
        addresses = tuple(a for role in part for a in (*role, *[None] * (MOST - len(role))))
        launch(Launch(function, (int(ends[-1]),), (256,), (addresses, about, *args)))
