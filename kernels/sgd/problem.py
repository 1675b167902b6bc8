"""A step of stochastic gradient descent with momentum: p, g, buf of one shape and any layouts; p and buf are written.

    d   = g + weight_decay * p
    buf = d                                     on the first step
          momentum * buf + (1 - dampening) * d  on later ones
    d   = d + momentum * buf  with nesterov, else buf
    p   = p - lr * d

Without momentum buf is None and p = p - lr * (g + weight_decay * p). Source: torch.optim.SGD, whose buf has no factor
lr in it; Sutskever et al. 2013 for momentum.
"""

from __future__ import annotations

import numpy as np

from ..registry import BENCH, TEST, Case, Problem


def sgd_step_reference(p, g, buf, *, lr, momentum, dampening, weight_decay, nesterov, first):
    """Overwrite p and buf, as the formula says."""
    d = g + weight_decay * p
    if buf is not None:
        buf[...] = d if first else momentum * buf + (1 - dampening) * d
        d = d + momentum * buf if nesterov else buf
    p[...] = p - lr * d


def _case(name, shape, momentum=0.9, dampening=0.0, weight_decay=5e-4, nesterov=False, first=False, tags=TEST):
    step = dict(momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, first=first)
    return Case(name, dict(shape=shape, step=dict(lr=0.1, **step)), tags)


CASES = (
    _case("momentum", (5, 3, 3, 3)),
    _case("first_step", (7,), first=True),
    _case("plain", (6, 5), momentum=0.0),
    _case("plain_no_decay", (4,), momentum=0.0, weight_decay=0.0),
    _case("dampening", (3, 4, 1, 1), dampening=0.3),
    _case("nesterov", (4, 3, 2, 2), nesterov=True),
    _case("nesterov_first", (4, 3), nesterov=True, first=True),
    _case("one_number", ()),
    _case("blocks", (3, 40_000)),  # several blocks and a tail
    _case("resnet20", (269_722,), tags=BENCH),
    _case("resnet18", (11_689_512,), tags=BENCH),
)


def _inputs(case, rng):
    p, g, buf = (np.asarray(rng.standard_normal(case.params["shape"])) for _ in range(3))
    return dict(p=p, g=g, buf=buf if case.params["step"]["momentum"] else None), dict(case.params["step"])


def _flops(p, g, buf, *, weight_decay, nesterov, first, **_):
    each = 2 + 2 * bool(weight_decay)
    if buf is not None:
        each += (0 if first else 3) + 2 * nesterov
    return each * int(np.prod(p.shape))


def _bytes(p, g, buf, *, first, **_):
    """Read p, g and buf (not on the first step), write p and buf."""
    passes = 3 if buf is None else 4 if first else 5
    return passes * p.dtype.itemsize * int(np.prod(p.shape))


def _error(p, g, buf, *, lr, momentum, dampening, weight_decay, nesterov, first):
    """Of p, and of buf where there is one: the formula with every term positive."""
    d = np.abs(g) + abs(weight_decay) * np.abs(p)
    if buf is None:
        return (np.abs(p) + abs(lr) * d,)
    b = d if first else abs(momentum) * np.abs(buf) + abs(1 - dampening) * d
    d = d + abs(momentum) * b if nesterov else b
    return np.abs(p) + abs(lr) * d, b


SGD_STEP = Problem(
    "sgd_step", sgd_step_reference, _inputs, CASES, _flops, _bytes, error_scale=_error, writes=("p", "buf")
)
