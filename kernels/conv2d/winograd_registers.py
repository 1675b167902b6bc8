"""Winograd F(2x2, 3x3) whose sums stay in registers, for 16 to 64 channels: no M, as in winograd_kernels.py.

    V[e, t, c]  the patches of a block of tiles, transformed, in the first-level cache
    y           for each tile, and each vector of filters: the 16 sums over c of V[e, t, c] * U[e, c, k] at once, one of
                each place, transformed back where they are and written as 2x2 outputs

What it saves, a store and a load of each sum, is less than what it costs: every product loads a number of V and a
vector of U, as no factor meets a second tile, so that the multipliers wait for the loads. (F(4x4)'s 36 sums are more
than there are registers.) It stands here for who wants to see that, and is chosen by hand alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..cpu.jit import helper
from ..cpu.microkernel import INT64, Tile, lanes
from ..cpu.parallel import parallel
from ..cpu.transforms import Value, combine, copy
from ..memory import empty_nhwc, to_nhwc
from ..registry import kernel
from .packing import aligned, panel_width
from .problem import CONV2D_DGRAD, CONV2D_FPROP, out_hw
from .winograd import F2, TAPS, supports
from .winograd_kernels import corner, patches, plane, transformed_filters

_LANES = lanes(np.float32)
_BLOCK = 16  # tiles whose V stays in the first-level cache


def _supports(x, w, *, stride, dilation, groups, **_):
    channels = all(16 <= n <= 64 and n % _LANES == 0 for n in w.shape[:2])
    return channels and x.size > 0 and supports(w.shape[2:], stride, dilation, groups)


def _by_hand(*_, **__):
    return 3.1  # below the direct kernels


_COMMON: Any = dict(
    device="cpu", step=5, supports=_supports, rank=_by_hand, error_factor=4.0, exact=False, dtypes=("float32",)
)


@kernel(
    CONV2D_FPROP,
    error_scale=F2.fprop_scale,
    note="Winograd F(2x2, 3x3), sums in registers; what loads cost",
    **_COMMON,
)
def fprop_winograd_registers(x, w, *, stride, padding, dilation, groups):
    return _convolve(x, w, False, padding, out_hw(x.shape[2:], w.shape[2:], stride, padding, dilation))


@kernel(CONV2D_DGRAD, error_scale=F2.dgrad_scale, note="the same over dy, the filter turned round", **_COMMON)
def dgrad_winograd_registers(dy, w, *, stride, padding, dilation, groups, input_hw):
    return _convolve(dy, w, True, (TAPS - 1 - padding[0], TAPS - 1 - padding[1]), input_hw)


def _convolve(x, w, turned, padding, hw):
    x, k = to_nhwc(x), w.shape[1 if turned else 0]
    y, memory = empty_nhwc(x.shape[0], k, *hw, x.dtype)
    panels, tiles = transformed_filters(w, turned, F2.sides), x.shape[0] * F2.tiles_of(hw[0]) * F2.tiles_of(hw[1])
    _by_tiles(-(-tiles // _BLOCK), x, panels, memory, padding, tiles, panel_width(k, x.dtype), F2.sides)
    return y


@parallel()
def _by_tiles(b, x, panels, y, padding, tiles, width, sides):
    first = b * _BLOCK
    _tile_block(x, panels, y, padding, first, min(_BLOCK, tiles - first), width, sides)


@helper()
def _tile_block(x, panels, y, padding, first, count, width, sides):
    (_, p, q, k), c, tile, size = y.shape, x.shape[3], len(sides) - TAPS + 1, y.itemsize
    down, across, v_plane = (p + tile - 1) // tile, (q + tile - 1) // tile, plane(count, c)
    v, border = aligned(len(sides) ** 2 * v_plane, x), aligned(tile * tile * _LANES, y)
    patches(x, v.ctypes.data, v_plane, padding, p, q, first, count, sides, v)
    for channel in range(0, k, _LANES):
        u = panels[channel // width].ctypes.data + channel % width * size
        for t in range(count):
            n, top, left = corner(first + t, down, across, tile)
            place = np.int64(y.ctypes.data) + (((n * p + top) * q + left) * k + channel) * size
            target, row, column, inside = place, q * k, k, top + tile <= p and left + tile <= q
            if not inside:
                target, row, column = np.int64(border.ctypes.data), tile * _LANES, _LANES
            _outputs(
                v.ctypes.data + t * c * size, v_plane, u, panels.shape[2], width, c, target, row, column, sides, y.dtype
            )  # fmt: skip
            if not inside:
                for i in range(min(tile, p - top)):
                    for j in range(min(tile, q - left)):
                        copy(target + (i * tile + j) * _LANES * size, place + (i * q + j) * k * size, _LANES, y.dtype)


@intrinsic
def _outputs(typing_context, v, v_plane, u, u_plane, u_step, channels, target, row, column, sides, dtype):
    """The outputs of a tile, of a vector of filters, from its sums over so many channels.

    v, u, target: addresses; planes, u_step, row, column: strides in elements; channels of v are neighbours.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        v, v_plane, u, u_plane, u_step, channels, target, row, column = args[:9]
        patch, matrix = range(len(F2.input)), F2.output
        sums = Tile(builder, len(patch) ** 2, 1, dtype.dtype)
        with cgutils.for_range(builder, channels, intp=INT64) as c:
            a, b = sums.at(v, c.index), sums.at(u, c.index, u_step)
            for e, (slot,) in enumerate(sums.slots):
                x = sums.broadcast(sums.load(sums.at(a, e, v_plane), sums.scalar))
                product = sums.add_product(builder.load(slot), x, sums.load(sums.at(b, e, u_plane), sums.vector))
                builder.store(product, slot)
        m = [[Value(sums, builder.load(sums.slots[i * len(patch) + j][0])) for i in patch] for j in patch]
        columns = [combine(matrix, each) for each in m]
        for i in range(len(matrix)):
            for j, result in enumerate(combine(matrix, [each[i] for each in columns])):
                sums.store(result.value, sums.at(sums.at(target, i, row), j, column))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9, sides, dtype), emit
