"""The step of gradient descent on the CPU: one call for a group, one fused pass over every number."""

import numpy as np

from ..cpu.jit import helper
from ..cpu.parallel import parallel
from ..groups import flattened, numbers, roles_of, share_of, table, write_back
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
    share = share_of(tasks)
    _steps(-(-len(tasks) // share), tasks, share, lr, factors, bool(momentum), bool(nesterov), bool(first))
    write_back(copied)


@parallel()
def _steps(i, tasks, share, lr, factors, has_buf, nesterov, first):
    for task in tasks[i * share : (i + 1) * share]:
        _step(task, lr, factors, has_buf, nesterov, first)


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
