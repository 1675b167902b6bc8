"""Padding by slices, on both devices."""

from __future__ import annotations

from ..memory import empty
from ..registry import kernel
from .problem import PAD, inside, pad_reference, padded_shape

kernel(PAD, device="cpu", step=0, note="the definition", dtypes=("any",))(pad_reference)


def by_order(x):
    """The axes of x, from the largest stride to the least: y lies as x does."""
    return tuple(sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis])))


@kernel(PAD, device="cpu", step=1, note="slices, in the memory order of x", dtypes=("any",))
def pad_slices(x, *, before, after, interior, value):
    order, shape = by_order(x), padded_shape(x.shape, before, after, interior)
    y = empty(tuple(shape[axis] for axis in order), x.dtype, x)
    y[...] = value
    y = y.transpose(sorted(range(x.ndim), key=order.__getitem__))
    y[inside(x.shape, before, interior)] = x
    return y


kernel(PAD, device="cuda", step=1, note="CuPy's copies of slices", dtypes=("any",), name="pad_cupy")(pad_slices)
