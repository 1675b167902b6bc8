"""Launchers of step 5, `05_tensor_cores.cu`: fp16 and bf16 on tensor cores; TF32 for those who ask for it by name.

TF32 never runs by itself: its rank is 0. `use_kernels(conv2d_fprop="fprop_3xtf32", ...)` chooses it. Its error factors,
in units of float32's eps = 2^-23: rounding both factors to 10 digits is off by 2^-11 each, 8192 together. Split in two,
they are off by 2^-22 each, and the product that is left out by as much: 6, beside what any sum's roundings lose. (An
infinite factor makes 3xTF32 NaN: infinity less infinity is what its second part would be.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cuda.launch import SM_80, STORED_AS, Function, Launch, blocks, launch
from ..memory import empty, to_nhwc
from ..registry import kernel
from .cuda_kernels import krsc
from .cuda_shapes import add_slices, dgrad_shapes, fprop_shapes, slices_of, wgrad_shapes
from .cuda_vectorised import aligned, filled, width
from .problem import CONV2D_DGRAD, CONV2D_FPROP, CONV2D_WGRAD

_SOURCE = Path(__file__).with_name("05_tensor_cores.cu")
ROWS, LINE, STAGES, MOST_TAPS = 128, 64, 3, 256  # rows of a tile, bytes of its depth, tiles under way
WIDTHS = (32, 64, 128)  # columns of a tile
_HALVES, _SINGLE = ("float16", "bfloat16"), ("float32",)
_NOTE = "mma.sync, ldmatrix, cp.async; three tiles under way"


def _functions(entry: str, split: int, dtypes: tuple[str, ...]) -> dict[tuple[str, int], Function]:
    def make(dtype: str, columns: int) -> Function:
        options = (f"-DNUMBER={STORED_AS[dtype]}", f"-DCOLUMNS={columns}", f"-DSPLIT={split}")
        return Function(_SOURCE, entry, options, archs=SM_80, registers=168, alignment=16)

    return {(dtype, columns): make(dtype, columns) for dtype in dtypes for columns in WIDTHS}


def sum_functions(split: int, dtypes: tuple[str, ...]) -> dict[tuple[str, int], Function]:
    """What adds wgrad's slices up, by dtype and columns of its tiles."""
    return _functions("wgrad_sum_jk", split, dtypes)


def _supports(axis: Callable[..., tuple[int, ...]]) -> Callable[..., bool]:
    """One group, few taps, and the sizes that pieces of 16 bytes run along: `axis` says which."""

    def supports(a: Any, b: Any, *, groups: int, **params: Any) -> bool:
        whole = 16 // a.dtype.itemsize
        taps = b.shape[2] * b.shape[3] if "input_hw" in params else 1
        return groups == 1 and a.dtype == b.dtype and taps <= MOST_TAPS and not any(n % whole for n in axis(a, b))

    return supports


def _register(suffix: str, dtypes: tuple[str, ...], split: int = 1, **about: Any) -> None:
    """The three directions, under names that end in `suffix`."""
    fprop_functions, dgrad_functions, wgrad_functions = (
        _functions(entry, split, dtypes) for entry in ("fprop_tensor", "dgrad_tensor", "wgrad_tensor")
    )
    add_up = sum_functions(split, dtypes)

    def fprop(x, w, *, stride, padding, dilation, groups):
        s, whole = fprop_shapes(x, w, stride, padding, dilation, groups), 16 // x.dtype.itemsize
        s.z["C"] = blocks(s["C"], whole) * whole
        columns = width(s["K"], WIDTHS)
        args = (filled(to_nhwc(x), s["C"]), filled(krsc(w), s["C"]), s.memory, s.z)
        grid = (blocks(s.size("NPQ"), ROWS) * blocks(s["K"], columns),)
        _run(fprop_functions[x.dtype.name, columns], grid, args, columns)
        return s.result

    def dgrad(dy, w, *, stride, padding, dilation, groups, input_hw):
        s = dgrad_shapes(dy, w, stride, padding, dilation, groups, input_hw)
        columns = width(s["C"], WIDTHS)
        pixels = s["N"] * blocks(s["H"], s["u"]) * blocks(s["W"], s["v"])  # of the largest class
        grid = (blocks(pixels, ROWS) * blocks(s["C"], columns), s["u"] * s["v"])
        args = (aligned(to_nhwc(dy)), krsc(w), s.memory, s.z)
        _run(dgrad_functions[dy.dtype.name, columns], grid, args, columns)
        return s.result

    def wgrad(x, dy, *, stride, padding, dilation, groups, kernel_hw):
        s, whole = wgrad_shapes(x, dy, stride, padding, dilation, groups, kernel_hw), 16 // x.dtype.itemsize
        s.z["C"] = blocks(s["C"], whole) * whole
        columns, weights = width(s["K"], WIDTHS), s.size("RSC")
        tiles = blocks(weights, ROWS) * blocks(s["K"], columns)
        slices, pixels = slices_of(s.size("NPQ"), tiles, LINE // x.dtype.itemsize)
        parts = empty((slices, weights, s["K"]), "float32", x)
        args = (filled(to_nhwc(x), s["C"]), aligned(to_nhwc(dy)), parts, s.z, pixels)
        _run(wgrad_functions[x.dtype.name, columns], (tiles, slices), args, columns)
        add_slices(add_up[x.dtype.name, columns], parts, s, slices)
        return s.result

    def register(problem, fn, axis):
        supports, name = _supports(axis), f"{fn.__name__}_{suffix}"
        kernel(problem, device="cuda", step=5, supports=supports, dtypes=dtypes, name=name, **about)(fn)

    register(CONV2D_FPROP, fprop, lambda x, w: (w.shape[0],))
    register(CONV2D_DGRAD, dgrad, lambda dy, w: w.shape[:2])
    register(CONV2D_WGRAD, wgrad, lambda x, dy: (dy.shape[1],))


def _run(function: Function, grid: tuple[int, ...], args: tuple, columns: int) -> None:
    """With shared memory for all stages of both tiles."""
    launch(Launch(function, grid, (256,), args, STAGES * (ROWS + columns) * LINE))


def _only_by_name(*arrays: Any, **params: Any) -> float:
    return 0


_register("tensor", _HALVES, error_factor=1, note=_NOTE)
_register(
    "tf32",
    _SINGLE,
    error_factor=8192 + 32,
    rank=_only_by_name,
    exact=False,
    note="factors rounded to TF32; only by name",
)
_register(
    "3xtf32",
    _SINGLE,
    3,
    error_factor=64,
    rank=_only_by_name,
    exact=False,
    note="three products of split factors; only by name",
)
