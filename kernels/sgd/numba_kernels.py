"""The step of gradient descent on the CPU: one fused pass: every number is read and written once."""

import numpy as np
from numba import prange

from ..cpu.jit import njit
from ..registry import kernel
from .problem import SGD_STEP

_BLOCK = 1 << 16  # numbers per task; a parameter smaller than this is not worth waking the threads for


@kernel(SGD_STEP, device="cpu", step=2, note="one fused pass, parallel over blocks")
def sgd_step_fused(p, g, buf, *, lr, momentum, dampening, weight_decay, nesterov, first):
    order = sorted(range(p.ndim), key=lambda axis: -abs(p.strides[axis]))  # as p lies in memory
    flat_p, flat_g = _flat(p, order), _flat(g, order)
    flat_buf = flat_p if buf is None else _flat(buf, order)  # an array for the compiled signature; not read
    step = _step if p.size <= _BLOCK else _step_blocks
    factors = (float(lr), float(momentum), 1.0 - dampening, float(weight_decay))
    step(flat_p, flat_g, flat_buf, factors, buf is not None, bool(nesterov), bool(first))
    _write_back(p, flat_p, order)
    if buf is not None:
        _write_back(buf, flat_buf, order)


def _flat(a, order):
    """The numbers in the order of axes: a view where they lie so, else a copy."""
    return np.ascontiguousarray(a.transpose(order)).reshape(-1)


def _write_back(a, flat, order):
    if a.size and not np.may_share_memory(a, flat):
        turned = a.transpose(order)
        turned[...] = flat.reshape(turned.shape)


@njit(parallel=True)
def _step_blocks(p, g, buf, factors, has_buf, nesterov, first):
    for b in prange((p.size + _BLOCK - 1) // _BLOCK):
        at = np.int64(b) * _BLOCK
        stop = min(at + _BLOCK, p.size)
        _step(p[at:stop], g[at:stop], buf[at:stop], factors, has_buf, nesterov, first)


@njit()
def _step(p, g, buf, factors, has_buf, nesterov, first):
    number = p.dtype.type
    lr, momentum, keep, decay = number(factors[0]), number(factors[1]), number(factors[2]), number(factors[3])
    for i in range(p.size):
        d = g[i] + decay * p[i]
        if has_buf:
            b = d if first else momentum * buf[i] + keep * d
            buf[i] = b
            d = d + momentum * b if nesterov else b
        p[i] -= lr * d
