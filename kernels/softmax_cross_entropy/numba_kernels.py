"""Softmax cross-entropy on the CPU: a row stays in the cache from its maximum to its result; parallel over rows.

The loops are written so that LLVM vectorises them: the maximum by halving, and an exp of our own instead of calls into
the C library, which it cannot vectorise. float32 only; float64, where time does not matter, is left to NumPy.
"""

import numpy as np

from ..cpu.jit import helper
from ..cpu.parallel import parallel
from ..memory import empty
from ..registry import kernel
from .problem import SOFTMAX_CROSS_ENTROPY_BWD, SOFTMAX_CROSS_ENTROPY_FPROP

_FEW = 1 << 17  # numbers, 50 microseconds of work, below which it is not worth waking the threads
_LOG2_E, _LN_2 = np.float32(np.log2(np.e)), np.float32(np.log(2))
_LEAST = np.float32(-104)  # exp of anything less is 0 in float32


@kernel(
    SOFTMAX_CROSS_ENTROPY_FPROP,
    device="cpu",
    step=2,
    note="vectorised, row by row in the cache, parallel over rows",
    dtypes=("float32",),
)
def ce_fprop_rows(logits, target):
    loss, log_probs = empty(target.shape, logits.dtype), empty(logits.shape, logits.dtype)
    share = _share(logits)
    _fprop_rows(
        -(-len(logits) // share), np.ascontiguousarray(logits), np.ascontiguousarray(target), loss, log_probs, share
    )
    return loss, log_probs


def _share(logits):
    """Rows of a task: all of them, where the work is not worth waking the threads."""
    return max(1, len(logits)) if logits.size < _FEW else 1


@parallel()
def _fprop_rows(i, logits, target, loss, log_probs, share):
    for n in range(i * share, min((i + 1) * share, target.size)):
        x, row = logits[n], log_probs[n]
        most = _maximum(x, row)
        total = np.float32(0)
        for k in range(x.size):
            total += _exp(x[k] - most)
        log_total = np.log(total)
        for k in range(x.size):
            row[k] = x[k] - most - log_total
        loss[n] = -row[target[n]]


@helper(inline=True)
def _maximum(x, scratch):
    """The greatest number of x: its second half is folded onto the first, in scratch, until one is left."""
    for k in range(x.size):
        scratch[k] = x[k]
    size = x.size
    while size > 1:
        half = (size + 1) // 2
        for k in range(size - half):
            a, b = scratch[k], scratch[half + k]
            scratch[k] = a if a > b else b
        size = half
    return scratch[0]


@helper(inline=True)
def _exp(x):
    """exp(x) for x <= 0 within 2 units in the last place near 0, more by |x| units far from it; a NaN stays one.

    exp(x) = 2^n exp(r) with |r| <= log(2) / 2, and Cephes' polynomial for exp(r). 2^n is put together from its bits, in
    two factors, since it may lie below the least normal number.
    """
    inside = x if x > _LEAST else _LEAST
    n = np.floor(inside * _LOG2_E + np.float32(0.5))
    r = inside - n * _LN_2
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    half = np.int32(n) >> np.int32(1)
    y = p * _power_of_2(half) * _power_of_2(np.int32(n) - half)
    return y if x > _LEAST else (np.float32(0) if x <= _LEAST else x)


@helper(inline=True)
def _power_of_2(n):
    return np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)


@kernel(
    SOFTMAX_CROSS_ENTROPY_BWD,
    device="cpu",
    step=2,
    note="vectorised, one pass, parallel over rows",
    dtypes=("float32",),
)
def ce_bwd_rows(dloss, log_probs, target):
    dlogits = empty(log_probs.shape, log_probs.dtype)
    share, log_probs = _share(log_probs), np.ascontiguousarray(log_probs)
    _bwd_rows(
        -(-len(log_probs) // share),
        np.ascontiguousarray(dloss),
        log_probs,
        np.ascontiguousarray(target),
        dlogits,
        share,
    )
    return dlogits


@parallel()
def _bwd_rows(i, dloss, log_probs, target, dlogits, share):
    for n in range(i * share, min((i + 1) * share, target.size)):
        upstream, row, out = dloss[n], log_probs[n], dlogits[n]
        for k in range(row.size):
            out[k] = upstream * _exp(row[k])
        out[target[n]] = upstream * (_exp(row[target[n]]) - np.float32(1))
