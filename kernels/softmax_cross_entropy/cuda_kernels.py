"""Softmax cross-entropy on a GPU."""

from __future__ import annotations

from pathlib import Path

from ..cuda.launch import ALL, Launch, blocks, launch, variants
from ..memory import empty, namespace
from ..registry import kernel
from .problem import SOFTMAX_CROSS_ENTROPY_BWD, SOFTMAX_CROSS_ENTROPY_FPROP

_SOURCE = Path(__file__).with_name("softmax_cross_entropy.cu")
_FPROP, _BWD = variants(_SOURCE, "ce_fprop", ALL), variants(_SOURCE, "ce_bwd", ALL)
_ROWS = 4  # per block: a warp each
_MOST_BLOCKS = 4096


@kernel(SOFTMAX_CROSS_ENTROPY_FPROP, device="cuda", step=1, note="a warp per row", dtypes=ALL)
def ce_fprop_cuda(logits, target):
    loss, log_probs = empty(target.shape, logits.dtype, logits), empty(logits.shape, logits.dtype, logits)
    args = (*_dense(logits, target), loss, log_probs, *logits.shape)
    launch(Launch(_FPROP[logits.dtype.name], (blocks(target.size, _ROWS),), (32 * _ROWS,), args))
    return loss, log_probs


@kernel(SOFTMAX_CROSS_ENTROPY_BWD, device="cuda", step=1, note="a thread per number", dtypes=ALL)
def ce_bwd_cuda(dloss, log_probs, target):
    dlogits, n = empty(log_probs.shape, log_probs.dtype, log_probs), log_probs.size
    args = (*_dense(dloss, log_probs, target), dlogits, n, log_probs.shape[1])
    launch(Launch(_BWD[log_probs.dtype.name], (min(blocks(n, 256), _MOST_BLOCKS),), (256,), args))
    return dlogits


def _dense(*arrays):
    return (namespace(a).ascontiguousarray(a) for a in arrays)
