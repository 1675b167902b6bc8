"""Convolution: the same filter everywhere, so its gradient is a sum over everywhere.

    y[n, k, p, q] = sum over c, r, s of xp[n, c, p*u + r, q*v + s] * w[k, c, r, s]

x is (N, C, H, W), w (K, C, R, S), y and dy (N, K, P, Q). stride = (u, v). xp is x with padding = (a, b): a rows of
zeros above and below, b columns left and right. (As everywhere in deep learning, the filter is not flipped.)

Write two functions: `dgrad`, the gradient of the data, and `wgrad`, the gradient of the weights. Take them one after
the other; each is graded by itself.

By hand, in one dimension: x = [1, 2, 3] and w = [10, 1] without padding give y = [12, 23]. For dy = [1, 5]:
dx = [10*1, 1*1 + 10*5, 1*5] = [10, 51, 5], and dw = [1*1 + 2*5, 2*1 + 3*5] = [11, 17].
"""

import numpy as np


def dgrad(
    dy: np.ndarray, w: np.ndarray, *, stride: tuple[int, int], padding: tuple[int, int], input_hw: tuple[int, int]
) -> np.ndarray:
    """dx of the shape (N, C, H, W), where input_hw = (H, W)."""
    raise NotImplementedError("write me")


def wgrad(
    x: np.ndarray, dy: np.ndarray, *, stride: tuple[int, int], padding: tuple[int, int], kernel_hw: tuple[int, int]
) -> np.ndarray:
    """dw of the shape (K, C, R, S), where kernel_hw = (R, S)."""
    raise NotImplementedError("write me")
