"""Mixed precision: which ops compute in 16 bits, which in float32. The whole policy is on this page.

    with minires.autocast("cpu", dtype=minires.bfloat16):
        loss = cross_entropy(model(x), target)
    loss.backward()

Weights stay float32, and so do their gradients: within the region an op of LOW_PRECISION gets its floating inputs cast
to `dtype`, one of FLOAT32 gets them cast to float32, and every other op takes what comes (16 bits with 16 bits stay 16
bits, with float32 they are float32). A cast is an op of the graph, whose backward casts the gradient back to what its
input was; backward needs no region. float64 is never cast. Batch normalisation is not in the lists, as in PyTorch: of
16-bit activations it makes 16-bit activations, with float32 statistics, weights and sums (`ops/batch_norm.py`).

The lists are those of torch.autocast on a GPU, for every device; on a CPU PyTorch leaves exp, log, pow, norm, sum and
the softmaxes in 16 bits. conv_bias_act is not in PyTorch; var and std are sums here. Source: PyTorch, "Automatic Mixed
Precision package" (op lists); Micikevicius et al. 2018 (arXiv:1710.03740) for float32 master weights and sums.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np

from .dispatch import run
from .engine import Function, Tensor, state

LOW_PRECISION = frozenset(["conv2d", "conv_bias_act", "linear", "matmul"])
FLOAT32 = frozenset(
    [
        "cross_entropy",
        "exp",
        "log",
        "log_softmax",
        "mse_loss",
        "nll_loss",
        "norm",
        "pow",
        "softmax",
        "std",
        "sum",
        "var",
    ]
)
_DEFAULTS = {"cpu": "bfloat16", "cuda": "float16"}
P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


class autocast:
    """A context manager, and a decorator of functions, within which ops choose their precision; see the page's head.

    device_type: "cpu" or "cuda"; tensors on others are left alone. dtype: bfloat16 or float16; None: bfloat16 on the
    CPU, float16 on a GPU, as in PyTorch. enabled=False: within it nothing is cast. cache_enabled: cast a weight once
    in the outermost region, however often it is used. Regions nest, and belong to the thread that entered them.
    Raises ValueError for another device type or dtype.
    """

    def __init__(self, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: bool = True):
        if device_type not in _DEFAULTS:
            raise ValueError(f"autocast: device_type={device_type!r} must be one of {', '.join(map(repr, _DEFAULTS))}")
        self.device_type, self.dtype = (
            device_type,
            get_autocast_dtype(device_type) if dtype is None else np.dtype(dtype),
        )
        if self.dtype.name not in ("bfloat16", "float16"):
            raise ValueError(
                f"autocast: dtype={self.dtype.name} must be bfloat16 or float16; enabled=False turns it off"
            )
        self.enabled, self.cache_enabled = enabled, cache_enabled
        self.saved: list[Any] = []

    def __enter__(self) -> autocast:
        self.saved.append((state.autocast, state.casts))
        others = {kind: dtype for kind, dtype in state.autocast.items() if kind != self.device_type}
        state.autocast = {**others, self.device_type: self.dtype} if self.enabled else others
        state.casts = (state.casts if state.casts is not None else {}) if self.cache_enabled else None
        return self

    def __exit__(self, *_: object) -> None:
        state.autocast, state.casts = self.saved.pop()

    def __call__(self, function: F) -> F:
        @functools.wraps(function)
        def within(*args: Any, **kwargs: Any) -> Any:
            with autocast(self.device_type, self.dtype, self.enabled, self.cache_enabled):  # several threads may be in
                return function(*args, **kwargs)

        return cast(F, within)


def is_autocast_enabled(device_type: str | None = None) -> bool:
    """Whether this thread is in a region of `autocast` that casts tensors on this type of device (None: on any)."""
    return bool(state.autocast) if device_type is None else device_type in state.autocast


def get_autocast_dtype(device_type: str) -> np.dtype:
    """What tensors on this type of device are cast to within `autocast`, or would be without a `dtype`."""
    name = _DEFAULTS[device_type]
    usual = importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name
    return state.autocast.get(device_type) or np.dtype(usual)


class Cast(Function):
    """y = x in another floating dtype; dx = dy in x's. kept: y, where it was computed before in this region."""

    fresh = True

    @staticmethod
    def forward(ctx, x, *, dtype: np.dtype, kept: Any):
        ctx.dtype = x.dtype
        return run("cast", x, dtype=dtype.name) if kept is None else kept

    @staticmethod
    def backward(ctx, dy):
        return run("cast", dy, dtype=ctx.dtype.name)


def autocasts(op: Callable[P, R]) -> Callable[P, R]:
    """Make an op of one of the lists heed `autocast`. What it calls in turn casts nothing more."""
    low = op.__name__ in LOW_PRECISION
    if not low and op.__name__ not in FLOAT32:
        raise ValueError(f"autocast has no rule for {op.__name__!r}: name it in LOW_PRECISION or FLOAT32")

    untyped: Callable[..., R] = op  # casting changes no argument's type, but that is more than pyright can see

    @functools.wraps(op)
    def casting(*args: P.args, **kwargs: P.kwargs) -> R:
        if not state.autocast:
            return op(*args, **kwargs)
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        dtype = None if first is None else state.autocast.get(first.device.type)
        saved = state.autocast
        given: Any = args
        named: Any = kwargs
        if dtype is not None:
            target = dtype if low else np.dtype(np.float32)
            given = tuple(_in(a, target) for a in args)
            named = {name: _in(a, target) for name, a in kwargs.items()}
        state.autocast = {}
        try:
            return untyped(*given, **named)
        finally:
            state.autocast = saved

    return casting


def low_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as an op of LOW_PRECISION gets them: for ops whose tensors come in lists."""
    dtype = state.autocast.get(tensors[0].device.type) if state.autocast else None
    return tensors if dtype is None else tuple(_in(t, dtype) for t in tensors)


def _in(value: Any, dtype: np.dtype) -> Any:
    """A floating tensor in another precision; float64, and what is no floating tensor, as it is."""
    if not isinstance(value, Tensor) or value.dtype == dtype or value.dtype.num not in _castable():
        return value
    if state.casts is None or not (value.is_leaf and value.requires_grad):  # only weights are used again
        return Cast.apply(value, dtype=dtype, kept=None)
    key = id(value), dtype.name
    array, version, kept = state.casts.get(key, (None, 0, None))
    y = Cast.apply(value, dtype=dtype, kept=kept if array is value.array and version == value.version[0] else None)
    state.casts[key] = value.array, value.version[0], y.array
    return y


@functools.cache
def _castable() -> frozenset[int]:
    """The numbers of the dtypes float32, float16 and bfloat16: a dtype's name takes NumPy longer."""
    return frozenset(np.dtype(t).num for t in (np.float32, np.float16, importlib.import_module("ml_dtypes").bfloat16))
