"""The step of gradient descent on the CPU: one call for a group, one fused pass over every number."""

import numpy as np
from numba import prange

from ..cpu.jit import helper, njit
from ..groups import BLOCK, flattened, numbers, roles_of, table, write_back
from ..registry import kernel
from .problem import SGD_STEP, roles_with


def _same_dtype(*arrays, **_):
    return len({a.dtype for a in arrays if a is not None}) == 1


@kernel(SGD_STEP, device="cpu", step=2, note="one call for all, one fused pass", supports=_same_dtype)
def sgd_step_fused(lr, found, *tensors, momentum, dampening, weight_decay, nesterov, first):
    if not tensors or (found is not None and found[0] != 0):
        return
    roles, copied = flattened(roles_of(tensors, roles_with(momentum)), (0, 2))
    factors = (float(momentum), 1.0 - dampening, float(weight_decay))
    tasks = table(roles)
    step = _steps if tasks[:, -1].sum() <= BLOCK else _steps_parallel
    step(tasks, lr, factors, bool(momentum), bool(nesterov), bool(first))
    write_back(copied)


@njit(parallel=True)
def _steps_parallel(tasks, lr, factors, has_buf, nesterov, first):
    for i in prange(tasks.shape[0]):
        _step(tasks[i], lr, factors, has_buf, nesterov, first)


@njit()
def _steps(tasks, lr, factors, has_buf, nesterov, first):
    for i in range(tasks.shape[0]):
        _step(tasks[i], lr, factors, has_buf, nesterov, first)


@helper()
def _step(task, lr, factors, has_buf, nesterov, first):
    p, g = numbers(task, 0, lr), numbers(task, 1, lr)
    buf = numbers(task, 2 if has_buf else 0, lr)  # not read without momentum
    number = lr.dtype.type
    rate, momentum, keep, decay = lr[0], number(factors[0]), number(factors[1]), number(factors[2])
    for i in range(np.int64(p.size)):
        d = g[i] + decay * p[i]
        if has_buf:
            b = d if first else momentum * buf[i] + keep * d
            buf[i] = b
            d = d + momentum * b if nesterov else b
        p[i] -= rate * d
