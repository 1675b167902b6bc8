"""The ops under PyTorch's functional names: `import minires.nn.functional as F`."""

from __future__ import annotations

import numpy as np

from ..device import namespace_of
from ..engine import Tensor
from ..ops.activation import relu, sigmoid, tanh
from ..ops.batch_norm import batch_norm
from ..ops.conv import conv2d
from ..ops.dropout import dropout
from ..ops.fused import bn_add_relu, bn_relu, conv_bias_act
from ..ops.loss import cross_entropy, log_softmax, mse_loss, nll_loss, softmax
from ..ops.matmul import linear
from ..ops.pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from ..ops.shape import pad

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "bn_add_relu",
    "bn_relu",
    "conv2d",
    "conv_bias_act",
    "cross_entropy",
    "dropout",
    "linear",
    "log_softmax",
    "max_pool2d",
    "mse_loss",
    "nll_loss",
    "one_hot",
    "pad",
    "relu",
    "sigmoid",
    "softmax",
    "tanh",
]


def one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """Class numbers (...) as int64 (..., num_classes) with a 1 in each row; -1: as many as the largest number needs.

    Raises ValueError for numbers outside 0 ... num_classes - 1.
    """
    numbers = tensor.array
    if numbers.dtype.kind not in "iu":
        raise TypeError(f"one_hot needs class numbers, not {numbers.dtype}; use .to(np.int64)")
    if not numbers.size and num_classes < 1:
        raise ValueError("one_hot of no numbers needs num_classes")
    classes = int(numbers.max()) + 1 if num_classes == -1 else num_classes
    if numbers.size and (int(numbers.min()) < 0 or int(numbers.max()) >= classes):
        raise ValueError(
            f"one_hot: numbers from {int(numbers.min())} to {int(numbers.max())} do not fit {classes} classes"
        )
    xp = namespace_of(numbers)
    return Tensor((numbers[..., None] == xp.arange(classes)).astype(np.int64))
