"""Two-dimensional convolution.

    y[n, k, p, q] = b[k] + sum over c, r, s of x[n, c, p*u + r*l - a, q*v + s*m - e] * w[k, c, r, s]

x (N, C, H, W), w (K, C/groups, R, S), b (K,), y (N, K, P, Q); stride (u, v), dilation (l, m), padding (a, e).
P = floor((H + 2a - l(R - 1) - 1) / u) + 1, likewise Q.

Saved for backward: x and w (the op is bilinear: each one's gradient needs the other).

    dx = every window gets back dy[n, k, p, q] * w[k]            dgrad: convolution with w transposed
    dw[k] = sum over n, p, q of dy[n, k, p, q] * x's window      wgrad: correlation of x with dy
    db[k] = sum over n, p, q of dy[n, k, p, q]

Source: LeCun et al. 1989; names of the three directions from cuDNN (Chetlur et al. 2014, arXiv:1410.0759).
"""

from __future__ import annotations

import operator
from typing import Any, Literal

from ..autocast import autocasts
from ..dispatch import call_noted, run, run_with
from ..engine import Function, Tensor, state
from .layout import sum_axes
from .shape import pad
from .windows import Pair, pair


class Conv2d(Function):
    fresh = True

    @staticmethod
    def forward(ctx, x, w, b, *, statistics: list[Any] | None, **window: Any):
        ctx.save_for_backward(x, w)
        if statistics is not None:
            summed, y = run_with("conv2d_genstats", (), "conv2d_fprop", x, w, **window)
            y, *statistics[:] = y if summed else (y,)
            return y
        y = run("conv2d_fprop", x, w, **window)
        if b is not None:
            call_noted(operator.iadd, y, b[:, None, None])
        return y

    @staticmethod
    def backward(ctx, dy):
        (x, w), window = ctx.saved_for_backward, dict(ctx.params)
        del window["statistics"]
        dw = run("conv2d_wgrad", x, dy, **window, kernel_hw=w.shape[2:]) if ctx.needs_grad[1] else None
        # Last, so that dx is still in the cache when the op before reads it.
        dx = _dgrad(ctx, dy, w, window, x.shape[2:]) if ctx.needs_grad[0] else None
        db = sum_axes(dy, (0, 2, 3)) if ctx.needs_grad[2] else None
        return dx, dw, db


def _dgrad(ctx: Any, dy: Any, w: Any, window: dict[str, Any], input_hw: tuple[int, ...]) -> Any:
    """dx; at a skip connection with the gradient that x has from elsewhere in it, where the kernel can add it."""
    known = getattr(ctx, "elsewhere", {}) if state.fuse else {}  # outside of a walk nothing is
    so_far = known.get(ctx.inputs[0])
    if so_far is None:
        return run("conv2d_dgrad", dy, w, **window, input_hw=input_hw)
    added, dx = run_with("conv2d_dgrad_add", so_far[:1], "conv2d_dgrad", dy, w, **window, input_hw=input_hw)
    if added:
        known[ctx.inputs[0]] = None
    return dx


@autocasts
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | Literal["same", "valid"] = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    statistics: bool = False,
) -> Tensor:
    """Convolve `input` (N, C, H, W) or (C, H, W) with `weight` (K, C/groups, R, S); formula at the head of the page.

    padding: zeros on each side, or "valid" (none), or "same" (output as large as input; stride 1; where the total is
    odd the extra zero is at the right and bottom, as in PyTorch). statistics: say that a batch normalisation follows in
    training: without a bias its sums are then taken here, while the result is in the cache. Returns (N, K, P, Q), or
    (K, P, Q) for unbatched input. Raises ValueError naming the sizes that do not fit.
    """
    if input.ndim == 3:
        return conv2d(input[None], weight, bias, stride, padding, dilation, groups)[0]
    input, settings = checked(input, weight, bias, stride, padding, dilation, groups)
    found: list[Any] | None = [] if statistics and bias is None and state.fuse else None
    y = Conv2d.apply(input, weight, bias, **settings, statistics=found)
    if found is not None:
        y.statistics = found, y.version, y.version[0]
    return y


def checked(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[Tensor, dict[str, Any]]:
    """The input, padded where "same" is uneven, and the settings as the kernels take them; ValueError as in conv2d."""
    stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
    _check(input, weight, bias, stride, dilation, groups)
    if isinstance(padding, str):
        input, padding = _resolve(input, padding, weight.shape[2:], stride, dilation)
    padding = pair(padding, "padding", least=0)
    for size, taps, a, d in zip(input.shape[2:], weight.shape[2:], padding, dilation, strict=True):
        if size + 2 * a < d * (taps - 1) + 1:
            raise ValueError(
                f"conv2d: a filter of {taps} taps with dilation {d} does not fit into {size} pixels padded by {a}"
            )
    return input, dict(stride=stride, padding=padding, dilation=dilation, groups=groups)


def _resolve(x: Tensor, padding: str, rs: tuple, stride: Pair, dilation: Pair) -> tuple[Tensor, Pair]:
    """ "same" and "valid" as numbers; what "same" needs at the right and bottom alone is padded here."""
    if padding == "valid":
        return x, (0, 0)
    if padding != "same":
        raise ValueError(f"padding={padding!r} must be 'same', 'valid' or numbers")
    if stride != (1, 1):
        raise ValueError(f"padding='same' needs stride 1, not {stride}")
    total = [d * (taps - 1) for d, taps in zip(dilation, rs, strict=True)]
    if any(t % 2 for t in total):
        x = pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, (total[0] // 2, total[1] // 2)


def _check(x: Tensor, w: Tensor, b: Tensor | None, stride: Pair, dilation: Pair, groups: int) -> None:
    if x.ndim != 4 or w.ndim != 4:
        raise ValueError(
            f"conv2d: input must be (N, C, H, W) or (C, H, W) and weight (K, C/groups, R, S), "
            f"not {x.shape} and {w.shape}"
        )
    if 0 in w.shape:
        raise ValueError(f"conv2d: weight {w.shape} is empty; every size of (K, C/groups, R, S) must be at least 1")
    if groups < 1 or x.shape[1] != w.shape[1] * groups or w.shape[0] % groups:
        raise ValueError(
            f"conv2d: input of {x.shape[1]} channels does not fit weight {w.shape} with groups={groups}: "
            "it needs groups * weight.shape[1] channels, and weight.shape[0] divisible by groups"
        )
    if b is not None and b.shape != w.shape[:1]:
        raise ValueError(f"conv2d: bias has shape {b.shape}, weight {w.shape} needs ({w.shape[0]},)")
    for name, t in (("weight", w), ("bias", b)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"conv2d: input is {x.dtype} and {name} {t.dtype}; convert one with .to(dtype)")
