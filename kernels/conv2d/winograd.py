"""Winograd's minimal filtering F(m x m, 3x3): m x m outputs of a 3x3 filter from (m + 2)² products.

    y  = A' [ (G w G') * (B' x B) ] A       x: a patch of m + 2 a side, y: its m x m outputs, * elementwise, summed
                                            over channels
    dw = G' [ (A dy A') * (B' x B) ] G      summed over patches: the adjoint of the line above, w for y
    dx = fprop of dy with the filter turned round

(' transposes.) F(4x4) takes 36 products instead of 144, F(2x2) 16 instead of 36. The matrices belong to interpolation
points, 0, 1, -1 and infinity, for F(4x4) 2 and -2 besides. Their numbers grow the rounding error, so these kernels have
an error bound of their own: the same lines with every number's magnitude.

Sources: Winograd, Arithmetic Complexity of Computations, 1980; Lavin and Gray 2015, arXiv:1509.09308.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .problem import out_hw

TAPS = 3  # of a filter, along one axis
Matrix = tuple[tuple[float, ...], ...]


class Form(NamedTuple):
    """F(m x m, 3x3), by its matrices."""

    input: Matrix  # B'
    filter: Matrix  # G
    output: Matrix  # A'

    @property
    def upstream(self) -> Matrix:
        """A"""
        return tuple(zip(*self.output, strict=True))

    @property
    def gradient(self) -> Matrix:
        """G'"""
        return tuple(zip(*self.filter, strict=True))

    @property
    def tile(self) -> int:
        """Outputs along one axis."""
        return len(self.output)

    @property
    def patch(self) -> int:
        """Inputs along one axis."""
        return len(self.input)

    @property
    def sides(self) -> tuple[int, ...]:
        """What compiled code knows the form by: a tuple as long as a patch; of arguments it sees types alone."""
        return (0,) * self.patch

    def tiles_of(self, size: int) -> int:
        """How many tiles cover an axis of so many outputs."""
        return -(-size // self.tile)

    def products_of(self, hw: tuple[int, int]) -> int:
        """How many products an image of so many outputs takes, per channel and filter."""
        return self.patch**2 * self.tiles_of(hw[0]) * self.tiles_of(hw[1])

    def fprop_scale(self, x, w, *, stride, padding, dilation, groups):
        """|A'| ((|G| |w| |G'|) * (|B'| |x| |B|)) |A|: what the rounding error of y is relative to."""
        p, q = out_hw(x.shape[2:], w.shape[2:], stride, padding, dilation)
        v = _sandwich(self.input, self._patches(x, padding, p, q))  # (N, C, tiles down, across, patch, patch)
        m = np.einsum("ncijab,kcab->nkijab", v, _sandwich(self.filter, w))
        y = _sandwich(self.output, m).swapaxes(3, 4)  # (N, K, down, tile, across, tile)
        return y.reshape(*m.shape[:2], y.shape[2] * self.tile, y.shape[4] * self.tile)[:, :, :p, :q]

    def dgrad_scale(self, dy, w, *, stride, padding, dilation, groups, input_hw):
        """The scale of fprop over dy, with the filter turned round."""
        turned = w.swapaxes(0, 1)[:, :, ::-1, ::-1]
        padding = (TAPS - 1 - padding[0], TAPS - 1 - padding[1])
        if min(padding) < 0:  # then some of dy is never seen
            crop = [slice(max(0, -a), n - max(0, -a)) for a, n in zip(padding, dy.shape[2:], strict=True)]
            dy, padding = dy[:, :, *crop], (max(0, padding[0]), max(0, padding[1]))
        return self.fprop_scale(dy, turned, stride=stride, padding=padding, dilation=dilation, groups=groups)

    def wgrad_scale(self, x, dy, *, stride, padding, dilation, groups, kernel_hw):
        """|G'| (sum over tiles of (|A| |dy| |A'|) * (|B'| |x| |B|)) |G|."""
        (n, k, p, q), m = dy.shape, self.tile
        down, across = self.tiles_of(p), self.tiles_of(q)
        tiles = np.pad(np.abs(dy), ((0, 0), (0, 0), (0, down * m - p), (0, across * m - q)))
        d = _sandwich(self.upstream, tiles.reshape(n, k, down, m, across, m).swapaxes(3, 4))
        v = _sandwich(self.input, self._patches(x, padding, p, q))
        return _sandwich(self.gradient, np.einsum("ncijab,nkijab->kcab", v, d))

    def _patches(self, x, padding, p, q):
        """What the tiles of y see, (N, C, tiles down, tiles across, patch, patch), zeros outside x."""
        (h, w), (top, left), m = x.shape[2:], padding, self.tile
        down, across = self.tiles_of(p) * m + TAPS - 1, self.tiles_of(q) * m + TAPS - 1
        padded = np.pad(x, ((0, 0), (0, 0), (top, max(0, down - top - h)), (left, max(0, across - left - w))))
        seen = padded[:, :, :down, :across]
        return np.lib.stride_tricks.sliding_window_view(seen, (self.patch, self.patch), axis=(2, 3))[:, :, ::m, ::m]


F2 = Form(
    input=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    filter=((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    output=((1, 1, 1, 0), (0, 1, -1, -1)),
)
F4 = Form(
    input=(
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
    filter=(
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    output=(
        (1, 1, 1, 1, 1, 0),
        (0, 1, -1, 2, -2, 0),
        (0, 1, 1, 4, 4, 0),
        (0, 1, -1, 8, -8, 1),
    ),
)
FORMS = {form.patch: form for form in (F2, F4)}


def supports(rs, stride, dilation, groups) -> bool:
    """Winograd is for 3x3 filters, moved by one pixel."""
    return rs == (TAPS, TAPS) and stride == (1, 1) and dilation == (1, 1) and groups == 1


def _sandwich(matrix, a):
    """|M| |a| |M'| over the last two axes."""
    m = np.abs(np.array(matrix, np.float64))
    return m @ np.abs(a) @ m.T
