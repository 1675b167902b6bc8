"""Padding by slices, on both devices."""

from __future__ import annotations

from ..memory import empty, from_order, order_of
from ..registry import kernel
from .problem import PAD, inside, pad_reference, padded_shape

kernel(PAD, device="cpu", step=0, note="the definition", dtypes=("any",))(pad_reference)


@kernel(PAD, device="cpu", step=1, note="slices, in the memory order of x", dtypes=("any",))
def pad_slices(x, *, before, after, interior, value):
    order, shape = order_of(x), padded_shape(x.shape, before, after, interior)
    y = empty(tuple(shape[axis] for axis in order), x.dtype, x)
    y[...] = value
    y = from_order(y, order)
    y[inside(x.shape, before, interior)] = x
    return y


kernel(PAD, device="cuda", step=1, note="CuPy's copies of slices", dtypes=("any",), name="pad_cupy")(pad_slices)
