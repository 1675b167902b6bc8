"""The step of AdamW on the CPU: one call for a group, one fused pass over every number."""

import numpy as np

from ..cpu.jit import helper
from ..cpu.parallel import parallel
from ..groups import flattened, numbers, roles_of, share_of, table, write_back
from ..registry import kernel
from .problem import ADAMW_STEP, roles_with


def _same_dtype(*arrays, **_):
    return len({a.dtype for a in arrays if a is not None}) == 1


@kernel(ADAMW_STEP, device="cpu", step=2, note="one call for all, one fused pass", supports=_same_dtype)
def adamw_step_fused(factors, found, *tensors, beta1, beta2, eps, penalty, amsgrad):
    if not tensors or (found is not None and found[0] != 0):
        return
    roles, copied = flattened(roles_of(tensors, roles_with(amsgrad)), (0, 2, 3, 4))
    settings = (1.0 - beta1, float(beta2), 1.0 - beta2, float(eps), float(penalty))
    tasks = table(roles)
    share = share_of(tasks)
    _steps(-(-len(tasks) // share), tasks, share, np.ascontiguousarray(factors), settings, bool(amsgrad))
    write_back(copied)


@parallel()
def _steps(i, tasks, share, factors, settings, amsgrad):
    for task in tasks[i * share : (i + 1) * share]:
        _step(task, factors, settings, amsgrad)


@helper()
def _step(task, factors, settings, amsgrad):
    p, g, m, v = (
        numbers(task, 0, factors),
        numbers(task, 1, factors),
        numbers(task, 2, factors),
        numbers(task, 3, factors),
    )
    most = numbers(task, 4 if amsgrad else 3, factors)  # not read without amsgrad
    number = factors.dtype.type
    keep1, beta2, keep2 = number(settings[0]), number(settings[1]), number(settings[2])
    eps, penalty = number(settings[3]), number(settings[4])
    shrink, correction, rate = factors[0], factors[1], factors[2]
    for i in range(np.int64(p.size)):
        d = g[i] + penalty * p[i]
        mean = m[i] + keep1 * (d - m[i])
        square = beta2 * v[i] + keep2 * d * d
        m[i], v[i] = mean, square
        if amsgrad:
            square = most[i] if most[i] > square else square
            most[i] = square
        p[i] = shrink * p[i] - rate * mean / (np.sqrt(square) / correction + eps)
