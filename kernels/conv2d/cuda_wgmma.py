"""Launchers of step 7, `07_tma_wgmma.cu`: fp16 and bf16 on Hopper (sm_90a) alone, fprop, and dgrad at stride 1.

It never runs by itself: its rank is 0. `use_kernels(conv2d_fprop="fprop_wgmma")` chooses it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from ..cuda.launch import STORED_AS, Function, Launch, blocks, launch
from ..cuda.tensor_map import TensorMap
from ..memory import to_nhwc
from ..registry import HALVES, kernel
from .cuda_kernels import krsc
from .cuda_shapes import Shapes, dense, dgrad_shapes, fprop_shapes
from .cuda_vectorised import filled, width
from .problem import CONV2D_DGRAD, CONV2D_FPROP

_SOURCE = Path(__file__).with_name("07_tma_wgmma.cu")
_PIXELS, _DEPTH, _STAGES, _THREADS = 128, 64, 4, 384  # of a tile, numbers of its depth, tiles under way
_WIDTHS = (64, 128)  # columns of a tile
_LINE = 128  # bytes of a tile's row
_MOST_STEP = 2  # boxes of 128 pixels a row, taken every second one, are TMA's 256
_BOX = np.dtype([(name, np.int32) for name in "WHI"])  # struct Box
_NOTE = "TMA, mbarriers and wgmma, copying and multiplying by different warps; only by name"
_FUNCTIONS = {
    (dtype, columns): Function(
        _SOURCE,
        "fprop_wgmma",
        (f"-DNUMBER={STORED_AS[dtype]}", f"-DCOLUMNS={columns}"),
        archs=("sm_90a",),
        registers=168,
        alignment=16,
    )
    for dtype in HALVES
    for columns in _WIDTHS
}


def _on_hopper(a: Any) -> bool:
    """Whether an array lies on a GPU of compute capability 9.0, or not on a GPU at all (it is interpreted then)."""
    return getattr(a.device, "compute_capability", "90") == "90"


def _fprop_takes(x, w, *, stride, groups, **_):
    whole = w.shape[0] % 8 == 0 and max(stride) <= _MOST_STEP
    return groups == 1 and x.dtype == w.dtype and whole and _on_hopper(x)


def _dgrad_takes(dy, w, *, stride, padding, dilation, groups, input_hw):
    turned = _turned_padding(w, padding, dilation)
    return _fprop_takes(dy, w, stride=stride, groups=groups) and max(stride) == 1 and min(turned) >= 0 and _eights(w)


def _eights(w: Any) -> bool:
    return w.shape[0] % 8 == w.shape[1] % 8 == 0


def _turned_padding(w: Any, padding: tuple, dilation: tuple) -> tuple[int, ...]:
    """The padding of dy in dgrad: where the first tap of the filters, turned round, meets the first pixel of dx."""
    return tuple(d * (taps - 1) - a for d, taps, a in zip(dilation, w.shape[2:], padding, strict=True))


def _only_by_name(*arrays: Any, **params: Any) -> float:
    return 0


_step = functools.partial(kernel, device="cuda", step=7, note=_NOTE, rank=_only_by_name, dtypes=HALVES, error_factor=1)


@_step(CONV2D_FPROP, supports=_fprop_takes)
def fprop_wgmma(x, w, *, stride, padding, dilation, groups):
    s = fprop_shapes(x, w, stride, padding, dilation, groups)
    _convolve(to_nhwc(x), krsc(w), s)
    return s.result


@_step(CONV2D_DGRAD, supports=_dgrad_takes)
def dgrad_wgmma(dy, w, *, stride, padding, dilation, groups, input_hw):
    """fprop of dy with the filters turned round, C and K exchanged."""
    s = dgrad_shapes(dy, w, stride, padding, dilation, groups, input_hw)
    turned = s.z.copy()
    for there, back in zip("HWCKPQ", "PQKCHW", strict=True):
        turned[there] = s.z[back]
    turned["a"], turned["b"] = _turned_padding(w, padding, dilation)
    filters = dense(w.transpose(1, 2, 3, 0)[:, ::-1, ::-1])  # (C, R, S, K)
    _convolve(to_nhwc(dy), filters, Shapes(turned, s.result, s.memory))
    return s.result


def _convolve(images: Any, filters: Any, s: Shapes) -> None:
    """y (N, P, Q, K) of x (N, H, W, C) and w (K, R, S, C), as the struct of `s` calls them."""
    s.z["C"] = blocks(s["C"], 8) * 8
    images, filters = filled(images, s["C"]), filled(filters, s["C"])
    columns, box = width(s["K"], _WIDTHS), _box(s["Q"], s["P"], s["N"])
    x = TensorMap(images, (_DEPTH, *box), steps=(1, s["v"], s["u"], 1))
    w = TensorMap(filters.reshape(s["K"], s.size("RS"), s["C"]), (_DEPTH, 1, columns))
    tiles = blocks(s["Q"], box[0]) * blocks(s["P"], box[1]) * blocks(s["N"], box[2])
    shared = 1024 + _STAGES * ((_PIXELS + columns) * _LINE + 16)  # of which some aligns; two mbarriers a stage
    args = (x, w, s.memory, s.z, np.array(box, _BOX))
    function = _FUNCTIONS[images.dtype.name, columns]
    launch(Launch(function, (tiles * blocks(s["K"], columns),), (_THREADS,), args, shared))


def _box(columns: int, rows: int, images: int) -> tuple[int, int, int]:
    """The box of 128 pixels that covers all images with the fewest tiles; of equal ones that with the longest rows."""
    powers = [1 << i for i in range(_PIXELS.bit_length())]
    boxes = [(w, h, _PIXELS // (w * h)) for w in powers[::-1] for h in powers[::-1] if w * h <= _PIXELS]
    return min(boxes, key=lambda b: blocks(columns, b[0]) * blocks(rows, b[1]) * blocks(images, b[2]))
