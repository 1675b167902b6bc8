"""Dropout's mask on a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..cuda.launch import Function, Launch, blocks, launch
from ..memory import empty, namespace
from ..registry import kernel
from .problem import DROPOUT_MASK, threshold

_MASK = Function(Path(__file__).with_name("dropout.cu"), "dropout_mask")


@kernel(DROPOUT_MASK, device="cuda", step=1, note="a block of the counter per thread", dtypes=("any",))
def dropout_mask_cuda(key, *, n, p):
    mask = empty((n,), np.int8, key)
    args = (namespace(key).ascontiguousarray(key), mask, n, threshold(p))
    launch(Launch(_MASK, (blocks(n, 8 * 256),), (256,), args))
    return mask
