"""16-bit numbers through the float32 kernels: widened, computed, rounded once. What runs where no kernel takes them.

bfloat16 and float16 widen to float32 without loss, so the result is the float32 one, rounded: it is right, and costs a
pass over memory for every array. `widened(PROBLEM, ...)` registers it for a problem, one line in its kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .cpu.casts import cast
from .registry import HALVES, Kernel, Problem, kernel, kernels


def is_half(a: Any) -> bool:
    """Whether an array holds bfloat16 or float16."""
    return a is not None and a.dtype.name in HALVES


def widened(
    problem: Problem,
    *,
    device: str = "cpu",
    step: int = 2,
    like: tuple[int, ...] = (0,),
    exact: bool = True,
    error_scale: Callable[..., Any] | None = None,
) -> None:
    """Register, for 16-bit inputs, the best float32 kernel of the problem.

    step: a kernel of its own for 16 bits goes before this one at the same step, or a later one. like: for every output,
    the argument whose dtype it gets.
    exact: False for the best one that is not exact (as Winograd), where that is the best of all; error_scale: then its.
    """

    def supports(*arrays: Any, **params: Any) -> bool:
        return exact or not _best(problem, device, [a if a is None else _Shape(a) for a in arrays], params, False).exact

    @functools.wraps(problem.reference)  # a kernel has the signature of the definition
    def compute(*arrays: Any, **params: Any) -> Any:
        wide = [_to(a, np.float32) if is_half(a) else a for a in arrays]
        found = _best(problem, device, wide, params, exact)(*wide, **params)
        outputs = found if isinstance(found, tuple) else (found,)
        narrow = tuple(
            y if y is None or y.dtype != np.float32 else _to(y, arrays[i].dtype)
            for y, i in zip(outputs, like, strict=True)
        )
        return narrow if isinstance(found, tuple) else narrow[0]

    kernel(
        problem,
        device=device,
        step=step,
        note="widened, the best float32 kernel" + ("" if exact else " (Winograd)") + ", rounded once",
        supports=supports,
        rank=lambda *_, **__: step - 0.5,
        dtypes=HALVES,
        exact=exact,
        error_scale=error_scale,
        name=f"{problem.name}_widened" + ("" if exact else "_winograd"),
    )(compute)


def _to(a: Any, dtype: Any) -> Any:
    if a.dtype == dtype:
        return a
    return cast(a, dtype) if isinstance(a, np.ndarray) else a.astype(dtype)


class _Shape:
    """What `supports` of a kernel reads of an array, in float32."""

    def __init__(self, a: Any):
        self.shape, self.ndim, self.size = a.shape, a.ndim, a.size
        self.dtype = np.dtype(np.float32) if is_half(a) else a.dtype


def _best(problem: Problem, device: str, arrays: list[Any], params: dict[str, Any], exact: bool) -> Kernel:
    taking = [k for k in kernels(problem.name, device) if (k.exact or not exact) and k.takes(*arrays, **params)]
    return max(taking, key=lambda k: k.rank_for(*arrays, **params))
