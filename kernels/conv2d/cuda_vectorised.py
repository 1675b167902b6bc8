"""Launchers of step 4, `04_vectorised.cu`: fp32 by plain multiply-adds."""

from __future__ import annotations

from pathlib import Path

from ..cuda.launch import Function, Launch, blocks, launch
from ..memory import empty, namespace, to_nhwc
from ..registry import kernel
from .cuda_kernels import krsc
from .cuda_shapes import add_slices, dgrad_shapes, fprop_shapes, slices_of, wgrad_shapes
from .problem import CONV2D_DGRAD, CONV2D_FPROP, CONV2D_WGRAD

_SOURCE = Path(__file__).with_name("04_vectorised.cu")
_ROWS, _DEPTH, _MOST_TAPS = 128, 16, 256
_WIDTHS = (32, 64, 128)  # columns of a tile
_FPROP, _DGRAD, _WGRAD = (
    {columns: Function(_SOURCE, entry, (f"-DCOLUMNS={columns}",), registers=168, alignment=16) for columns in _WIDTHS}
    for entry in ("fprop_vectorised", "dgrad_vectorised", "wgrad_vectorised")
)
_WGRAD_SUM = Function(_SOURCE, "wgrad_sum_jk", (f"-DCOLUMNS={_WIDTHS[-1]}",))
_NOTE = "8 x 8 sums per thread, 16 bytes per access, two tiles in turn"


def _fours_fprop(x, w, *, groups, **_):
    return groups == 1 and w.shape[0] % 4 == 0


def _fours_dgrad(dy, w, *, groups, **_):
    k, c, r, s = w.shape
    return groups == 1 and k % 4 == 0 and c % 4 == 0 and r * s <= _MOST_TAPS


def _fours_wgrad(x, dy, *, groups, **_):
    return groups == 1 and dy.shape[1] % 4 == 0


@kernel(CONV2D_FPROP, device="cuda", step=4, note=_NOTE, supports=_fours_fprop, dtypes=("float32",))
def fprop_vectorised(x, w, *, stride, padding, dilation, groups):
    s = fprop_shapes(x, w, stride, padding, dilation, groups)
    s.z["C"] = blocks(s["C"], 4) * 4
    columns = width(s["K"], _WIDTHS)
    grid = (blocks(s.size("NPQ"), _ROWS) * blocks(s["K"], columns),)
    args = (filled(to_nhwc(x), s["C"]), filled(krsc(w), s["C"]), s.memory, s.z)
    launch(Launch(_FPROP[columns], grid, (256,), args))
    return s.result


@kernel(CONV2D_DGRAD, device="cuda", step=4, note=_NOTE, supports=_fours_dgrad, dtypes=("float32",))
def dgrad_vectorised(dy, w, *, stride, padding, dilation, groups, input_hw):
    s = dgrad_shapes(dy, w, stride, padding, dilation, groups, input_hw)
    columns = width(s["C"], _WIDTHS)
    pixels = s["N"] * blocks(s["H"], s["u"]) * blocks(s["W"], s["v"])  # of the largest class
    grid = (blocks(pixels, _ROWS) * blocks(s["C"], columns), s["u"] * s["v"])
    launch(Launch(_DGRAD[columns], grid, (256,), (aligned(to_nhwc(dy)), krsc(w), s.memory, s.z)))
    return s.result


@kernel(CONV2D_WGRAD, device="cuda", step=4, note=_NOTE, supports=_fours_wgrad, dtypes=("float32",))
def wgrad_vectorised(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    s = wgrad_shapes(x, dy, stride, padding, dilation, groups, kernel_hw)
    s.z["C"] = blocks(s["C"], 4) * 4
    columns, weights = width(s["K"], _WIDTHS), s.size("RSC")
    tiles = blocks(weights, _ROWS) * blocks(s["K"], columns)
    slices, pixels = slices_of(s.size("NPQ"), tiles, _DEPTH)
    parts = empty((slices, weights, s["K"]), x.dtype, x)
    args = (filled(to_nhwc(x), s["C"]), aligned(to_nhwc(dy)), parts, s.z, pixels)
    launch(Launch(_WGRAD[columns], (tiles, slices), (256,), args))
    add_slices(_WGRAD_SUM, parts, s, slices)
    return s.result


def width(columns, widths):
    """The narrowest tile that takes all columns, else the widest."""
    return next((n for n in widths if n >= columns), widths[-1])


def filled(memory, channels, multiple_of=16):
    """Channels-last memory with zeros up to so many channels, aligned for wide loads."""
    if memory.shape[3] == channels:
        return aligned(memory, multiple_of)
    wider = namespace(memory).zeros((*memory.shape[:3], channels), memory.dtype)
    wider[..., : memory.shape[3]] = memory
    return wider


def aligned(memory, multiple_of=16):
    """The memory itself, or a copy where a view begins at an address that wide loads do not take."""
    start = memory.ctypes.data if hasattr(memory, "ctypes") else memory.data.ptr
    return memory if start % multiple_of == 0 else memory.copy()
