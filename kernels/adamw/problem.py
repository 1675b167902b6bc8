"""A step of AdamW or Adam for a group of tensors, each p, g, m, v (and most) of one shape and any layouts.

    g = g + weight_decay * p                      with the penalty in the gradient (Adam), else
    p = (1 - lr * weight_decay) * p               decoupled (AdamW)
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g^2
    most = max(most, v), in the place of v below  with amsgrad
    p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

The tensors follow each other as all p, all g, all m, all v (all most); all but g are written. What changes from step to
step is an array on their device, so that a CUDA graph reads that of its replay:

    factors = (1 - lr * weight_decay or 1, sqrt(1 - beta2^t), lr / (1 - beta1^t))

found: None, or an array (1,): where it is not 0 (a gradient was not finite), nothing changes.
Source: Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithm 2; Reddi et al. 2018 (amsgrad); torch.optim.AdamW.
"""

from __future__ import annotations

import numpy as np

from ..groups import roles_of
from ..registry import BENCH, TEST, Case, Problem
from ..sgd.problem import RESNET18, RESNET20

_ROLES = ("p", "g", "m", "v", "most")


def roles_with(amsgrad: bool) -> int:
    """How many lists of tensors there are."""
    return 5 if amsgrad else 4


def adamw_step_reference(factors, found, *tensors, beta1, beta2, eps, penalty, amsgrad):
    """Overwrite every p, m, v and most, as the formula says. penalty: Adam's weight decay; 0 where it is decoupled."""
    if found is not None and found[0] != 0:
        return
    shrink, correction, rate = factors
    for p, g, m, v, *rest in zip(*roles_of(tensors, roles_with(amsgrad)), strict=True):
        g = g + penalty * p
        m[...] = m + (1 - beta1) * (g - m)
        v[...] = beta2 * v + (1 - beta2) * g * g
        largest = v
        for most in rest:
            most[...] = np.where(most > v, most, v)
            largest = most
        p[...] = shrink * p - rate * m / (np.sqrt(largest) / correction + eps)


def _case(name, *shapes, step=3, decay=1e-2, penalty=0.0, amsgrad=False, found=None, tags=TEST):
    settings = dict(beta1=0.9, beta2=0.999, eps=1e-8, penalty=penalty, amsgrad=amsgrad)
    return Case(name, dict(shapes=shapes, step=step, decay=decay, settings=settings, found=found), tags)


CASES = (
    _case("adamw", (5, 3, 3, 3), (7,)),
    _case("first_step", (4, 3), (2,), step=1),
    _case("late_step", (6,), step=100_000),
    _case("adam", (3, 4, 2, 2), (5,), decay=0.0, penalty=0.1),
    _case("amsgrad", (4, 3, 2, 2), (7, 2), amsgrad=True),
    _case("one_number", (), (1,), ()),
    _case("empty_among_others", (3,), (0, 2), (5, 4), (0,)),
    _case("all_finite", (5, 3), (4,), found=0.0),
    _case("not_finite", (5, 3), (4,), found=1.0, amsgrad=True),
    _case("blocks", (3, 30_000), (11,), (4097,), (70_000,)),
    _case("many", *[(i % 7,) for i in range(90)], amsgrad=True),
    _case("resnet20", *RESNET20, tags=BENCH),
    _case("resnet18", *RESNET18, tags=BENCH),
)


def _inputs(case, rng):
    p, settings = case.params, case.params["settings"]
    lr, t = 1e-3, p["step"]
    factors = (1 - lr * p["decay"], (1 - settings["beta2"] ** t) ** 0.5, lr / (1 - settings["beta1"] ** t))
    found = None if p["found"] is None else np.array([p["found"]])
    draw = {"v": lambda shape: rng.random(shape), "most": lambda shape: rng.random(shape)}  # squares
    roles = _ROLES[: roles_with(settings["amsgrad"])]
    tensors = {
        f"{role}{i}": np.asarray(draw.get(role, rng.standard_normal)(shape))
        for role in roles
        for i, shape in enumerate(p["shapes"])
    }
    return dict(factors=np.array(factors), found=found) | tensors, dict(settings)


def _count(tensors, amsgrad) -> int:
    return sum(int(np.prod(p.shape)) for p in roles_of(tensors, roles_with(amsgrad))[0])


def _error(factors, found, *tensors, beta1, beta2, eps, penalty, amsgrad):
    """Of every p, m, v, most: the formula with every term positive, but for the root, by which it is divided."""
    roles = roles_of(tensors, roles_with(amsgrad))
    if found is not None and found[0] != 0:
        return tuple(np.zeros(a.shape) for role in (roles[0], *roles[2:]) for a in role)
    scales: list[list] = [[] for _ in range(roles_with(amsgrad) - 1)]
    shrink, correction, rate = factors
    for p, g, m, v, *rest in zip(*roles, strict=True):
        d = g + penalty * p
        root = np.sqrt(np.maximum(rest[0], beta2 * v) if rest else beta2 * v + (1 - beta2) * d * d) / correction + eps
        g = np.abs(g) + penalty * np.abs(p)
        of_m = np.abs(m) + (1 - beta1) * (g + np.abs(m))
        of_v = beta2 * v + (1 - beta2) * g * g
        of_p = np.abs(shrink * p) + rate * of_m / root
        for scale, values in zip(scales, (of_p, of_m, of_v, *(np.maximum(most, of_v) for most in rest)), strict=True):
            scale.append(values)
    return tuple(values for scale in scales for values in scale)


ADAMW_STEP = Problem(
    "adamw_step",
    adamw_step_reference,
    _inputs,
    CASES,
    flops=lambda factors, found, *tensors, amsgrad, **_: (14 + amsgrad) * _count(tensors, amsgrad),
    bytes_moved=lambda factors, found, *tensors, amsgrad, **_: (
        (9 if amsgrad else 7) * factors.dtype.itemsize * _count(tensors, amsgrad)
    ),
    error_scale=_error,
    writes=("p", "m", "v", "most"),
)
