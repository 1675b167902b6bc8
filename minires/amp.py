"""Mixed precision under torch.amp's names: `autocast` (autocast.py), and `GradScaler` for float16.

float16 has no number below 6e-8, and many gradients of activations are smaller. The loss times S has gradients S times
as large, which are divided by S when they have arrived at the float32 weights:

    scaler.scale(loss).backward();  scaler.step(optimizer);  scaler.update()

S is found by trial: a step whose gradients are not all finite is left out and S halved (backoff); after 2000 steps
without one S is doubled (growth). bfloat16 has the range of float32 and needs none of this.

Source: Micikevicius et al. 2018 (arXiv:1710.03740), section 3.2; torch.amp.GradScaler.
"""

from __future__ import annotations

from typing import Any

from .autocast import autocast
from .cuda import fed, is_current_stream_capturing
from .device import namespace_of
from .dispatch import run
from .engine import Tensor
from .ops import mul
from .optim import Optimizer
from .optim.optimizer import alike

__all__ = ["GradScaler", "autocast"]


class GradScaler:
    """Dynamic loss scaling; see the page's head.

    device: accepted for PyTorch's sake, gradients say themselves where they are. init_scale: S to begin with.
    growth_factor, backoff_factor: what S is multiplied by. growth_interval: steps in a row without an overflow after
    which it grows. enabled=False: a scaler that does nothing but `optimizer.step()`. ValueError for a factor that does
    not grow, or not fall.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ):
        if not growth_factor > 1 or not 0 < backoff_factor < 1:
            raise ValueError(
                f"GradScaler: growth_factor={growth_factor} must be above 1, and backoff_factor={backoff_factor} "
                "between 0 and 1"
            )
        self._enabled, self._scale, self._clean_steps = enabled, float(init_scale), 0
        self._growth_factor, self._backoff_factor = growth_factor, backoff_factor
        self._growth_interval = growth_interval
        # Of optimizers whose gradients are unscaled, until `update`: see `overflow`.
        self._overflows: dict[int, list[Any]] = {}
        self._stepped: set[int] = set()

    def scale(self, outputs: Any) -> Any:
        """A Tensor (the loss), or a list or tuple of them, times S."""
        if not self._enabled:
            return outputs
        if isinstance(outputs, (list, tuple)):
            return type(outputs)(map(self.scale, outputs))
        if is_current_stream_capturing():
            return mul(outputs, Tensor(fed(lambda: self._scale, (), outputs.dtype, outputs.array)))
        return mul(outputs, self._scale)

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients by S, in place, so that they can be looked at or clipped before `step`.

        RuntimeError the second time before `update`, ValueError for gradients of 16 bits: weights must be float32.
        """
        if not self._enabled:
            return
        if id(optimizer) in self._overflows:
            raise RuntimeError("GradScaler: unscale_() was called already, or step(), since the last update()")
        tensors = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if narrow := {g.dtype.name for g in tensors if g.dtype.itemsize == 2}:
            raise ValueError(
                f"GradScaler: gradients of {', '.join(narrow)} cannot be unscaled: keep the weights float32"
            )
        found = []
        for members in alike(tensors, lambda _: None):
            first = members[0].array
            factor = fed(lambda: 1 / self._scale, (1,), first.dtype, first)
            found.append(namespace_of(first).zeros(1, first.dtype))
            run("unscale", factor, found[-1], *(g.array for g in members))
        for grad in tensors:
            grad.version[0] += 1
        self._overflows[id(optimizer)] = found

    def overflow(self, optimizer: Optimizer) -> Any:
        """Where the gradients hold a NaN or infinity: arrays on their devices, of a number that is not 0 then; None
        where `unscale_` was not called since the last `update`."""
        return self._overflows.get(id(optimizer))

    def unscaled(self, optimizer: Optimizer, overflow: Any) -> None:
        """Say that a replay of a CUDA graph unscaled the gradients, with this `overflow`; None: that nothing did."""
        self._overflows.pop(id(optimizer), None)
        if overflow is not None:
            self._overflows[id(optimizer)] = overflow

    def overflowed(self, optimizer: Optimizer) -> bool:
        """Whether the gradients, which are unscaled, hold a NaN or infinity, so that `step` will leave them out."""
        return any(float(flag[0]) != 0 for flag in self._overflows.get(id(optimizer), ()))

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """`optimizer.step(*args, **kwargs)`, after unscaling; nothing where a gradient is NaN or infinite.

        RuntimeError the second time before `update`.
        """
        if self._enabled:
            if id(optimizer) in self._stepped:
                raise RuntimeError("GradScaler: step() was called already since the last update()")
            if id(optimizer) not in self._overflows:
                self.unscale_(optimizer)
            self._stepped.add(id(optimizer))
        return None if self.overflowed(optimizer) else optimizer.step(*args, **kwargs)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Fit S to what the steps since the last update met, or set it. RuntimeError where there was no step."""
        if not self._enabled:
            return
        if new_scale is not None:
            self._scale = float(new_scale)
        elif not self._overflows:
            raise RuntimeError("GradScaler: update() needs a step() or unscale_() since the last one")
        elif any(float(flag[0]) != 0 for found in self._overflows.values() for flag in found):
            self._scale, self._clean_steps = self._scale * self._backoff_factor, 0
        else:
            self._clean_steps += 1
            if self._clean_steps == self._growth_interval:
                self._scale, self._clean_steps = self._scale * self._growth_factor, 0
        self._overflows.clear()
        self._stepped.clear()

    def get_scale(self) -> float:
        """S; 1 where scaling is off."""
        return self._scale if self._enabled else 1.0

    def is_enabled(self) -> bool:
        """Whether it scales."""
        return self._enabled

    def state_dict(self) -> dict[str, Any]:
        """S, the factors, and how many steps in a row were without an overflow, as PyTorch names them; {} if off."""
        if not self._enabled:
            return {}
        return {
            "scale": self._scale,
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": self._clean_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the scaler whose state it is. ValueError for that of one that was off."""
        if not self._enabled:
            return
        if not state_dict:
            raise ValueError("GradScaler: the state dict is empty: it is that of a scaler with enabled=False")
        self._scale, self._clean_steps = state_dict["scale"], state_dict["_growth_tracker"]
        self._growth_factor, self._backoff_factor = state_dict["growth_factor"], state_dict["backoff_factor"]
        self._growth_interval = state_dict["growth_interval"]
