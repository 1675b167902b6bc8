"""Gradients of a scaled loss, divided by the scale in place, and whether all are finite: for training in float16.

    found = 1 where any number of any g is infinite or NaN, else what it was
    g     = g * inverse_scale

inverse_scale, found: arrays (1,), on the device of the gradients: nothing waits for it, and a CUDA graph reads what
lies there at its replay. Source: Micikevicius et al. 2018 (arXiv:1710.03740), section 3.2;
torch._amp_foreach_non_finite_check_and_unscale_.
"""

from __future__ import annotations

import numpy as np

from ..registry import BENCH, TEST, Case, Problem
from ..sgd.problem import RESNET18, RESNET20


def unscale_reference(inverse_scale, found, *gradients):
    """Overwrite found and every gradient, as the formula says."""
    for g in gradients:
        if not np.isfinite(g).all():
            found[0] = 1
        g[...] = g * inverse_scale[0]


def _case(name, *shapes, bad=None, found=0.0, scale=2.0**-16, tags=TEST):
    return Case(name, dict(shapes=shapes, bad=bad, found=found, scale=scale), tags)


CASES = (
    _case("finite", (5, 3, 3, 3), (7,)),
    _case("infinite", (5, 3), (7,), (4,), bad=np.inf),
    _case("minus_infinite", (6,), bad=-np.inf),
    _case("nan", (5, 3), (8, 2), bad=np.nan),
    _case("found_before", (3, 4), found=1.0),
    _case("one_number", (), (1,)),
    _case("empty_among_others", (3,), (0, 2), (5, 4), (0,), scale=0.3),
    _case("blocks", (3, 30_000), (11,), (4097,), (70_000,), bad=np.inf),
    _case("many", *[(i % 7,) for i in range(90)], bad=np.nan),
    _case("resnet20", *RESNET20, tags=BENCH),
    _case("resnet18", *RESNET18, tags=BENCH),
)


def _inputs(case, rng):
    p = case.params
    gradients = {f"g{i}": np.asarray(rng.standard_normal(shape)) for i, shape in enumerate(p["shapes"])}
    if p["bad"] is not None:
        gradients[f"g{len(gradients) // 2}"].flat[-1:] = p["bad"]
    return dict(inverse_scale=np.array([p["scale"]]), found=np.array([p["found"]])) | gradients, {}


def _count(gradients) -> int:
    return sum(int(np.prod(g.shape)) for g in gradients)


UNSCALE = Problem(
    "unscale",
    unscale_reference,
    _inputs,
    CASES,
    flops=lambda inverse_scale, found, *gradients: _count(gradients),
    bytes_moved=lambda inverse_scale, found, *gradients: 2 * found.dtype.itemsize * _count(gradients),
    error_scale=lambda inverse_scale, found, *gradients: (np.zeros(1), *(abs(g * inverse_scale[0]) for g in gradients)),
    writes=("found", "g"),
)
