"""A step of gradient descent with momentum for a group of tensors, each p, g, buf of one shape and any layouts.

    d   = g + weight_decay * p
    buf = d                                     on the first step
          momentum * buf + (1 - dampening) * d  on later ones
    d   = d + momentum * buf  with nesterov, else buf
    p   = p - lr * d

The tensors follow each other as all p, all g, all buf; p and buf are written. Without momentum there is no buf, and
p = p - lr * (g + weight_decay * p). lr: an array (1,), on the device of the tensors, so that a CUDA graph reads the
learning rate of its replay. found: None, or an array (1,): where it is not 0 (a gradient was not finite), nothing
changes. Source: torch.optim.SGD, whose buf has no factor lr in it; Sutskever et al. 2013 for momentum.
"""

from __future__ import annotations

import numpy as np

from ..groups import roles_of
from ..registry import BENCH, TEST, Case, Problem


def roles_with(momentum: float) -> int:
    """How many lists of tensors there are: with momentum buf is the third."""
    return 3 if momentum else 2


def sgd_step_reference(lr, found, *tensors, momentum, dampening, weight_decay, nesterov, first):
    """Overwrite every p and buf, as the formula says."""
    if found is not None and found[0] != 0:
        return
    for p, g, *rest in zip(*roles_of(tensors, roles_with(momentum)), strict=True):
        d = g + weight_decay * p
        for buf in rest:
            buf[...] = d if first else momentum * buf + (1 - dampening) * d
            d = d + momentum * buf if nesterov else buf
        p[...] = p - lr[0] * d


def _case(name, *shapes, momentum=0.9, dampening=0.0, decay=5e-4, nesterov=False, first=False, found=None, tags=TEST):
    step = dict(momentum=momentum, dampening=dampening, weight_decay=decay, nesterov=nesterov, first=first)
    return Case(name, dict(shapes=shapes, step=step, found=found), tags)


def resnet_shapes(blocks: tuple[int, ...], width: int, classes: int, stem: int) -> list[tuple[int, ...]]:
    """Of the parameters of a ResNet of basic blocks: convolutions, two vectors of every BatchNorm, the classifier."""
    convolutions, c = [(width, 3, stem, stem)], width
    for stage, count in enumerate(blocks):
        for _ in range(count):
            k = width << stage
            convolutions += [(k, c, 3, 3), (k, k, 3, 3)]
            c = k
    vectors = [(shape[0],) for shape in convolutions for _ in range(2)]
    return [*convolutions, *vectors, (classes, c), (classes,)]


RESNET20, RESNET18 = resnet_shapes((3, 3, 3), 16, 10, 3), resnet_shapes((2, 2, 2, 2), 64, 1000, 7)
CASES = (
    _case("momentum", (5, 3, 3, 3), (7,)),
    _case("first_step", (7,), first=True),
    _case("plain", (6, 5), (3,), momentum=0.0),
    _case("plain_no_decay", (4,), momentum=0.0, decay=0.0),
    _case("dampening", (3, 4, 1, 1), dampening=0.3),
    _case("nesterov", (4, 3, 2, 2), (2, 3), nesterov=True),
    _case("nesterov_first", (4, 3), nesterov=True, first=True),
    _case("one_number", (), (1,), ()),
    _case("empty_among_others", (3,), (0, 2), (5, 4), (0,)),
    _case("all_finite", (5, 3), (4,), found=0.0),
    _case("not_finite", (5, 3), (4,), found=1.0),
    _case("blocks", (3, 30_000), (11,), (4097,), (70_000,)),  # several blocks, and tails
    _case("many", *[(i % 7,) for i in range(90)]),  # more than one launch takes
    _case("resnet20", *RESNET20, tags=BENCH),
    _case("resnet18", *RESNET18, tags=BENCH),
)


def _inputs(case, rng):
    shapes, step = case.params["shapes"], case.params["step"]
    found = None if case.params["found"] is None else np.array([case.params["found"]])
    roles = ("p", "g", "buf")[: roles_with(step["momentum"])]
    tensors = {f"{role}{i}": np.asarray(rng.standard_normal(shape)) for role in roles for i, shape in enumerate(shapes)}
    return dict(lr=np.array([0.1]), found=found) | tensors, dict(step)


def _count(tensors, momentum) -> int:
    return sum(int(np.prod(p.shape)) for p in roles_of(tensors, roles_with(momentum))[0])


def _flops(lr, found, *tensors, momentum, weight_decay, nesterov, first, **_):
    each = 2 + 2 * bool(weight_decay)
    if momentum:
        each += (0 if first else 3) + 2 * nesterov
    return each * _count(tensors, momentum)


def _bytes(lr, found, *tensors, momentum, first, **_):
    """Read p, g and buf (not on the first step), write p and buf."""
    passes = 3 if not momentum else 4 if first else 5
    return passes * lr.dtype.itemsize * _count(tensors, momentum)


def _error(lr, found, *tensors, momentum, dampening, weight_decay, nesterov, first):
    """Of every p, then of every buf: the formula with every term positive; exactly nothing where nothing changes."""
    roles = roles_of(tensors, roles_with(momentum))
    if found is not None and found[0] != 0:
        return tuple(np.zeros(a.shape) for role in (roles[0], *roles[2:]) for a in role)
    of_p, of_buf = [], []
    for p, g, *rest in zip(*roles, strict=True):
        d = np.abs(g) + abs(weight_decay) * np.abs(p)
        for buf in rest:
            b = d if first else abs(momentum) * np.abs(buf) + abs(1 - dampening) * d
            of_buf.append(b)
            d = d + abs(momentum) * b if nesterov else b
        of_p.append(np.abs(p) + np.abs(lr[0]) * d)
    return *of_p, *of_buf


SGD_STEP = Problem(
    "sgd_step", sgd_step_reference, _inputs, CASES, _flops, _bytes, error_scale=_error, writes=("p", "buf")
)
