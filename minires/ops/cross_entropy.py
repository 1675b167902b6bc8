"""Cross-entropy of logits with classes or with probabilities.

    l[n] = -w[t] * log_softmax(x[n])[t]                       classes t[n], class weights w
    l[n] = -sum over k of q[n, k] * log_softmax(x[n])[k]      probabilities, where q = w * ((1 - s) * target + s / K)

x (N, K, ...); s is the label smoothing, with which classes become probabilities too. The loss is l, its sum or its
mean: for classes over the sum of w[t] (ignored rows weigh 0), for probabilities over the number of rows. As PyTorch's.

Saved for backward: the log-probabilities and the target. With p = softmax(x):

    cross_entropy         dx[n, k] = dl[n] * w[t] * (p[n, k] - [k = t])     since d log p_t / dx_k = [k = t] - p_k
    soft_cross_entropy    dx[n, k] = dl[n] * (p[n, k] * (sum over j of q[n, j]) - q[n, k])
                          dtarget  = -dl[n] * log p[n, k] * w[k] * (1 - s)
"""

from __future__ import annotations

from typing import Any

from ..autocast import autocasts
from ..device import namespace_of
from ..dispatch import run
from ..engine import Function, Tensor
from .softmax import log_softmax_array
from .targets import check_input, check_reduction, class_axis, class_targets, reduced, spread


class CrossEntropy(Function):
    """Classes. target: int64, of x's shape without the classes; weights: of each row, or None."""

    @staticmethod
    def forward(ctx, x, target, weights, *, reduction: str, divisor: Any):
        xp = namespace_of(x)
        rows = xp.moveaxis(x, class_axis(x), -1).reshape(-1, x.shape[class_axis(x)])
        loss, log_probs = run("softmax_cross_entropy_fprop", rows, target.reshape(-1))
        ctx.save_for_backward(log_probs, target, weights)
        loss = loss.reshape(target.shape)
        if weights is not None:  # an ignored row may hold anything, an infinite loss too
            loss = xp.where(weights == 0, 0, loss) * weights
        return reduced(loss, reduction, divisor)

    @staticmethod
    def backward(ctx, dy):
        (log_probs, target, weights), x_shape = ctx.saved_for_backward, ctx.input_shapes[0]
        dloss = spread(dy, target.shape, ctx.params["reduction"], ctx.params["divisor"])
        dloss = (dloss if weights is None else dloss * weights).reshape(-1)
        dx = run("softmax_cross_entropy_bwd", dloss, log_probs, target.reshape(-1))
        axis = min(len(x_shape) - 1, 1)
        dx = namespace_of(dx).moveaxis(dx.reshape(*target.shape, x_shape[axis]), -1, axis)
        return dx, None, None


class SoftCrossEntropy(Function):
    """Probabilities, of x's shape. weight: broadcasts to x, or None."""

    @staticmethod
    def forward(ctx, x, target, weight, *, smoothing: float, reduction: str, divisor: float):
        axis, xp = class_axis(x), namespace_of(x)
        log_probs, q = log_softmax_array(x, axis), target * (1 - smoothing) + smoothing / x.shape[axis]
        if weight is not None:
            q = q * weight
        ctx.save_for_backward(log_probs, q, weight)
        loss = -(xp.where(q == 0, 0, log_probs) * q).sum(axis)  # 0 log 0 = 0
        ctx.rows = loss.shape
        return reduced(loss, reduction, divisor)

    @staticmethod
    def backward(ctx, dy):
        (log_probs, q, weight), params = ctx.saved_for_backward, ctx.params
        axis, xp = class_axis(q), namespace_of(q)
        dloss = xp.expand_dims(spread(dy, ctx.rows, params["reduction"], params["divisor"]), axis)
        dx = dtarget = None
        if ctx.needs_grad[0]:
            dx = dloss * (xp.exp(log_probs) * q.sum(axis, keepdims=True) - q)
        if ctx.needs_grad[1]:
            dtarget = -dloss * log_probs * (1 - params["smoothing"])
            dtarget = dtarget if weight is None else dtarget * weight
        return dx, dtarget, None


@autocasts
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """The cross-entropy of logits `input` (N, K), (K,) or (N, K, d1, ...) with `target`.

    target: classes, integers of shape (N,), () or (N, d1, ...); or probabilities, floating and of the input's shape.
    weight: (K,), how much each class counts; a constant. reduction: "mean", "sum" or "none" (a loss per row).
    label_smoothing: the share, 0 to 1, that is spread evenly over the classes. ignore_index: the class target whose
    rows do not count. ValueError names a shape or a target that does not fit, TypeError a dtype.
    """
    check_reduction("cross_entropy", reduction)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing={label_smoothing} must lie between 0 and 1")
    xp, axis = namespace_of(input.array), class_axis(input)
    aside = (-1, *(1,) * (input.ndim - axis - 1))  # a vector of classes, to broadcast against the input
    if target.dtype.kind in "iub":
        classes, weights, divisor = class_targets("cross_entropy", input, target, weight, ignore_index)
        if not label_smoothing:
            return CrossEntropy.apply(input, classes, weights, reduction=reduction, divisor=divisor)
        one_hot = xp.expand_dims(classes.array, axis) == xp.arange(input.shape[axis]).reshape(aside)
        each = xp.expand_dims(target.array != ignore_index, axis).astype(input.array.real.dtype)
        each = each if weight is None else each * weight.array.astype(each.dtype).reshape(aside)
        soft = Tensor(one_hot.astype(input.dtype))
    else:
        check_input("cross_entropy", input, weight)
        if target.shape != input.shape or target.dtype != input.dtype:
            raise ValueError(
                f"cross_entropy: a floating target holds probabilities and must be like the input, {input.shape} of "
                f"{input.dtype}, not {target.shape} of {target.dtype}; classes are integers: use .long()"
            )
        if ignore_index >= 0:
            raise ValueError("cross_entropy: ignore_index is for class targets; scale the probabilities instead")
        each, soft = None if weight is None else weight.array.astype(input.dtype).reshape(aside), target
        divisor = input.array.size // input.shape[axis]
    each = None if each is None else Tensor(each)
    return SoftCrossEntropy.apply(input, soft, each, smoothing=label_smoothing, reduction=reduction, divisor=divisor)
