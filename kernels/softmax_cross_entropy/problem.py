"""Softmax cross-entropy with integer targets as two problems: logits (N, K), target (N,) of classes in [0, K).

    fprop   log_probs[n, k] = x[n, k] - m[n] - log(sum over j of exp(x[n, j] - m[n]))    m = the row's maximum
            loss[n] = -log_probs[n, target[n]]
    bwd     dlogits[n, k] = dloss[n] * (exp(log_probs[n, k]) - (1 if k == target[n] else 0))

Subtracting m changes nothing but keeps exp from overflowing. The caller checks that targets are classes.
"""

from __future__ import annotations

import numpy as np

from ..registry import BENCH, TEST, Case, Problem


def fprop_reference(logits, target):
    """(loss, log_probs), as the formula says."""
    shifted = logits - logits.real.max(1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return -log_probs[np.arange(target.size), target], log_probs


def bwd_reference(dloss, log_probs, target):
    """dlogits, as the formula says."""
    one_hot = target[:, None] == np.arange(log_probs.shape[1])
    return dloss[:, None] * (np.exp(log_probs) - one_hot)


def _case(name, n, k, scale=1.0, tags=TEST):
    return Case(name, dict(n=n, k=k, scale=scale), tags)


CASES = (
    _case("one_class", 3, 1),
    _case("two_classes", 5, 2),
    _case("odd", 7, 11),
    _case("far_apart", 6, 5, scale=300.0),  # exp would overflow without the shift
    _case("wide", 3, 130),
    _case("many", 301, 450),  # enough for threads
    _case("digits", 128, 10, tags=BENCH),
    _case("imagenet", 128, 1000, tags=BENCH),
)


def _logits_and_target(case, rng):
    p = case.params
    return p["scale"] * rng.standard_normal((p["n"], p["k"])), rng.integers(0, p["k"], p["n"])


def _fprop_inputs(case, rng):
    logits, target = _logits_and_target(case, rng)
    return dict(logits=logits, target=target), {}


def _bwd_inputs(case, rng):
    logits, target = _logits_and_target(case, rng)
    log_probs = fprop_reference(logits, target)[1]
    return dict(dloss=rng.standard_normal(case.params["n"]), log_probs=log_probs, target=target), {}


def _fprop_error(logits, target):
    """The shift rounds at the size of the logits and their maximum; the logarithm at 1 + log K."""
    rows = np.abs(logits) + np.abs(logits).max(1, keepdims=True) + 1 + np.log(logits.shape[1])
    return rows[np.arange(target.size), target], rows


def _bwd_error(dloss, log_probs, target):
    """exp turns an absolute error of its argument into a relative one, and may underflow (in float32, at 1e-45)."""
    one_hot = target[:, None] == np.arange(log_probs.shape[1])
    return np.abs(dloss)[:, None] * (np.exp(log_probs) * (1 + np.abs(log_probs)) + one_hot + 1e-37)


def _rows(matrix, *, matrices, vectors):
    """Bytes of so many (N, K) matrices and (N,) vectors, and the targets."""
    n, k = matrix.shape
    return matrix.dtype.itemsize * n * (k * matrices + vectors) + 8 * n


SOFTMAX_CROSS_ENTROPY_FPROP = Problem(
    "softmax_cross_entropy_fprop",
    fprop_reference,
    _fprop_inputs,
    CASES,
    flops=lambda logits, target: 5 * logits.shape[0] * logits.shape[1],  # max, shift, exp, add, subtract
    bytes_moved=lambda logits, target: _rows(logits, matrices=2, vectors=1),
    error_scale=_fprop_error,
)
SOFTMAX_CROSS_ENTROPY_BWD = Problem(
    "softmax_cross_entropy_bwd",
    bwd_reference,
    _bwd_inputs,
    CASES,
    flops=lambda dloss, log_probs, target: 2 * log_probs.shape[0] * log_probs.shape[1],  # exp, multiply
    bytes_moved=lambda dloss, log_probs, target: _rows(log_probs, matrices=2, vectors=1),
    error_scale=_bwd_error,
)
