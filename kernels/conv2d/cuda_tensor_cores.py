"""Launchers of step 5, `05_tensor_cores.cu`: fp16 and bf16 on tensor cores."""

from __future__ import annotations

from pathlib import Path

from ..cuda.launch import SM_80, STORED_AS, Function, Launch, blocks, launch
from ..memory import empty, to_nhwc
from ..registry import kernel
from .cuda_kernels import krsc
from .cuda_shapes import dgrad_shapes, fprop_shapes, slices_of, wgrad_shapes
from .cuda_vectorised import aligned, filled, width
from .problem import CONV2D_DGRAD, CONV2D_FPROP, CONV2D_WGRAD

_SOURCE = Path(__file__).with_name("05_tensor_cores.cu")
_ROWS, _DEPTH, _STAGES, _MOST_TAPS = 128, 32, 3, 256
_WIDTHS = (32, 64, 128)  # columns of a tile
_HALVES = ("float16", "bfloat16")


def _functions(entry):
    return {
        (dtype, columns): Function(
            _SOURCE,
            entry,
            (f"-DNUMBER={STORED_AS[dtype]}", f"-DCOLUMNS={columns}"),
            archs=SM_80,
            registers=128,
            alignment=16,
        )
        for dtype in _HALVES
        for columns in _WIDTHS
    }


_FPROP, _DGRAD, _WGRAD, _WGRAD_SUM = map(_functions, ("fprop_tensor", "dgrad_tensor", "wgrad_tensor", "wgrad_sum_jk"))
_NOTE = "mma.sync, ldmatrix, cp.async; three tiles under way"


def _eights_fprop(x, w, *, groups, **_):
    return groups == 1 and x.dtype == w.dtype and w.shape[0] % 8 == 0


def _eights_dgrad(dy, w, *, groups, **_):
    k, c, r, s = w.shape
    return groups == 1 and dy.dtype == w.dtype and k % 8 == 0 and c % 8 == 0 and r * s <= _MOST_TAPS


def _eights_wgrad(x, dy, *, groups, **_):
    return groups == 1 and x.dtype == dy.dtype and dy.shape[1] % 8 == 0


@kernel(CONV2D_FPROP, device="cuda", step=5, note=_NOTE, supports=_eights_fprop, dtypes=_HALVES, error_factor=1)
def fprop_tensor(x, w, *, stride, padding, dilation, groups):
    s = fprop_shapes(x, w, stride, padding, dilation, groups)
    s.z["C"] = blocks(s["C"], 8) * 8
    columns = width(s["K"], _WIDTHS)
    args = (filled(to_nhwc(x), s["C"]), filled(krsc(w), s["C"]), s.memory, s.z)
    _run(_FPROP[x.dtype.name, columns], (blocks(s.size("NPQ"), _ROWS) * blocks(s["K"], columns),), args, columns)
    return s.result


@kernel(CONV2D_DGRAD, device="cuda", step=5, note=_NOTE, supports=_eights_dgrad, dtypes=_HALVES, error_factor=1)
def dgrad_tensor(dy, w, *, stride, padding, dilation, groups, input_hw):
    s = dgrad_shapes(dy, w, stride, padding, dilation, groups, input_hw)
    columns = width(s["C"], _WIDTHS)
    pixels = s["N"] * blocks(s["H"], s["u"]) * blocks(s["W"], s["v"])  # of the largest class
    grid = (blocks(pixels, _ROWS) * blocks(s["C"], columns), s["u"] * s["v"])
    args = (aligned(to_nhwc(dy)), krsc(w), s.memory, s.z)
    _run(_DGRAD[dy.dtype.name, columns], grid, args, columns)
    return s.result


@kernel(CONV2D_WGRAD, device="cuda", step=5, note=_NOTE, supports=_eights_wgrad, dtypes=_HALVES, error_factor=1)
def wgrad_tensor(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    s = wgrad_shapes(x, dy, stride, padding, dilation, groups, kernel_hw)
    s.z["C"] = blocks(s["C"], 8) * 8
    columns, weights = width(s["K"], _WIDTHS), s.size("RSC")
    tiles = blocks(weights, _ROWS) * blocks(s["K"], columns)
    slices, pixels = slices_of(s.size("NPQ"), tiles, _DEPTH)
    parts = empty((slices, weights, s["K"]), "float32", x)
    args = (filled(to_nhwc(x), s["C"]), aligned(to_nhwc(dy)), parts, s.z, pixels)
    _run(_WGRAD[x.dtype.name, columns], (tiles, slices), args, columns)
    grid = (blocks(s.memory.size, 256),)
    launch(Launch(_WGRAD_SUM[x.dtype.name, columns], grid, (256,), (parts, s.memory, s.z, slices)))
    return s.result


def _run(function, grid, args, columns):
    """With shared memory for all stages of both tiles, of 2 bytes per number."""
    launch(Launch(function, grid, (256,), args, _STAGES * (_ROWS + columns) * _DEPTH * 2))
