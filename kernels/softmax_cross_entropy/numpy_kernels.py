"""Softmax cross-entropy in plain NumPy: the definitions, then the same with one pass less and no one-hot matrix."""

import numpy as np

from ..memory import empty
from ..registry import kernel
from .problem import SOFTMAX_CROSS_ENTROPY_BWD, SOFTMAX_CROSS_ENTROPY_FPROP, bwd_reference, fprop_reference

kernel(SOFTMAX_CROSS_ENTROPY_FPROP, device="cpu", step=0, note="the definition", dtypes=("any",), name="ce_fprop_ref")(
    fprop_reference
)
kernel(SOFTMAX_CROSS_ENTROPY_BWD, device="cpu", step=0, note="the definition", dtypes=("any",), name="ce_bwd_ref")(
    bwd_reference
)


@kernel(SOFTMAX_CROSS_ENTROPY_FPROP, device="cpu", step=1, note="in place, one temporary", dtypes=("any",))
def ce_fprop_inplace(logits, target):
    log_probs = np.subtract(logits, logits.real.max(1, keepdims=True), out=empty(logits.shape, logits.dtype))
    log_probs -= np.log(np.exp(log_probs).sum(1, keepdims=True))
    return -log_probs[np.arange(target.size), target], log_probs


@kernel(SOFTMAX_CROSS_ENTROPY_BWD, device="cpu", step=1, note="in place, no one-hot matrix", dtypes=("any",))
def ce_bwd_inplace(dloss, log_probs, target):
    dlogits = np.exp(log_probs, out=empty(log_probs.shape, log_probs.dtype))
    dlogits[np.arange(target.size), target] -= 1
    dlogits *= dloss[:, None]
    return dlogits
