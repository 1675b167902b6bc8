"""A whole residual branch as one op: convolutions with their batch normalisations, for training.

    a[1] = conv2d(x, w[1])      a[i] = conv2d(relu(bn[i-1](a[i-1])), w[i])      y = relu(bn[n](a[n]) + z)

One op, because what lies between two convolutions need not be stored: a convolution normalises and activates what the
one before left while it reads it, and gives the statistics of its own output while it writes it (problems
`conv2d_norm_act_*`, kernels/conv2d/fused_problem.py, where scale, shift, f are defined).

Saved for backward: x, y, the a[i], and what is per channel; no relu(bn(a)). Backward begins with that of the last
normalisation, dy -> d, dgamma[n], dbeta[n], dz (batch_norm.py), and then, from the last convolution to the first,

    dw[i] = wgrad of relu(bn[i-1](a[i-1])), which is made again, and d
    g, dgamma[i-1], dbeta[i-1] = dgrad of d and w[i], masked by that ReLU, and its sums

of which the next d = f0 g + f1 a[i-1] + f2 is a line per channel that the next dgrad and wgrad compute as they read.

Source: cuDNN's fused operations for ResNet ("Graph API": scale-bias-ReLU-conv-genstats, dgrad-dReLU-dBN, BN-wgrad).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..autocast import low_precision
from ..device import namespace_of
from ..dispatch import run
from ..engine import Function, Tensor, state
from .activation import relu
from .arithmetic import add
from .batch_norm import batch_norm, move
from .conv import conv2d
from .windows import Pair, out_hw

Window = tuple[Pair, Pair, Pair, int]  # stride, padding, dilation, groups
_NAMES = ("stride", "padding", "dilation", "groups")
_PARAMETERS = ("weight", "bias", "running_mean", "running_var")


class ConvBnChain(Function):
    fresh = True

    @staticmethod
    def forward(ctx, x, z, *tensors, windows: tuple[Window, ...], momenta: tuple[float, ...], eps: tuple[float, ...]):
        a, scale, shift, layers = x, None, None, []
        for i, window in enumerate(windows):
            w, gamma, beta, running_mean, running_var = tensors[5 * i : 5 * i + 5]
            a, mean, var = run("conv2d_norm_act_fprop", a, scale, shift, w, **dict(zip(_NAMES, window, strict=True)))
            inv_std = 1 / namespace_of(a).sqrt(var + eps[i])
            scale = gamma * inv_std
            shift = beta - mean * scale
            if running_mean is not None:
                m = a.size // a.shape[1]
                move(running_mean, mean, momenta[i])
                move(running_var, var * (m / (m - 1)), momenta[i])
            layers += [w, a, gamma, beta, scale, shift, mean, inv_std]
        gamma, beta, _, _, mean, inv_std = layers[-6:]
        y = run("batchnorm2d_fprop_infer", a, gamma, beta, mean, inv_std, z, relu=True)
        ctx.save_for_backward(x, y if z is not None else None, *layers)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, y, *saved = ctx.saved_for_backward
        layers = [saved[i : i + 8] for i in range(0, len(saved), 8)]
        _, a, gamma, beta, _, _, mean, inv_std = layers[-1]
        how = dict(training=True, relu=True, residual=ctx.needs_grad[1])
        d, dgamma, dbeta, dz = run("batchnorm2d_bwd", dy, a, y, gamma, beta, mean, inv_std, **how)
        f, after, grads = None, None, []  # d is whole; from the next convolution on it comes as g, a and f
        for i in range(len(layers) - 1, -1, -1):
            w, window = layers[i][0], dict(zip(_NAMES, ctx.params["windows"][i], strict=True))
            inner, scale, shift, mean, inv_std = x, None, None, None, None
            if i > 0:
                _, inner, _, _, scale, shift, mean, inv_std = layers[i - 1]
            dw = None
            if ctx.needs_grad[5 * i + 2]:
                arrays = inner, scale, shift, d, after, f
                dw = run("conv2d_norm_act_wgrad", *arrays, **window, kernel_hw=w.shape[2:])
            grads = [dw, dgamma, dbeta, None, None, *grads]
            if i > 0 or ctx.needs_grad[0]:
                before = (inner if i > 0 else None), scale, shift, mean, inv_std
                arrays = d, after, f, w, *before
                d, dgamma, dbeta, f = run("conv2d_norm_act_dgrad", *arrays, **window, input_hw=inner.shape[2:])
                after = inner
        return d if ctx.needs_grad[0] else None, dz if ctx.needs_grad[1] else None, *grads


def conv_bn_chain(
    input: Tensor,
    residual: Tensor | None,
    weights: Sequence[Tensor],
    norms: Sequence[dict[str, Any]],
    windows: Sequence[Window],
) -> Tensor:
    """For each weight `x = relu(batch_norm(conv2d(x, w, None, *window), **norm))`, the last with `+ residual` in it

    input (N, C, H, W). weights: one per convolution; norms: the keywords of the `batch_norm` after each (running_mean,
    running_var, weight, bias, training, momentum, eps); windows: (stride, padding, dilation, groups). residual: None,
    or like the result. As one op in training, on a GPU in 16 bits, on the CPU in float32 and float64; else as that
    line, which also raises the errors of `conv2d` and `batch_norm`. On the CPU one op is no faster.
    """
    input, *weights = low_precision(input, *weights)
    if not (state.fuse and _fits(input, residual, weights, norms, windows)):
        return _line(input, residual, weights, norms, windows)
    tensors = [t for w, norm in zip(weights, norms, strict=True) for t in (w, *(norm[name] for name in _PARAMETERS))]
    about = {name: tuple(norm[key] for norm in norms) for name, key in (("momenta", "momentum"), ("eps", "eps"))}
    y = ConvBnChain.apply(input, residual, *tensors, windows=tuple(windows), **about)
    for norm in norms:
        for running in (norm["running_mean"], norm["running_var"]):
            if running is not None:  # written by forward
                running.version[0] += 1
    return y


def _line(x: Tensor, residual: Tensor | None, weights: Any, norms: Any, windows: Any) -> Tensor:
    for i, (w, norm, window) in enumerate(zip(weights, norms, windows, strict=True)):
        x = batch_norm(conv2d(x, w, None, *window), **norm)
        x = relu(x if residual is None or i < len(weights) - 1 else add(x, residual))
    return x


def _fits(x: Tensor, residual: Tensor | None, weights: Any, norms: Any, windows: Any) -> bool:
    """Whether there are kernels for it, and no error to raise."""
    if x.ndim != 4 or any(w.ndim != 4 or w.dtype != x.dtype for w in weights):
        return False
    n, c, hw = x.shape[0], x.shape[1], x.shape[2:]
    sizes = [c]
    for w, norm, window in zip(weights, norms, windows, strict=True):
        parameters = [norm[name] for name in _PARAMETERS if norm[name] is not None]
        if not norm["training"] or norm["weight"] is None or norm["bias"] is None:
            return False
        if any(p.shape != w.shape[:1] for p in parameters):
            return False
        hw = out_hw(hw, w.shape[2:], *window[:3])
        if window[3] != 1 or w.shape[1] != sizes[-1] or min(hw) < 1 or n * hw[0] * hw[1] < 2:
            return False
        sizes.append(w.shape[0])
    if residual is not None and (residual.shape != (n, sizes[-1], *hw) or residual.dtype != x.dtype):
        return False
    if x.device.type == "cpu":
        return x.dtype in ("float32", "float64")
    return x.dtype in ("float16", "bfloat16") and not any(size % 8 for size in sizes)
