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

from ..cuda import fed
from ..device import is_cuda_array
from ..dispatch import run
from .optimizer import Optimizer, check_at_least_zero, kept_array


class SGD(Optimizer):
    """Stochastic gradient descent; see the page's head for the formula.

    lr: per step. momentum, dampening: in [0, 1), 0 for none. weight_decay: the factor of the parameter added to the
    gradient (L2 penalty). nesterov needs momentum > 0 and dampening 0. capturable: on a GPU, kernels read lr from memory,
    so that a CUDA graph follows a schedule; the other settings stay what they were at the capture. State:
    momentum_buffer, like the parameter.
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

    def settings(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group, with `capturable` on a GPU lr as a float32 array (1,) that is asked for at every replay."""
        group, p = super().settings(group), group["params"][0].array
        if not group["capturable"] or not is_cuda_array(p):
            return group
        return {**group, "lr": fed(lambda: group["lr"], (1,), "float32", p)}

    def update(self, p: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step of one parameter."""
        first = "momentum_buffer" not in state
        buf = kept_array(state, "momentum_buffer", p) if group["momentum"] != 0 else None
        settings: dict[str, Any] = {name: float(group[name]) for name in ("momentum", "dampening", "weight_decay")}
        settings["lr"] = group["lr"] if is_cuda_array(group["lr"]) else float(group["lr"])
        run("sgd_step", p, g, buf, **settings, nesterov=bool(group["nesterov"]), first=first)
