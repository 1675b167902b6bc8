"""Batch normalisation, also with a residual and a ReLU behind it (fused.py).

    y = act(gamma * x_hat + beta + z)        x_hat = (x - mean) * inv_std        inv_std = 1 / sqrt(var + eps)

x, z (N, C, H, W); gamma, beta (C,). In training mean and var are those of x over N, H, W (m numbers per channel; var
is sum (x - mean)² / m), and the running statistics move towards them; in evaluation the running ones are used.

Saved for backward: x, gamma, beta, mean, inv_std, and y where a ReLU follows a residual (for its sign, and the next op
keeps y anyway; without z, x tells it). With g = dy where y > 0 (all of dy without ReLU) and sums over N, H, W:

    dbeta = sum g      dgamma = sum g * x_hat      dz = g

In evaluation dx = gamma * inv_std * g. In training x also moves mean and var. Write dx_hat = gamma * g; then

    d x_hat[j] / d x[i] = inv_std * ([i = j] - 1/m - x_hat[i] x_hat[j] / m)

(1/m from the mean; the last term from d inv_std / d x[i] = -inv_std² x_hat[i] / m), and summed over j

    dx = inv_std * (dx_hat - sum dx_hat / m - x_hat * sum(dx_hat * x_hat) / m)
       = gamma * inv_std * (g - dbeta/m - x_hat * dgamma/m)

Source: Ioffe & Szegedy 2015 (arXiv:1502.03167), algorithm 1 and section 3. The running variance takes the unbiased
estimate, var * m / (m - 1), as in PyTorch.
"""

from __future__ import annotations

import math
from typing import Any

from ..device import namespace_of
from ..dispatch import call_noted, run
from ..engine import Function, Tensor
from .shape import reshape


class BatchNorm(Function):
    fresh = True

    @staticmethod
    def forward(ctx, x, gamma, beta, z, running_mean, running_var, *, training, momentum, eps, relu, statistics):
        xp, c = namespace_of(x), x.shape[1]
        ctx.dtypes = [getattr(a, "dtype", None) for a in (x, gamma, beta, z)]
        wide = "float32" if x.dtype.itemsize == 2 else x.dtype
        gamma = xp.ones(c, wide) if gamma is None else _wide(gamma)
        beta = xp.zeros(c, wide) if beta is None else _wide(beta)
        y = None
        if training and not statistics:
            y, mean, var = run("batchnorm2d_fprop_train", x, gamma, beta, z, eps=eps, relu=relu)
        else:  # the convolution before has summed them
            mean, var = statistics if training else map(_wide, (running_mean, running_var))
        inv_std = xp.empty_like(var, dtype=var.dtype if var.dtype.kind in "fcV" else "float64")
        call_noted(_invert, var, eps, inv_std)
        if y is None:
            y = run("batchnorm2d_fprop_infer", x, gamma, beta, mean, inv_std, z, relu=relu)
        if training and running_mean is not None and x.size:
            m = x.size // c
            call_noted(move, running_mean, mean, momentum)
            call_noted(move, running_var, var, momentum, m / (m - 1))
        ctx.save_for_backward(x, y if relu and z is not None else None, gamma, beta, mean, inv_std)
        return y

    @staticmethod
    def backward(ctx, dy):
        training, relu, residual = ctx.params["training"], ctx.params["relu"], ctx.needs_grad[3]
        params = dict(training=training, relu=relu, residual=residual)
        grads = zip(
            run("batchnorm2d_bwd", dy, *ctx.saved_for_backward, **params), ctx.dtypes, ctx.needs_grad[:4], strict=True
        )
        return *(d.astype(dtype, copy=False) if needed else None for d, dtype, needed in grads), None, None


def _wide(a: Any) -> Any:
    """Parameters and statistics of 16 bits as float32, in which they are computed."""
    return a.astype("float32") if a is not None and a.dtype.itemsize == 2 else a


def _invert(var: Any, eps: float, out: Any) -> None:
    out[...] = 1 / namespace_of(var).sqrt(var + eps)


def move(running: Any, value: Any, momentum: float, factor: float = 1.0) -> None:
    """running = (1 - momentum) * running + momentum * factor * value, in place; of a complex value the real part."""
    running *= 1 - momentum
    running += momentum * (factor * (value if running.dtype.kind == "c" else value.real))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise every channel of `input` (N, C), (N, C, L) or (N, C, H, W); see the page's head for the formula.

    running_mean, running_var, weight, bias: (C,). Weight and bias may be None (1 and 0), the running statistics too
    in training; there they are updated in place: (1 - momentum) * running + momentum * batch's, with the unbiased
    variance. Raises ValueError naming the sizes that do not fit, and where training has one value per channel.
    """
    return normalise(input, None, running_mean, running_var, weight, bias, training, momentum, eps, relu=False)


def normalise(
    input: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> Tensor:
    """`batch_norm`, then `+ residual` (None, or of input's shape and dtype), then, if `relu`, ReLU: one op."""
    shape = input.shape
    _check(shape, input, training, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    if input.ndim != 4:
        size = (*shape[:2], 1, math.prod(shape[2:])) if shape != (0,) else (0, 0, 1, 1)
        input = reshape(input, size)
        residual = residual if residual is None else reshape(residual, size)
    summed, version, count = input.statistics or (None, [], 0)
    known = summed if input.version is version and version[0] == count else None  # not written into since
    params = dict(training=training, momentum=momentum, eps=eps, relu=relu, statistics=known)
    y = BatchNorm.apply(input, weight, bias, residual, running_mean, running_var, **params)
    if training and running_mean is not None and running_var is not None:
        for running in (running_mean, running_var):  # written by forward
            running.version[0] += 1
    return y if y.shape == shape else reshape(y, shape)


def _check(shape: tuple[int, ...], input: Tensor, training: bool, **per_channel: Tensor | None) -> None:
    if len(shape) not in (2, 3, 4) and shape != (0,):
        raise ValueError(f"batch_norm: input must be (N, C), (N, C, L) or (N, C, H, W), not {shape}")
    c = shape[1] if len(shape) > 1 else 0
    for name, t in per_channel.items():
        if t is not None and t.shape != (c,):
            raise ValueError(f"batch_norm: {name} has shape {t.shape}, input {shape} needs ({c},)")
        if t is not None and t.dtype != input.dtype and {input.dtype.name, t.dtype.name} == {"float32", "float64"}:
            raise TypeError(f"batch_norm: input is {input.dtype} and {name} {t.dtype}; convert one with .to(dtype)")
    if (per_channel["running_mean"] is None) != (per_channel["running_var"] is None):
        raise ValueError("batch_norm: running_mean and running_var must be given together, or neither")
    if not training and per_channel["running_mean"] is None:
        raise ValueError("batch_norm: running_mean and running_var must be given in evaluation (training=False)")
    if training and math.prod(shape) == c > 0:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
