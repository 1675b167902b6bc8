"""Dropout's mask on the CPU, by NumPy's generator."""

import numpy as np

from ..registry import kernel
from .problem import DROPOUT_MASK, dropout_mask_reference

kernel(DROPOUT_MASK, device="cpu", step=0, note="the definition", dtypes=("any",))(dropout_mask_reference)


@kernel(DROPOUT_MASK, device="cpu", step=1, note="NumPy's Philox", dtypes=("any",))
def dropout_mask_numpy(key, *, n, p):
    numbers = np.random.Generator(np.random.Philox(key=key)).random(n, np.float32)
    return (numbers >= np.float32(p)).view(np.int8)
