"""The differentiable ops, forward and backward by hand. Importing this package gives Tensor its operators."""

from . import tensor  # noqa: F401  (attaches the operators)
from .activation import relu, sigmoid, tanh
from .arithmetic import add, div, mul, pow, sub
from .axes import expand, permute, t, transpose
from .batch_norm import batch_norm
from .choice import clamp, maximum, minimum, where
from .conv import conv2d
from .dropout import dropout
from .extremes import amax, amin, argmax, argmin, max, min, topk
from .fused import bn_add_relu, bn_relu, conv_bias_act
from .indexing import getitem
from .loss import cross_entropy, mse_loss, nll_loss
from .matmul import linear, matmul
from .pointwise import abs, cos, exp, log, neg, sin, sqrt
from .pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from .reduce import mean, norm, std, sum, var
from .shape import cat, flatten, pad, reshape, squeeze, stack, unsqueeze, view
from .softmax import log_softmax, softmax

__all__ = [
    "abs",
    "adaptive_avg_pool2d",
    "add",
    "amax",
    "amin",
    "argmax",
    "argmin",
    "avg_pool2d",
    "batch_norm",
    "bn_add_relu",
    "bn_relu",
    "cat",
    "clamp",
    "conv2d",
    "conv_bias_act",
    "cos",
    "cross_entropy",
    "div",
    "dropout",
    "exp",
    "expand",
    "flatten",
    "getitem",
    "linear",
    "log",
    "log_softmax",
    "matmul",
    "max",
    "max_pool2d",
    "maximum",
    "mean",
    "min",
    "minimum",
    "mse_loss",
    "mul",
    "neg",
    "nll_loss",
    "norm",
    "pad",
    "permute",
    "pow",
    "relu",
    "reshape",
    "sigmoid",
    "sin",
    "softmax",
    "sqrt",
    "squeeze",
    "stack",
    "std",
    "sub",
    "sum",
    "t",
    "tanh",
    "topk",
    "transpose",
    "unsqueeze",
    "var",
    "view",
    "where",
]
