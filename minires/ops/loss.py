"""Losses. The mean squared error and the negative log-likelihood are here, the others on their own pages.

    mse_loss   l = (x - t)^2               dx = 2 (x - t) dl      dt = -dx
    nll_loss   l[n] = -w[t] * x[n, t]      dx[n, k] = -w[t] * dl[n] * [k = t]

The loss is l, its sum or its mean (of nll_loss over the sum of w[t]; ignored rows weigh 0). As in PyTorch.

Saved for backward: mse x - t; nll the target and the weights.
"""

from __future__ import annotations

from ..autocast import autocasts
from ..device import namespace_of
from ..engine import Function, Tensor
from .cross_entropy import cross_entropy
from .softmax import log_softmax, softmax
from .targets import check_reduction, class_axis, class_targets, reduced, spread

__all__ = ["cross_entropy", "log_softmax", "mse_loss", "nll_loss", "softmax"]


class MSELoss(Function):
    @staticmethod
    def forward(ctx, x, t, *, reduction: str):
        difference = x - t
        ctx.save_for_backward(difference)
        return reduced(difference * difference, reduction, difference.size)

    @staticmethod
    def backward(ctx, dy):
        (difference,) = ctx.saved_for_backward
        dloss = spread(dy, difference.shape, ctx.params["reduction"], difference.size)
        dx = 2 * difference * dloss
        return dx, -dx if ctx.needs_grad[1] else None


class NLLLoss(Function):
    """target: int64, of x's shape without the classes; weights: of each row, or None."""

    @staticmethod
    def forward(ctx, x, target, weights, *, reduction: str, divisor: float):
        ctx.save_for_backward(target, weights)
        axis, xp = class_axis(x), namespace_of(x)
        loss = -xp.take_along_axis(x, xp.expand_dims(target, axis), axis).reshape(target.shape)
        if weights is not None:  # an ignored row may hold anything, an infinity too
            loss = xp.where(weights == 0, 0, loss) * weights
        return reduced(loss, reduction, divisor)

    @staticmethod
    def backward(ctx, dy):
        (target, weights), x_shape, xp = ctx.saved_for_backward, ctx.input_shapes[0], namespace_of(dy)
        axis = min(len(x_shape) - 1, 1)
        dloss = spread(dy, target.shape, ctx.params["reduction"], ctx.params["divisor"])
        dloss = dloss if weights is None else dloss * weights
        classes = xp.arange(x_shape[axis]).reshape(-1, *(1,) * (len(x_shape) - axis - 1))
        return -xp.where(xp.expand_dims(target, axis) == classes, xp.expand_dims(dloss, axis), 0), None, None


@autocasts
def mse_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """The squared differences of two tensors of one shape: their "mean", "sum", or each ("none").

    ValueError where the shapes differ (broadcasting here is mostly a mistake), TypeError where the dtypes do.
    """
    check_reduction("mse_loss", reduction)
    if input.shape != target.shape:
        raise ValueError(f"mse_loss: input {input.shape} and target {target.shape} differ in shape; expand one first")
    if input.dtype != target.dtype or input.dtype.kind in "iub":
        raise TypeError(f"mse_loss: input {input.dtype} and target {target.dtype} must be of one floating dtype")
    return MSELoss.apply(input, target, reduction=reduction)


@autocasts
def nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    """The negative log-likelihood of classes `target` (N,), () or (N, d1, ...) under log-probabilities `input`.

    input: (N, K), (K,) or (N, K, d1, ...), as `log_softmax` gives them. weight, reduction, ignore_index and errors as
    in `cross_entropy`.
    """
    check_reduction("nll_loss", reduction)
    classes, weights, divisor = class_targets("nll_loss", input, target, weight, ignore_index)
    return NLLLoss.apply(input, classes, weights, reduction=reduction, divisor=divisor)
