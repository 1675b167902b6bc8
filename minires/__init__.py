"""minires: ResNets from scratch on NumPy and CuPy, under PyTorch's names.

import minires as mr
from minires import nn

model = mr.models.create_model("resnet20")
loss = nn.CrossEntropyLoss()(model(mr.randn(8, 3, 32, 32)), mr.randint(10, (8,)))
loss.backward()
"""

import builtins
import importlib
from typing import TYPE_CHECKING, Any

import numpy as _np

from . import cuda
from . import ops as _ops
from .autocast import autocast, get_autocast_dtype, is_autocast_enabled
from .capture import ablate, capture, patch
from .creation import (
    arange,
    as_tensor,
    empty,
    eye,
    from_numpy,
    full,
    full_like,
    linspace,
    ones,
    ones_like,
    rand,
    randint,
    randn,
    randn_like,
    randperm,
    tensor,
    zeros,
    zeros_like,
)
from .device import device
from .dispatch import autotune, exact, use_kernels
from .engine import Tensor
from .gradcheck import gradcheck
from .ops import *  # noqa: F403
from .random import get_rng_state, manual_seed, set_rng_state
from .state import no_grad, set_grad_enabled, unfused
from .state import state as _state

if TYPE_CHECKING:
    from . import amp as amp
    from . import data as data
    from . import hooks as hooks
    from . import jit as jit
    from . import models as models
    from . import nn as nn
    from . import optim as optim

float64 = double = _np.dtype("float64")
float32 = float = _np.dtype("float32")
float16 = half = _np.dtype("float16")
int64 = long = _np.dtype("int64")
int32 = int = _np.dtype("int32")
uint8 = _np.dtype("uint8")
bool = _np.dtype("bool")

__all__ = [
    "Tensor",
    "ablate",
    "arange",
    "as_tensor",
    "autocast",
    "autotune",
    "bool",
    "capture",
    "cuda",
    "device",
    "double",
    "empty",
    "exact",
    "eye",
    "float",
    "float16",
    "float32",
    "float64",
    "from_numpy",
    "full",
    "full_like",
    "get_autocast_dtype",
    "get_rng_state",
    "gradcheck",
    "half",
    "int",
    "int32",
    "int64",
    "is_autocast_enabled",
    "is_grad_enabled",
    "linspace",
    "long",
    "manual_seed",
    "no_grad",
    "ones",
    "ones_like",
    "patch",
    "rand",
    "randint",
    "randn",
    "randn_like",
    "randperm",
    "set_grad_enabled",
    "set_rng_state",
    "tensor",
    "uint8",
    "unfused",
    "use_kernels",
    "zeros",
    "zeros_like",
]
__all__ += _ops.__all__

_MODULES = ("amp", "cli", "data", "hooks", "interop", "jit", "models", "nn", "optim", "study", "train")
_LAZY = {
    "set_num_threads": ".kernels.cpu.jit",
    "get_num_threads": ".kernels.cpu.jit",
    "save": ".serialization",
    "load": ".interop",
}


def is_grad_enabled() -> builtins.bool:
    """Whether ops remember what backward needs: False within `no_grad()`."""
    return _state.grad_enabled


def __getattr__(name: str) -> Any:
    """Parts that cost time to import, at their first use."""
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    elif name == "bfloat16":
        value = _np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    elif name == "__version__":
        value = importlib.import_module("importlib.metadata").version("minires")
    else:
        raise AttributeError(f"module 'minires' has no attribute {name!r}")
    globals()[name] = value
    return value
