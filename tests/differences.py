"""Gradients by central differences in float64, element by element: the oracle of the tests of single ops."""

import numpy as np

from minires import Tensor

STEP = 6e-6  # cube root of float64's eps: the truncation error (h^2) and the rounding error (eps / h) meet near 1e-10
TOLERANCE = 1e-7  # leaves room for third derivatives and values up to some hundred


def check_gradients(fn, *arrays, seed=0, tolerance=TOLERANCE):
    """Compare backward of `fn(*tensors)` under a random upstream gradient with central differences; return y.

    Also checks that neither the inputs nor the upstream gradient were written into, and shapes and dtypes.
    """
    arrays = [np.asarray(a, np.float64) for a in arrays]
    before = [a.copy() for a in arrays]
    tensors = [Tensor(a, requires_grad=True) for a in arrays]
    y = fn(*tensors)
    dy = np.random.default_rng(seed).standard_normal(y.shape)
    kept = dy.copy()
    y.backward(Tensor(dy))
    np.testing.assert_array_equal(dy, kept)
    for i, (tensor, array, original) in enumerate(zip(tensors, arrays, before, strict=True)):
        np.testing.assert_array_equal(array, original)
        assert tensor.grad is not None, f"input {i} got no gradient"
        assert tensor.grad.shape == array.shape and tensor.grad.dtype == array.dtype
        expected = np.empty(array.shape)
        for at in np.ndindex(array.shape):
            sides = []
            for h in (STEP, -STEP):
                moved = [a.copy() for a in arrays]
                moved[i][at] += h
                sides.append((fn(*map(Tensor, moved)).array * dy).sum())
            expected[at] = (sides[0] - sides[1]) / (2 * STEP)
        np.testing.assert_allclose(tensor.grad.array, expected, rtol=tolerance, atol=tolerance, err_msg=f"input {i}")
    return y
