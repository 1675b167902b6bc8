"""The kernel tree: raw arrays in, raw arrays out. It knows nothing of Tensor or autograd.

Importing a folder registers its kernels. See README.md in this folder for the legend of symbols and how to add one.
"""

if __name__ != "minires.kernels":
    raise ImportError("this folder is installed as minires.kernels; `import kernels` would build a second registry")

from . import (
    adamw,
    augment,
    batchnorm2d,
    conv2d,
    dropout,
    elementwise,
    linear,
    pad,
    pool2d,
    sgd,
    softmax_cross_entropy,
    unscale,
)

__all__ = [
    "adamw",
    "augment",
    "batchnorm2d",
    "conv2d",
    "dropout",
    "elementwise",
    "linear",
    "pad",
    "pool2d",
    "sgd",
    "softmax_cross_entropy",
    "unscale",
]
