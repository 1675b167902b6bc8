"""Finding the op and module that first made a NaN or Inf, forward or backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from .. import dispatch
from ..device import namespace_of
from ..engine import Node, Tensor
from ..random import get_rng_state, set_rng_state
from .base import Hook, module_path

T = TypeVar("T")


class AnomalyError(ArithmeticError):
    """A NaN or Inf was met.

    op, module: the first op that made one, and the dotted name of the module in which it ran ("" outside of
    modules; both "" where no op did). direction: "forward", "backward", or "" where it was neither.
    """

    def __init__(
        self, message: str, op: str = "", module: str = "", direction: Literal["forward", "backward", ""] = ""
    ):
        super().__init__(message)
        self.op, self.module, self.direction = op, module, direction


class AnomalyHook(Hook):
    """Looks at every op's output and at every gradient, and raises AnomalyError at the first NaN or Inf.

    Kernels are exact ones meanwhile (`dispatch.exact`): Winograd spreads one bad pixel over its neighbours. kernels:
    others to compute with, as for `dispatch.use_kernels`: `AnomalyHook(conv2d_fprop="fprop_reference")`.
    NumPy's own warnings about invalid values and overflow are off within it.
    """

    def __init__(self, **kernels: str) -> None:
        self.kernels: Mapping[str, str] = kernels

    def contexts(self) -> Iterable[contextlib.AbstractContextManager]:
        return np.errstate(all="ignore"), dispatch.exact(), dispatch.use_kernels(**self.kernels)

    def forward_post(self, node: Node, arrays: Sequence[Any], y: Any) -> None:
        if found := _count(y):
            before = _already({f"input {i}": a for i, a in enumerate(arrays)})
            raise _error(node, "forward", f"the output {_shape(y)} of", found, before)

    def backward_pre(self, node: Node, dy: Any) -> None:
        if found := _count(dy):  # the shares of it were looked at where they were made
            before = "; it is what backward() was given, or a tensor's hook, or a sum of finite shares that overflowed"
            raise _error(node, "backward", f"the gradient {_shape(dy)} of the output of", found, before)

    def backward_post(self, node: Node, dy: Any, grads: Sequence[Any]) -> None:
        for slot, (vertex, grad) in enumerate(zip(node.inputs, grads, strict=True)):
            if vertex is not None and (found := _count(grad)):
                saved = enumerate(node.saved_for_backward or ())
                before = _already({"the gradient of its output": dy, **{f"saved array {i}": a for i, a in saved}})
                raise _error(node, "backward", f"the gradient {_shape(grad)} of input {slot} of", found, before)


def find_anomaly(step: Callable[[], T], *modules: Any, **kernels: str) -> T:
    """Run a training step; if it makes a NaN or Inf, run it again under AnomalyHook to say where.

        loss = find_anomaly(lambda: train_step(model, images, labels), model)

    step: forward, backward and, if you like, the optimizer's step, on one and the same batch. modules: whose
    parameters, buffers and gradients, and the numbers of `minires.manual_seed`'s generator, are put back before the
    second run. kernels: as for AnomalyHook, in the second run. Returns what `step` returns. The first run goes at full
    speed; the price is a copy of the modules' state and a look at it afterwards. What an optimizer keeps (momentum) is
    not put back: no op reads it, but to train on after an AnomalyError, load the optimizer's state too.

    Raises AnomalyError where the result of the step (a Tensor or a number), a parameter, a buffer or a gradient is
    not finite.
    """
    tensors = {name: t for m in modules for name, t in [*m.named_parameters(), *m.named_buffers()]}
    before = [(t, t.array.copy(), None if t.grad is None else t.grad.array.copy()) for t in tensors.values()]
    numbers = get_rng_state()
    with np.errstate(all="ignore"):
        result = step()
    seen: dict[str, Any] = {"the result of the step": result, **tensors}
    seen.update((f"the gradient of {name}", t.grad) for name, t in tensors.items())
    bad = {name: found for name, value in seen.items() if (found := _count(_array(value)))}
    if not bad:
        return result
    for t, array, grad in before:
        t.data = array
        t.grad = None if grad is None else Tensor(grad)
    set_rng_state(numbers)
    with AnomalyHook(**kernels):
        step()
    where = ", ".join(f"{name} ({found})" for name, found in bad.items())
    raise AnomalyError(
        f"not finite after the step: {where}; but no op made it when the step ran again: "
        "it came from outside the ops (the optimizer's step?), or the step does not repeat"
    )


def _error(node: Node, direction: Literal["forward", "backward"], what: str, found: str, before: str) -> AnomalyError:
    module = module_path(node.scope)
    where = f"{node.name} in {module}" if module else node.name
    return AnomalyError(f"{direction}: {what} {where} holds {found}{before}", node.name, module, direction)


def _already(values: Mapping[str, Any]) -> str:
    bad = [f"{name} {_shape(a)} held {found}" for name, a in values.items() if (found := _count(a))]
    return f"; already {', '.join(bad)} before" if bad else "; first made here, its inputs were finite"


def _count(array: Any) -> str:
    """ "3 NaN and 1 Inf of 48", or "" where all is finite."""
    if array is None or not hasattr(array, "dtype") or array.dtype.kind not in "fcV":
        return ""
    xp = namespace_of(array)
    if bool(xp.isfinite(array).all()):
        return ""
    nan, inf = int(xp.isnan(array).sum()), int(xp.isinf(array).sum())
    return f"{' and '.join(f'{n} {kind}' for n, kind in ((nan, 'NaN'), (inf, 'Inf')) if n)} of {array.size}"


def _array(value: Any) -> Any:
    return value.array if isinstance(value, Tensor) else np.asarray(value) if isinstance(value, float) else None


def _shape(array: Any) -> str:
    return str(array.shape)
