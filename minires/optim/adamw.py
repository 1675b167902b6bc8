"""AdamW, and Adam, of which it is the form with decoupled weight decay.

    p <- p - lr * weight_decay * p                        (AdamW; Adam instead: g <- g + weight_decay * p)
    m <- beta1 * m + (1 - beta1) * g                      mean of the gradients
    v <- beta2 * v + (1 - beta2) * g^2                    mean of their squares
    p <- p - lr * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

t counts the steps of the parameter from 1; the divisions by 1 - beta^t undo that m and v start at zero. With amsgrad,
the largest v so far takes the place of v.
Source: Kingma and Ba 2015 (arXiv:1412.6980), algorithm 1; Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2;
Reddi et al. 2018 (amsgrad). Computed by the kernels of `adamw_step`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..cuda import fed, held
from ..dispatch import run
from .optimizer import Optimizer, alike, check_at_least_zero, computed_in, kept_array


class AdamW(Optimizer):
    """Adam with decoupled weight decay; see the page's head for the formula.

    lr: per step. betas: both in [0, 1). eps: added to the root, above 0 where a gradient may be 0. weight_decay: the
    share of the parameter, times lr, taken off at each step. capturable: on a GPU, what depends on lr, on t and on
    AdamW's weight decay is read from memory, so that a CUDA graph follows them; where another setting changes, it is
    captured anew (`cuda.held`). State: step, exp_avg, exp_avg_sq, max_exp_avg_sq.
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

    def update_group(self, params: list[Any], group: dict[str, Any], found: Any = None) -> None:
        """One step of all of them, in one call for each device, dtype and number of steps made."""
        settings = self._settings(group)
        held(lambda: self._settings(group))
        names = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if settings["amsgrad"] else []))
        for members in alike(params, lambda p: self.state.setdefault(p, {}).get("step", 0)):
            states, arrays = [self.state[p] for p in members], [p.array for p in members]
            kept = (kept_array(s, name, a) for name in names for s, a in zip(states, arrays, strict=True))

            def factors(states: list[dict[str, Any]] = states) -> tuple[float, float, float]:
                """What a step's number and learning rate decide; counts the step."""
                lr, decay, t = float(group["lr"]), float(group["weight_decay"]), int(states[0].get("step", 0)) + 1
                beta1, beta2 = settings["beta1"], settings["beta2"]
                for state in states:
                    state["step"] = t
                return 1 - lr * decay if self.decoupled else 1.0, (1 - beta2**t) ** 0.5, lr / (1 - beta1**t)

            numbers = fed(factors, (3,), computed_in(arrays[0].dtype), arrays[0])  # asked at every replay of a graph
            gradients = (p.grad.array for p in members)
            bad = None if found is None else found.astype(numbers.dtype, copy=False)
            run("adamw_step", numbers, bad, *arrays, *gradients, *kept, **settings)

    def _settings(self, group: dict[str, Any]) -> dict[str, Any]:
        """What the kernels get by value."""
        beta1, beta2 = map(float, group["betas"])
        penalty = 0.0 if self.decoupled else float(group["weight_decay"])
        return dict(beta1=beta1, beta2=beta2, eps=float(group["eps"]), penalty=penalty, amsgrad=bool(group["amsgrad"]))


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
