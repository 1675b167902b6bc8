"""Max pooling: the gradient goes to the winner, and one pixel may win more than once.

    y[n, c, p, q] = the greatest x[n, c, h, w] of the window (p, q)

x is (N, C, H, W); y, dy and indices are (N, C, P, Q). The forward pass has noted where each winner stood:
indices[n, c, p, q] = h * W + w, its place in the flattened image. Write `backward`, which hands every dy to its winner.

By hand, in one dimension: x = [1, 4, 2] with windows of 2 and stride 1 gives y = [4, 4] and indices = [1, 1]. For
dy = [10, 1], dx = [0, 11, 0].
"""

import numpy as np


def backward(dy: np.ndarray, indices: np.ndarray, *, input_hw: tuple[int, int]) -> np.ndarray:
    """dx of the shape (N, C, H, W), where input_hw = (H, W)."""
    raise NotImplementedError("write me")
