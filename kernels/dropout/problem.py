"""Which of n elements dropout keeps: 1 where a number from [0, 1) is at least p, else 0, as int8.

The numbers are those of a counter: element i's depend on i and on a key of two 64-bit numbers, and on nothing that was
drawn before. So every thread of a GPU makes its own, a key that lies in the GPU's memory is all that changes from call
to call (a CUDA graph can be fed with it), and CPU and GPU drop the same elements.

Philox4x64-10: ten rounds mix the counter c (four words; the first is the block's number, from 1) with the key k

    c0, c1, c2, c3 = high(M1 c2) ^ c1 ^ k0, low(M1 c2), high(M0 c0) ^ c3 ^ k1, low(M0 c0)       k0 += W0, k1 += W1

A block is 8 numbers of 24 bits: of each word the upper 24 of its low half, then of its high half. As
`np.random.Generator(np.random.Philox(key=key)).random(n, np.float32)`.

Source: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
"""

from __future__ import annotations

import math

import numpy as np

from ..registry import BENCH, TEST, Case, Problem

_M0, _M1, _W0, _W1 = 0xD2E7470EE14C6C93, 0xCA5A826395121157, 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_ALL = 2**64 - 1


def dropout_mask_reference(key, *, n, p):
    """The mask, in Python's whole numbers."""
    numbers = []
    for block in range(1, -(-n // 8) + 1):
        c, (k0, k1) = (block, 0, 0, 0), map(int, key)
        for _ in range(10):
            a, b = _M0 * c[0], _M1 * c[2]
            c = ((b >> 64) ^ c[1] ^ k0, b & _ALL, (a >> 64) ^ c[3] ^ k1, a & _ALL)
            k0, k1 = (k0 + _W0) & _ALL, (k1 + _W1) & _ALL
        numbers += [half >> 8 for word in c for half in (word & 0xFFFFFFFF, word >> 32)]
    return (np.array(numbers[:n], np.int64) >= threshold(p)).astype(np.int8)


def threshold(p: float) -> int:
    """The least number of 24 bits, taken for a fraction, that is at least p as a float32."""
    return math.ceil(float(np.float32(p)) * 2**24)


def _case(n, p, tags=TEST):
    return Case(f"{n}_at_{p}", dict(n=n, p=p), tags)


CASES = (
    _case(1, 0.5),
    _case(7, 0.3),
    _case(8, 0.0),
    _case(9, 1.0),
    _case(2500, 0.1),
    _case(1 << 20, 0.5, BENCH),
)


def _inputs(case, rng):
    return dict(key=rng.integers(0, 2**64, 2, np.uint64)), dict(case.params)


DROPOUT_MASK = Problem(
    "dropout_mask",
    dropout_mask_reference,
    _inputs,
    CASES,
    flops=lambda key, *, n, p: 0,  # of floating point
    bytes_moved=lambda key, *, n, p: n,
    error_scale=lambda key, *, n, p: np.zeros(n),
)
