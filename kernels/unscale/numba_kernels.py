"""Unscaling on the CPU: one call for all gradients, one pass over every number."""

import numpy as np
from numba import prange

from ..cpu.jit import helper, njit
from ..groups import BLOCK, flattened, numbers, table, write_back
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
    run = _tasks if tasks[:, -1].sum() <= BLOCK else _tasks_parallel
    if run(tasks, np.ascontiguousarray(inverse_scale)):
        found[0] = 1
    write_back(copied)


@njit(parallel=True)
def _tasks_parallel(tasks, factor):
    bad = 0
    for i in prange(tasks.shape[0]):
        bad += _unscale(tasks[i], factor)
    return bad


@njit()
def _tasks(tasks, factor):
    bad = 0
    for i in range(tasks.shape[0]):
        bad += _unscale(tasks[i], factor)
    return bad


@helper()
def _unscale(task, factor):
    g, by, most, bad = numbers(task, 0, factor), factor[0], np.finfo(factor.dtype).max, 0
    for i in range(np.int64(g.size)):
        bad |= not (abs(g[i]) <= most)  # false for a NaN, too
        g[i] *= by
    return bad
