"""Winograd's minimal filtering F(4x4, 3x3): 16 outputs of a 3x3 filter from 36 products instead of 144.

    y  = A' [ (G w G') * (B' x B) ] A       x: a 6x6 patch, y: its 4x4 outputs, * elementwise, summed over channels
    dw = G' [ (A dy A') * (B' x B) ] G      summed over patches: the adjoint of the line above, w for y
    dx = fprop of dy with the filter turned round

(' transposes.) The matrices belong to the interpolation points 0, 1, -1, 2, -2 and infinity. Their numbers grow the
rounding error, so these kernels have an error bound of their own: the same lines with every number's magnitude.

Sources: Winograd, Arithmetic Complexity of Computations, 1980; Lavin and Gray 2015, arXiv:1509.09308.
"""

from __future__ import annotations

import numpy as np

from .problem import out_hw

TILE, TAPS, PATCH = 4, 3, 6  # outputs, taps, inputs, along one axis: PATCH = TILE + TAPS - 1

INPUT = (  # B'
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
FILTER = (  # G
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OUTPUT = (  # A'
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)
UPSTREAM, GRADIENT = tuple(zip(*OUTPUT, strict=True)), tuple(zip(*FILTER, strict=True))  # A, G'


def tiles_of(size: int) -> int:
    """How many tiles cover an axis of so many outputs."""
    return -(-size // TILE)


def supports(rs, stride, dilation, groups) -> bool:
    """Winograd is for 3x3 filters, moved by one pixel."""
    return rs == (TAPS, TAPS) and stride == (1, 1) and dilation == (1, 1) and groups == 1


def fprop_scale(x, w, *, stride, padding, dilation, groups):
    """|A'| ((|G| |w| |G'|) * (|B'| |x| |B|)) |A|: what the rounding error of y is relative to."""
    p, q = out_hw(x.shape[2:], w.shape[2:], stride, padding, dilation)
    v = _sandwich(INPUT, _patches(x, padding, p, q))  # (N, C, tiles down, across, 6, 6)
    m = np.einsum("ncijab,kcab->nkijab", v, _sandwich(FILTER, w))
    y = _sandwich(OUTPUT, m).swapaxes(3, 4)  # (N, K, down, 4, across, 4)
    return y.reshape(*m.shape[:2], y.shape[2] * TILE, y.shape[4] * TILE)[:, :, :p, :q]


def dgrad_scale(dy, w, *, stride, padding, dilation, groups, input_hw):
    """The scale of fprop over dy, with the filter turned round."""
    turned = w.swapaxes(0, 1)[:, :, ::-1, ::-1]
    padding = (TAPS - 1 - padding[0], TAPS - 1 - padding[1])
    if min(padding) < 0:  # then some of dy is never seen
        crop = [slice(max(0, -a), n - max(0, -a)) for a, n in zip(padding, dy.shape[2:], strict=True)]
        dy, padding = dy[:, :, *crop], (max(0, padding[0]), max(0, padding[1]))
    return fprop_scale(dy, turned, stride=stride, padding=padding, dilation=dilation, groups=groups)


def wgrad_scale(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    """|G'| (sum over tiles of (|A| |dy| |A'|) * (|B'| |x| |B|)) |G|."""
    n, k, p, q = dy.shape
    down, across = tiles_of(p), tiles_of(q)
    tiles = np.pad(np.abs(dy), ((0, 0), (0, 0), (0, down * TILE - p), (0, across * TILE - q)))
    d = _sandwich(UPSTREAM, tiles.reshape(n, k, down, TILE, across, TILE).swapaxes(3, 4))
    v = _sandwich(INPUT, _patches(x, padding, p, q))
    return _sandwich(GRADIENT, np.einsum("ncijab,nkijab->kcab", v, d))


def _patches(x, padding, p, q):
    """The 6x6 patches that the tiles of y see, (N, C, tiles down, tiles across, 6, 6), zeros outside x."""
    (h, w), (top, left) = x.shape[2:], padding
    down, across = tiles_of(p) * TILE + TAPS - 1, tiles_of(q) * TILE + TAPS - 1
    padded = np.pad(x, ((0, 0), (0, 0), (top, max(0, down - top - h)), (left, max(0, across - left - w))))
    windows = np.lib.stride_tricks.sliding_window_view(padded[:, :, :down, :across], (PATCH, PATCH), axis=(2, 3))
    return windows[:, :, ::TILE, ::TILE]


def _sandwich(matrix, a):
    """|M| |a| |M'| over the last two axes."""
    m = np.abs(np.array(matrix, np.float64))
    return m @ np.abs(a) @ m.T
