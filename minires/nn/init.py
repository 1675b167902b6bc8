"""Initial values of parameters. Every function fills a Tensor in place, outside the graph, and returns it.

fan_in is the number of products that are summed into one output, fan_out the number of outputs that one input reaches:
for weights (O, I, *taps), fan_in = I * prod(taps) and fan_out = O * prod(taps).

    kaiming   std = gain / sqrt(fan)                       He et al. 2015 (arXiv:1502.01852), eq. 10 and 14
    xavier    std = gain * sqrt(2 / (fan_in + fan_out))    Glorot and Bengio 2010, eq. 12 and 16
    uniform forms draw from [-sqrt(3) * std, sqrt(3) * std], which has that standard deviation

Numbers are drawn in float64 and rounded, so a model has the same weights, up to rounding, in every dtype. generator: a
`numpy.random.Generator`; by default the one that `minires.manual_seed` seeds.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from ..device import to_device
from ..engine import Tensor
from ..random import default_generator

Generator = np.random.Generator
Mode = Literal["fan_in", "fan_out"]


def constant_(tensor: Tensor, val: float) -> Tensor:
    """Every element is `val`."""
    tensor.array[...] = val
    tensor.version[0] += 1
    return tensor


def zeros_(tensor: Tensor) -> Tensor:
    """Every element is 0."""
    return constant_(tensor, 0)


def ones_(tensor: Tensor) -> Tensor:
    """Every element is 1."""
    return constant_(tensor, 1)


def uniform_(tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Uniform in [a, b)."""
    return _fill(tensor, (generator or default_generator).uniform(a, b, tensor.shape))


def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Normal of that mean and standard deviation; ValueError for std < 0."""
    return _fill(tensor, (generator or default_generator).normal(mean, std, tensor.shape))


def trunc_normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    generator: Generator | None = None,
) -> Tensor:
    """Normal, drawn again where it falls outside [a, b], which are values, not multiples of std (as in PyTorch).

    Raises ValueError where [a, b] is empty or wholly more than two std from the mean.
    """
    if not a < b or mean < a - 2 * std or mean > b + 2 * std:
        raise ValueError(f"trunc_normal_: [{a}, {b}] must reach to within two std ({std}) of the mean ({mean})")
    rng = generator or default_generator
    values = rng.normal(mean, std, tensor.shape)
    while (outside := (values < a) | (values > b)).any():
        values[outside] = rng.normal(mean, std, int(outside.sum()))
    return _fill(tensor, values)


def kaiming_normal_(
    tensor: Tensor,
    a: float = 0.0,
    mode: Mode = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator | None = None,
) -> Tensor:
    """Normal with mean 0 and std = gain / sqrt(fan); a: the negative slope of leaky_relu (0: ReLU)."""
    return normal_(tensor, 0.0, _kaiming_std(tensor, a, mode, nonlinearity), generator)


def kaiming_uniform_(
    tensor: Tensor,
    a: float = 0.0,
    mode: Mode = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator | None = None,
) -> Tensor:
    """Uniform with mean 0 and std = gain / sqrt(fan); a: the negative slope of leaky_relu (0: ReLU)."""
    bound = math.sqrt(3) * _kaiming_std(tensor, a, mode, nonlinearity)
    return uniform_(tensor, -bound, bound, generator)


def xavier_normal_(tensor: Tensor, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Normal with mean 0 and std = gain * sqrt(2 / (fan_in + fan_out))."""
    return normal_(tensor, 0.0, gain * math.sqrt(2 / sum(fans(tensor))), generator)


def xavier_uniform_(tensor: Tensor, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Uniform with mean 0 and std = gain * sqrt(2 / (fan_in + fan_out))."""
    bound = gain * math.sqrt(6 / sum(fans(tensor)))
    return uniform_(tensor, -bound, bound, generator)


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """How much larger weights must be to make up for what the nonlinearity takes from the variance.

    param: the negative slope of leaky_relu (default 0.01). ValueError for a nonlinearity that is not known.
    """
    if nonlinearity == "leaky_relu":
        return math.sqrt(2 / (1 + (0.01 if param is None else param) ** 2))
    gains = {"linear": 1.0, "conv2d": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2), "selu": 3 / 4}
    if nonlinearity not in gains:
        raise ValueError(f"unknown nonlinearity {nonlinearity!r}; known: {', '.join([*gains, 'leaky_relu'])}")
    return gains[nonlinearity]


def fans(tensor: Tensor) -> tuple[int, int]:
    """(fan_in, fan_out) of weights (O, I, *taps); ValueError for fewer than two axes."""
    if tensor.ndim < 2:
        raise ValueError(f"fan_in and fan_out need weights (O, I, ...), not shape {tensor.shape}")
    taps = math.prod(tensor.shape[2:])
    return tensor.shape[1] * taps, tensor.shape[0] * taps


def _kaiming_std(tensor: Tensor, a: float, mode: str, nonlinearity: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode={mode!r} must be 'fan_in' or 'fan_out'")
    return calculate_gain(nonlinearity, a) / math.sqrt(fans(tensor)[mode == "fan_out"])


def _fill(tensor: Tensor, values: Any) -> Tensor:
    tensor.data = to_device(values, tensor.device)
    return tensor
