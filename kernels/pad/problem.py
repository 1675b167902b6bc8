"""x among copies of one value: along each axis `before` of them, the numbers of x with `interior` between two, `after`.

    y[..., before + i * (1 + interior), ...] = x[..., i, ...]          elsewhere y = value

An axis of n numbers becomes one of before + max(n + (n - 1) * interior, 0) + after. With value 0 this is the backward
of a slice (start, step - 1 and what is left); He's shortcut "A" takes every second pixel and pads channels.

Source: XLA's Pad (openxla.org, "Operation semantics"), for padding that is not negative.
"""

from __future__ import annotations

import math

import numpy as np

from ..registry import BENCH, TEST, Case, Problem


def padded_shape(shape, before, after, interior):
    """The shape of y."""
    axes = zip(shape, before, after, interior, strict=True)
    return tuple(a + max(n + (n - 1) * i, 0) + b for n, a, b, i in axes)


def inside(shape, before, interior):
    """Where x lies in y, as slices."""
    axes = zip(shape, before, interior, strict=True)
    return tuple(slice(a, a + max(n + (n - 1) * i, 0), 1 + i) for n, a, i in axes)


def pad_reference(x, *, before, after, interior, value):
    y = np.full(padded_shape(x.shape, before, after, interior), value, x.dtype)
    y[inside(x.shape, before, interior)] = x
    return y


def _case(shape, before, after, interior=None, value=0.0, tags=TEST):
    interior = (0,) * len(shape) if interior is None else interior
    name = f"{'x'.join(map(str, shape))}_{''.join(map(str, (*before, *after, *interior)))}"
    params = dict(shape=shape, before=before, after=after, interior=interior, value=value)
    return Case(name, params, tags)


CASES = (
    _case((5,), (2,), (0,), value=-1.5),
    _case((3, 4), (0, 1), (2, 3), (0, 2)),
    _case((2, 8, 3, 5), (0, 4, 0, 0), (0, 4, 0, 0)),
    _case((2, 3, 4, 5), (1, 0, 2, 0), (0, 1, 0, 3), (1, 0, 0, 2), 7.0),
    _case((1, 16, 3, 3), (0, 0, 0, 0), (0, 0, 1, 1), (0, 0, 1, 1)),
    _case((2, 0, 3), (1, 1, 1), (0, 1, 0), (2, 3, 0)),
    _case((2, 1, 2, 2, 3), (0, 1, 0, 1, 0), (1, 0, 0, 0, 1)),
    _case((128, 16, 16, 16), (0, 8, 0, 0), (0, 8, 0, 0), tags=BENCH),
    _case((128, 16, 16, 16), (0, 0, 0, 0), (0, 0, 1, 1), (0, 0, 1, 1), tags=BENCH),
)


def _inputs(case, rng):
    params = dict(case.params)
    return dict(x=rng.standard_normal(params.pop("shape"))), params


def _shape(x, before, after, interior, value):
    return padded_shape(x.shape, before, after, interior)


PAD = Problem(
    "pad",
    pad_reference,
    _inputs,
    CASES,
    flops=lambda x, **params: 0,
    bytes_moved=lambda x, **params: (math.prod(x.shape) + math.prod(_shape(x, **params))) * x.dtype.itemsize,
    error_scale=lambda x, **params: np.zeros(
        padded_shape(x.shape, *(params[k] for k in ("before", "after", "interior")))
    ),
)
