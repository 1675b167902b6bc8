"""Does an op agree with its definition, forward and backward? For tests that draw shapes, dtypes and memory layouts.

The definition is plain NumPy that takes complex numbers as the analytic function it is, so that its derivative comes
from a complex step, exact to rounding: d/dt f(x + t v) = Im f(x + i h v) / h.
"""

import numpy as np
from hypothesis import strategies as st

from minires import Tensor

_LAYOUTS = ("C", "F", "channels_last", "strided", "backwards")
_DTYPES = st.sampled_from(["float64", "float64", "float32"])
DATA = st.data()
SIZE = st.integers(1, 5)
_SEEDS = st.integers(0, 2**32 - 1)
_H = 1e-30


def laid_out(a, layout):
    """A copy of `a` with the memory order that the layout names."""
    if layout == "F" and a.ndim:
        return np.asfortranarray(a)
    if layout == "channels_last" and a.ndim > 2:
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1)
    if layout == "strided" and a.ndim:
        wide = np.full((*a.shape[:-1], 2 * a.shape[-1]), 7, a.dtype)
        wide[..., ::2] = a
        return wide[..., ::2]
    if layout == "backwards" and a.ndim:
        return a[::-1].copy()[::-1]
    return a.copy(order="C")


def agree(data, op, definition, *shapes, make=None, units=64, kinks=()):
    """Draw inputs of these shapes, and compare `op(*tensors)` with `definition(*arrays)` and their derivatives.

    data: hypothesis's `st.data()`. make(rng, shape): the values, standard normal by default. units: how many roundings
    of the largest number the result may be off. kinks: values that inputs are kept 1e-3 away from.
    Returns the op's result.
    """
    rng, dtype = np.random.default_rng(data.draw(_SEEDS, "seed")), data.draw(_DTYPES, "dtype")
    arrays = [np.asarray((make or _normal)(rng, shape)).astype(dtype) for shape in shapes]
    for kink in kinks:
        arrays = [np.where(np.abs(a - kink) < 1e-3, a + a.dtype.type(0.01), a) for a in arrays]
    arrays = [laid_out(a, data.draw(st.sampled_from(_LAYOUTS), "layout")) for a in arrays]
    before = [a.copy() for a in arrays]
    doubles = [a.astype(np.float64) for a in arrays]
    eps = float(np.finfo(dtype).eps) * units

    tensors = [Tensor(a, requires_grad=True) for a in arrays]
    y, want = op(*tensors), np.asarray(definition(*doubles))
    assert y.shape == want.shape and y.dtype == dtype
    assert np.abs(y.array - want).max(initial=0) <= eps * (1 + np.abs(want).max(initial=0))

    dy = rng.standard_normal(want.shape).astype(dtype)
    layout = data.draw(st.sampled_from((*_LAYOUTS, "one number")), "layout of dy")
    dy = (
        np.broadcast_to(dy.dtype.type(rng.standard_normal()), dy.shape)
        if layout == "one number"
        else laid_out(dy, layout)
    )
    kept = dy.copy()
    y.backward(Tensor(dy))
    assert np.array_equal(dy, kept), "backward wrote into dy"
    for i, (tensor, array, old) in enumerate(zip(tensors, arrays, before, strict=True)):
        assert np.array_equal(array, old), f"input {i} was written into"
        assert tensor.grad is not None, f"input {i} got no gradient"
        assert tensor.grad.shape == array.shape and tensor.grad.dtype == dtype
        direction = rng.standard_normal(array.shape)
        moved = [d + 1j * _H * direction if j == i else d for j, d in enumerate(doubles)]
        slope = dy * np.imag(definition(*moved)) / _H
        share = tensor.grad.array * direction
        error = abs(share.sum(dtype=np.float64) - slope.sum(dtype=np.float64))
        assert error <= eps * (1 + np.abs(share).sum() + np.abs(slope).sum()), (
            f"gradient of input {i} is off by {error}"
        )
    return y


def _normal(rng, shape):
    return rng.standard_normal(shape)


@st.composite
def broadcastable(draw, max_dims=4):
    """Two shapes that broadcast, and not only in the easy ways."""
    whole = draw(st.lists(SIZE, min_size=0, max_size=max_dims))
    shapes = []
    for _ in range(2):
        shape = [1 if draw(st.integers(0, 3)) == 0 else n for n in whole]
        shapes.append(tuple(shape[draw(st.integers(0, len(shape))) if draw(st.booleans()) else 0 :]))
    return shapes
