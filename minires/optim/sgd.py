"""Stochastic gradient descent with momentum.

    g <- g + weight_decay * p
    b <- g at the first step, then  momentum * b + (1 - dampening) * g
    p <- p - lr * d        d = b,  or g + momentum * b (Nesterov),  or g (no momentum)

The learning rate multiplies the buffer, it is not accumulated in it: as in PyTorch, and unlike Sutskever et al. 2013
(sec. 2, eq. 1-4), whose form is the same only while lr is constant. Computed by the kernels of `sgd_step`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..cuda import fed, held
from ..dispatch import run
from .optimizer import Optimizer, alike, check_at_least_zero, computed_in, kept_array


class SGD(Optimizer):
    """Stochastic gradient descent; see the page's head for the formula.

    lr: per step. momentum, dampening: in [0, 1), 0 for none. weight_decay: the factor of the parameter added to the
    gradient (L2 penalty). nesterov needs momentum > 0 and dampening 0. capturable: on a GPU, kernels read lr from
    memory, so that a CUDA graph follows a schedule; where another setting changes, it is captured anew (`cuda.held`).
    State: momentum_buffer, like the parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        capturable: bool = False,
    ):
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "nesterov": nesterov, "capturable": capturable})

    def check(self, group: dict[str, Any]) -> None:
        """ValueError for a negative setting, or Nesterov without plain momentum."""
        check_at_least_zero(group, "lr", "momentum", "weight_decay")
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov=True needs momentum > 0 and dampening 0, not {group['momentum']} and {group['dampening']}"
            )

    def update_group(self, params: list[Any], group: dict[str, Any], found: Any = None) -> None:
        """One step of all of them, in one call for each device and dtype."""
        settings = _settings(group)
        held(lambda: _settings(group))
        for members in alike(params, lambda p: "momentum_buffer" not in self.state.setdefault(p, {})):
            states, arrays = [self.state[p] for p in members], [p.array for p in members]
            first, like = "momentum_buffer" not in states[0], arrays[0]
            kept = settings["momentum"] != 0
            buffers = [kept_array(s, "momentum_buffer", a) for s, a in zip(states, arrays, strict=True)] if kept else []
            lr = fed(lambda: float(group["lr"]), (1,), computed_in(like.dtype), like)
            bad = None if found is None else found.astype(lr.dtype, copy=False)
            run("sgd_step", lr, bad, *arrays, *(p.grad.array for p in members), *buffers, **settings, first=first)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What the kernels get by value."""
    numbers = {name: float(group[name]) for name in ("momentum", "dampening", "weight_decay")}
    return {**numbers, "nesterov": bool(group["nesterov"])}
