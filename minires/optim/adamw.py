"""AdamW, and Adam, of which it is the form with decoupled weight decay.

    p <- p - lr * weight_decay * p                        (AdamW; Adam instead: g <- g + weight_decay * p)
    m <- beta1 * m + (1 - beta1) * g                      mean of the gradients
    v <- beta2 * v + (1 - beta2) * g^2                    mean of their squares
    p <- p - lr * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

t counts the steps of the parameter from 1; the divisions by 1 - beta^t undo that m and v start at zero. With amsgrad,
the largest v so far takes the place of v.
Source: Kingma and Ba 2015 (arXiv:1412.6980), algorithm 1; Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2;
Reddi et al. 2018 (amsgrad).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..cuda import fed
from ..device import is_cuda_array, namespace_of
from .optimizer import Optimizer, check_at_least_zero, kept_array


class AdamW(Optimizer):
    """Adam with decoupled weight decay; see the page's head for the formula.

    lr: per step. betas: both in [0, 1). eps: added to the root, above 0 where a gradient may be 0. weight_decay: the
    share of the parameter, times lr, taken off at each step. capturable: on a GPU, what depends on lr and on t is read
    from memory, so that a CUDA graph follows both. State: step, exp_avg, exp_avg_sq, max_exp_avg_sq.
    """

    decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        capturable: bool = False,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, {**defaults, "capturable": capturable})

    def check(self, group: dict[str, Any]) -> None:
        """ValueError for a negative setting or a beta outside [0, 1)."""
        check_at_least_zero(group, "lr", "eps", "weight_decay")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas={group['betas']!r} must be two numbers in [0, 1)")

    def update(self, p: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step of one parameter."""
        xp = namespace_of(p)
        eps, decay = float(group["eps"]), float(group["weight_decay"])
        beta1, beta2 = map(float, group["betas"])
        m, v = kept_array(state, "exp_avg", p), kept_array(state, "exp_avg_sq", p)

        def scalars() -> tuple[float, float, float]:
            """What a step's number and learning rate decide; counts the step."""
            lr, t = float(group["lr"]), int(state.get("step", 0)) + 1
            state["step"] = t
            return 1 - lr * decay, (1 - beta2**t) ** 0.5, lr / (1 - beta1**t)

        shrink, correction, scale = (
            fed(scalars, (3,), p.dtype, p) if group["capturable"] and is_cuda_array(p) else scalars()
        )
        if self.decoupled:
            p *= shrink
        elif decay:
            g = g + decay * p
        m += (g - m) * (1 - beta1)
        v *= beta2
        v += (1 - beta2) * (g * g)
        if group["amsgrad"]:
            largest = kept_array(state, "max_exp_avg_sq", p)
            xp.maximum(largest, v, out=largest)
            v = largest
        root = xp.sqrt(v)  # the corrections are applied in PyTorch's order, so that results agree to rounding
        root /= correction
        root += eps
        p -= scale * (m / root)


class Adam(AdamW):
    """Adam with weight decay as an L2 penalty; see the page's head. Settings as AdamW's, weight_decay 0 by default."""

    decoupled = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        capturable: bool = False,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, capturable)
