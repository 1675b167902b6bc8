"""Few channels, as a stem's three: the taps of a filter's row, with their channels, as the channels of one pixel.

In channels-last memory they are one run, so that x with zeros around it already holds them: a view whose pixels
overlap. The convolution of R x S taps over C channels becomes one of R x 1 taps over S*C, without padding and with a
stride of rows alone.
"""

from __future__ import annotations

import numpy as np

from ..memory import contiguous, write, zeros
from ..pad.numba_kernels import pad_runs

MOST = 32  # numbers of a row of taps


def worthwhile(channels, taps, dilation):
    """Whether a row of `taps` is short enough; taps that are not neighbours are no run."""
    return channels < 16 and 1 < taps and taps * channels <= MOST and dilation[1] == 1


def unfolded(x, taps, columns, stride, padding, multiple=1):
    """x (N, H, W, C) as (N, H + 2 * padding, columns of y, S*C); S*C is filled up to a multiple, with what follows."""
    n, h, w, c = x.shape
    depth = -(-taps * c // multiple) * multiple
    needed = ((columns - 1) * stride[1] + taps) * c + depth - taps * c
    after = max(0, needed - (padding[1] + w) * c)
    rows = pad_runs(
        x.reshape(n, h, w * c), before=(0, padding[0], padding[1] * c), after=(0, padding[0], after),
        interior=(0, 0, 0), value=0,
    )  # fmt: skip
    strides = *rows.strides[:2], stride[1] * c * x.itemsize, x.itemsize
    return np.lib.stride_tricks.as_strided(rows, (n, rows.shape[1], columns, depth), strides)


def unfolded_filters(w):
    """w (K, C, R, S) -> (K, S*C, R, 1), with a filter's row of zeros more where S*C is odd."""
    k, c, r, s = w.shape
    rows = zeros((k, s * c + s * c % 2, r, 1), w.dtype)
    write(rows[:, : s * c, :, 0].reshape(k, s, c, r), w.transpose(0, 3, 1, 2))
    return rows


def folded_filters(dw, c, s):
    """dw (K, at least S*C, R, 1) -> (K, C, R, S)."""
    k, _, r, _ = dw.shape
    return contiguous(dw[:, : s * c, :, 0].reshape(k, s, c, r).transpose(0, 2, 3, 1))
