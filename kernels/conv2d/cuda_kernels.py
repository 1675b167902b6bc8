"""Convolution on a GPU: launchers of the ladder's first steps. What each step changed and why heads its .cu file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..cuda.launch import ALL, Launch, blocks, launch, variants
from ..linear.cuda_kernels import product
from ..memory import empty, to_nhwc
from ..registry import kernel
from .cuda_shapes import dense, dgrad_shapes, fprop_shapes, slices_of, wgrad_shapes
from .problem import CONV2D_DGRAD, CONV2D_FPROP, CONV2D_WGRAD

_HERE = Path(__file__).parent
_TILE, _DEPTH = 64, 16  # of include/gemm.cuh
_MOST_BLOCKS = 1 << 16


def _functions(file, *entries, **about):
    return (variants(_HERE / file, entry, **about) for entry in entries)


_FPROP_DIRECT, _DGRAD_DIRECT, _WGRAD_DIRECT = _functions("01_direct.cu", "fprop_direct", "dgrad_direct", "wgrad_direct")
_IM2COL, _COL2IM = _functions("02_im2col.cu", "im2col", "col2im")
_FPROP_IMPLICIT, _DGRAD_IMPLICIT, _WGRAD_IMPLICIT, WGRAD_SUM = _functions(
    "03_implicit_gemm.cu", "fprop_implicit", "dgrad_implicit", "wgrad_implicit", "wgrad_sum", dtypes=ALL
)


def _same_dtype(a, b, **_):
    return a.dtype == b.dtype


def _one_group(a, b, *, groups, **_):
    return a.dtype == b.dtype and groups == 1


def _few_channels(x_channels, groups):
    """Whether a group has so few channels that a tile of 64 filters and 16 sums would be nearly empty."""
    return x_channels // groups < 4 and groups > 1


def _each(functions, dtype, size, *args):
    """A thread per number of the result."""
    launch(Launch(functions[dtype.name], (min(blocks(size, 256), _MOST_BLOCKS),), (256,), args))


@kernel(CONV2D_FPROP, device="cuda", step=1, note="a thread per result, from the definition", supports=_same_dtype)
def fprop_direct(x, w, *, stride, padding, dilation, groups):
    s = fprop_shapes(x, w, stride, padding, dilation, groups)
    _each(_FPROP_DIRECT, x.dtype, s.memory.size, to_nhwc(x), dense(w), s.memory, s.z)
    return s.result


@kernel(CONV2D_DGRAD, device="cuda", step=1, note="a thread per result, from the definition", supports=_same_dtype)
def dgrad_direct(dy, w, *, stride, padding, dilation, groups, input_hw):
    s = dgrad_shapes(dy, w, stride, padding, dilation, groups, input_hw)
    _each(_DGRAD_DIRECT, dy.dtype, s.memory.size, to_nhwc(dy), dense(w), s.memory, s.z)
    return s.result


@kernel(CONV2D_WGRAD, device="cuda", step=1, note="a warp per weight, from the definition", supports=_same_dtype)
def wgrad_direct(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    s = wgrad_shapes(x, dy, stride, padding, dilation, groups, kernel_hw)
    args = (to_nhwc(x), to_nhwc(dy), s.memory, s.z)
    launch(Launch(_WGRAD_DIRECT[x.dtype.name], (blocks(s.memory.size, 4),), (128,), args))
    return s.result


@kernel(CONV2D_FPROP, device="cuda", step=2, note="all windows in one matrix, one product", supports=_one_group)
def fprop_im2col(x, w, *, stride, padding, dilation, groups):
    s = fprop_shapes(x, w, stride, padding, dilation, groups)
    pixels, depth = s.size("NPQ"), s.size("CRS")
    product(_windows(x, s), w, pixels, s["K"], depth, (depth, 1, depth, 1), out=s.memory)
    return s.result


@kernel(CONV2D_DGRAD, device="cuda", step=2, note="one product, its windows added up", supports=_one_group)
def dgrad_im2col(dy, w, *, stride, padding, dilation, groups, input_hw):
    s = dgrad_shapes(dy, w, stride, padding, dilation, groups, input_hw)
    depth, width = s["K"], s.size("CRS")
    columns = product(to_nhwc(dy), w, s.size("NPQ"), width, depth, (depth, 1, 1, width))
    _each(_COL2IM, dy.dtype, s.memory.size, columns, s.memory, s.z)
    return s.result


@kernel(CONV2D_WGRAD, device="cuda", step=2, note="all windows in one matrix, one product", supports=_one_group)
def wgrad_im2col(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    s = wgrad_shapes(x, dy, stride, padding, dilation, groups, kernel_hw)
    width = s.size("CRS")
    product(to_nhwc(dy), _windows(x, s), s["K"], width, s.size("NPQ"), (1, s["K"], 1, width), out=s.memory)
    return s.result


def _windows(x, s):
    columns = empty((s.size("NPQ"), s.size("CRS")), x.dtype, x)
    _each(_IM2COL, x.dtype, columns.size, to_nhwc(x), columns, s.z)
    return columns


@kernel(
    CONV2D_FPROP,
    device="cuda",
    step=3,
    note="tiles filled by index arithmetic; no matrix of windows",
    supports=_same_dtype,
    dtypes=ALL,
    rank=lambda x, w, *, groups, **_: 0 if _few_channels(x.shape[1], groups) else 3,
)
def fprop_implicit(x, w, *, stride, padding, dilation, groups):
    s = fprop_shapes(x, w, stride, padding, dilation, groups)
    grid = (blocks(s.size("NPQ"), _TILE), blocks(s["Kg"], _TILE), groups)
    launch(Launch(_FPROP_IMPLICIT[x.dtype.name], grid, (256,), (to_nhwc(x), krsc(w), s.memory, s.z)))
    return s.result


@kernel(
    CONV2D_DGRAD,
    device="cuda",
    step=3,
    note="tiles filled by index arithmetic; no matrix of windows",
    supports=_same_dtype,
    dtypes=ALL,
    rank=lambda dy, w, *, groups, **_: 0 if _few_channels(w.shape[1] * groups, groups) else 3,
)
def dgrad_implicit(dy, w, *, stride, padding, dilation, groups, input_hw):
    s = dgrad_shapes(dy, w, stride, padding, dilation, groups, input_hw)
    grid = (blocks(s.size("NHW"), _TILE), blocks(s["Cg"], _TILE), groups)
    launch(Launch(_DGRAD_IMPLICIT[dy.dtype.name], grid, (256,), (to_nhwc(dy), krsc(w), s.memory, s.z)))
    return s.result


@kernel(
    CONV2D_WGRAD,
    device="cuda",
    step=3,
    note="tiles filled by index arithmetic; slices of the sum, added in order",
    supports=_same_dtype,
    dtypes=ALL,
    rank=lambda x, dy, *, groups, **_: 0 if _few_channels(x.shape[1], groups) else 3,
)
def wgrad_implicit(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    s = wgrad_shapes(x, dy, stride, padding, dilation, groups, kernel_hw)
    width = s["Cg"] * s["R"] * s["S"]
    tiles = (blocks(s["Kg"], _TILE), blocks(width, _TILE))
    slices, pixels = slices_of(s.size("NPQ"), tiles[0] * tiles[1] * groups, _DEPTH)
    parts = empty((slices, s["K"], width), computed(x.dtype), x)
    args = (to_nhwc(x), to_nhwc(dy), parts, s.z, slices, pixels)
    launch(Launch(_WGRAD_IMPLICIT[x.dtype.name], (*tiles, groups * slices), (256,), args))
    _each(WGRAD_SUM, x.dtype, s.memory.size, parts, s.memory, s.z, slices)
    return s.result


def krsc(w):
    """Weights as (K, R, S, C/groups) in memory: neighbours in memory are neighbouring channels, as in activations."""
    return dense(w.transpose(0, 2, 3, 1))


def computed(dtype):
    """What numbers of a dtype are added up in: `real` of include/types.cuh."""
    return np.dtype("float64" if dtype.name == "float64" else "float32")
