"""BatchNorm in training: every number of a channel also moves the mean and the variance that divide it.

    x_hat = (x - mean) * inv_std         inv_std = 1 / sqrt(var + eps)
    y     = gamma * x_hat + beta

x, y and dy have the shape (N, C, H, W); gamma, beta, mean and inv_std have (C,). mean and var are those of x itself,
over N, H and W: m = N * H * W numbers for each channel.

Write `backward`. dbeta and dgamma are sums. dx has three terms: x[i] reaches y[i] directly, it moves the mean that is
subtracted from all m numbers, and it moves the variance that divides them all.

By hand: one channel with x = [1, 3], so mean = 2, inv_std = 1 (forget eps) and x_hat = [-1, 1]. With gamma = 1 and
dy = [1, 0]: dbeta = 1, dgamma = -1, dx = [0, 0]. Two numbers normalise to -1 and 1 whatever they are, so nothing that
one does to them can change y, and every gradient of x is 0.
"""

import numpy as np


def backward(
    dy: np.ndarray, x: np.ndarray, gamma: np.ndarray, mean: np.ndarray, inv_std: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dx, dgamma, dbeta), of the shapes (N, C, H, W), (C,) and (C,)."""
    raise NotImplementedError("write me")
