"""Many tensors in one call: what the steps of optimizers share. A group is lists of arrays, one list per role.

`flattened` makes every array of a group one run of memory in the order of its parameter, `Table` lists where they lie,
for a Numba function that takes all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from .cpu.jit import helper
from .memory import address, namespace, order_of

BLOCK = 1 << 16  # numbers per task; less than this is not worth waking a thread for


def roles_of(arrays: Sequence[Any], count: int) -> list[list[Any]]:
    """The lists that `arrays` are, one after the other: `count` of them, of one length.

    ValueError where they are of different lengths.
    """
    n, rest = divmod(len(arrays), count)
    if rest:
        raise ValueError(f"{len(arrays)} arrays are not {count} lists of one length")
    return [list(arrays[i * n : (i + 1) * n]) for i in range(count)]


def flattened(roles: Sequence[list[Any]], written: Sequence[int]) -> tuple[list[list[Any]], list[tuple[Any, Any]]]:
    """The arrays as dense ones in the order in which those of the first role lie: (roles, what `write_back` needs).

    An array that lies so already is passed on, or a view of it; others are copied. written: the roles that are written.
    """
    flat, copied = [list(role) for role in roles], []
    for i, group in enumerate(zip(*roles, strict=True)):
        if all(a.flags.c_contiguous for a in group):
            continue
        first = group[0]
        order = order_of(first)
        for role, a in enumerate(group):
            turned = a.transpose(order)
            dense = flat[role][i] = namespace(a).ascontiguousarray(turned)
            if role in written and not turned.flags.c_contiguous:
                copied.append((turned, dense))
    return flat, copied


def write_back(copied: Sequence[tuple[Any, Any]]) -> None:
    """Put what was computed in copies where it belongs."""
    for turned, dense in copied:
        turned[...] = dense


def table(roles: Sequence[list[np.ndarray]]) -> np.ndarray:
    """The tasks of a group of dense arrays, (tasks, roles + 1) int64: where each role's numbers begin, and how many.

    A task is at most `BLOCK` numbers of one tensor.
    """
    item = roles[0][0].itemsize
    rows = np.array([[address(a) for a in role] for role in roles], np.int64)
    sizes = np.array([a.size for a in roles[0]], np.int64)
    if sizes.max() > BLOCK:
        blocks = -(-sizes // BLOCK)
        start = (np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)) * BLOCK
        rows = np.repeat(rows, blocks, axis=1) + start * item
        sizes = np.minimum(np.repeat(sizes, blocks) - start, BLOCK)
    return np.ascontiguousarray(np.concatenate([rows, sizes[None]]).T)


def share_of(tasks: np.ndarray) -> int:
    """How many tasks go together: all of them, where there is too little to wake the threads for."""
    return max(1, len(tasks)) if tasks[:, -1].sum() <= BLOCK else 1


@intrinsic
def _pointer(typing_context, address, like):
    """An address as a pointer to numbers of the dtype of the array `like`."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), emit


@helper()
def numbers(row, role, like):
    """The numbers of one role of a task, as an array."""
    return carray(_pointer(row[role], like), row[-1])
