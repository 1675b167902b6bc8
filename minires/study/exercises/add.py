"""Addition with broadcasting: where one number was used often, its gradients are summed.

    y = a + b

where a and b may have different shapes; NumPy stretches axes of length 1, and missing ones at the front, to fit. Write
`backward`: it is given the gradient of y and answers with those of a and b, each in its operand's own shape.

By hand: a of shape (2, 3), b of shape (3,) and dy = [[1, 2, 3], [4, 5, 6]] give da = dy and db = [5, 7, 9]: every
number of b was used in both rows.

This is the op of the skip connection, h + f(h): there the shapes are equal, and both sides get all of dy.
"""

import numpy as np


def backward(dy: np.ndarray, *, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(da, db), of the shapes a_shape and b_shape. dy has the shape that a + b has."""
    raise NotImplementedError("write me")
