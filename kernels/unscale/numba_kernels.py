"""Unscaling on the CPU: one call for all gradients, one pass over every number."""

import numpy as np

from ..cpu.jit import helper
from ..cpu.parallel import parallel
from ..groups import flattened, numbers, share_of, table, write_back
from ..registry import kernel
from .problem import UNSCALE


def _same_dtype(*arrays):
    return len({a.dtype for a in arrays}) == 1


@kernel(UNSCALE, device="cpu", step=1, note="one call for all, one pass", supports=_same_dtype)
def unscale_fused(inverse_scale, found, *gradients):
    if not gradients:
        return
    roles, copied = flattened([list(gradients)], (0,))
    tasks = table(roles)
    share = share_of(tasks)
    bad = np.zeros(-(-len(tasks) // share), np.bool_)
    _unscale_tasks(len(bad), tasks, share, np.ascontiguousarray(inverse_scale), bad)
    if bad.any():
        found[0] = 1
    write_back(copied)


@parallel()
def _unscale_tasks(i, tasks, share, factor, bad):
    for task in tasks[i * share : (i + 1) * share]:
        bad[i] |= _unscale(task, factor)


@helper()
def _unscale(task, factor):
    g, by, most, bad = numbers(task, 0, factor), factor[0], np.finfo(factor.dtype).max, False
    for i in range(np.int64(g.size)):
        bad |= not (abs(g[i]) <= most)  # false for a NaN, too
        g[i] *= by
    return bad
