"""Launchers of step 6, `06_fused.cu`: batch normalisation and ReLU inside the convolutions of training.

Factors change on their way to the tensor cores, which take them rounded to the dtype: so y, and in 16 bits the float32
statistics and sums too, are off by what y's dtype loses, 2^16 times float32's eps for bfloat16. TF32 only by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..cuda.launch import SM_80, STORED_AS, Function, Launch, blocks, launch
from ..memory import empty, namespace, to_nhwc
from ..registry import EPS_OF_BFLOAT16, HALVES, kernel
from .cuda_kernels import krsc
from .cuda_shapes import add_slices, dense, dgrad_shapes, fprop_shapes, slices_of, wgrad_shapes
from .cuda_tensor_cores import LINE, MOST_TAPS, ROWS, STAGES, WIDTHS, sum_functions
from .cuda_vectorised import aligned, filled, width
from .fused_problem import CONV2D_NORM_ACT_DGRAD, CONV2D_NORM_ACT_FPROP, CONV2D_NORM_ACT_WGRAD

_SOURCE = Path(__file__).with_name("06_fused.cu")
_CHANNELS, _SHARERS = 8, 64  # of a block of the small kernels
_NOTE = "BatchNorm and ReLU on the way in, statistics and sums on the way out"
_NULL = np.uint64(0)  # the address of what is not there


def _function(entry: str, dtype: str, columns: int, split: int = 1, **about: Any) -> Function:
    options = (f"-DNUMBER={STORED_AS[dtype]}", f"-DCOLUMNS={columns}", f"-DSPLIT={split}")
    return Function(_SOURCE, entry, options, archs=SM_80, **about)


_STATISTICS, _SUMS = (_function(entry, "float16", WIDTHS[0]) for entry in ("fused_statistics", "fused_bn_sums"))


def _register(suffix: str, dtypes: tuple[str, ...], split: int, **about: Any) -> None:
    """The three directions, under names that end in `suffix`."""
    sized = [(dtype, columns) for dtype in dtypes for columns in WIDTHS]
    fprop_functions, dgrad_functions, wgrad_functions = (
        {key: _function(entry, *key, split, registers=200, alignment=16) for key in sized}
        for entry in ("fprop_fused", "dgrad_fused", "wgrad_fused")
    )
    add_up = sum_functions(split, dtypes)

    def fprop(x, scale, shift, w, *, stride, padding, dilation, groups):
        s, whole = fprop_shapes(x, w, stride, padding, dilation, groups), 16 // x.dtype.itemsize
        s.z["C"] = blocks(s["C"], whole) * whole
        columns, tiles = width(s["K"], WIDTHS), blocks(s.size("NPQ"), ROWS)
        partial = empty((tiles, 2, s["K"]), "float32", x)
        images = filled(to_nhwc(x), s["C"])
        factors = _vector(scale, s["C"]), _vector(shift, s["C"])
        args = (images, *factors, filled(krsc(w), s["C"]), s.memory, partial, s.z)
        grid = (tiles * blocks(s["K"], columns),)
        launch(Launch(fprop_functions[x.dtype.name, columns], grid, (256,), args, _shared(ROWS + columns)))
        mean, var = (empty((s["K"],), "float32", x) for _ in range(2))
        _over_channels(_STATISTICS, s["K"], (partial, mean, var, s.size("NPQ"), s["K"]))
        return s.result, mean, var

    def dgrad(dy, y, f, w, x, scale, shift, mean, inv_std, *, stride, padding, dilation, groups, input_hw):
        s = dgrad_shapes(dy, w, stride, padding, dilation, groups, input_hw)
        columns, classes = width(s["C"], WIDTHS), s["u"] * s["v"]
        tiles = blocks(s["N"] * blocks(s["H"], s["u"]) * blocks(s["W"], s["v"]), ROWS)  # of the largest class
        partial = _NULL if x is None else empty((classes * tiles, 2, s["C"]), "float32", dy)
        before = _activations(x), *(_vector(v, s["C"]) for v in (scale, shift, mean))
        args = (_activations(dy), _activations(y), _dense(f), krsc(w), *before, s.memory, partial, s.z)
        grid = (tiles * blocks(s["C"], columns), classes)
        launch(Launch(dgrad_functions[dy.dtype.name, columns], grid, (256,), args, _shared(2 * ROWS + columns)))
        if x is None:
            return s.result, None, None, None
        dgamma, dbeta, factors = (empty(shape, "float32", dy) for shape in ((s["C"],), (s["C"],), (3, s["C"])))
        statistics = partial, _dense(scale), _dense(mean), _dense(inv_std)
        sizes = classes * tiles, s.size("NHW"), s["C"]
        _over_channels(_SUMS, s["C"], (*statistics, dgamma, dbeta, factors, *sizes))
        return s.result, dgamma, dbeta, factors

    def wgrad(x, scale, shift, dy, y, f, *, stride, padding, dilation, groups, kernel_hw):
        s, whole = wgrad_shapes(x, dy, stride, padding, dilation, groups, kernel_hw), 16 // x.dtype.itemsize
        s.z["C"] = blocks(s["C"], whole) * whole
        columns, weights = width(s["K"], WIDTHS), s.size("RSC")
        tiles = blocks(weights, ROWS) * blocks(s["K"], columns)
        slices, pixels = slices_of(s.size("NPQ"), tiles, LINE // x.dtype.itemsize)
        parts = empty((slices, weights, s["K"]), "float32", x)
        images = filled(to_nhwc(x), s["C"]), _vector(scale, s["C"]), _vector(shift, s["C"])
        args = (*images, _activations(dy), _activations(y), _dense(f), parts, s.z, pixels)
        function = wgrad_functions[x.dtype.name, columns]
        launch(Launch(function, (tiles, slices), (256,), args, _shared(ROWS + 2 * columns)))
        add_slices(add_up[x.dtype.name, columns], parts, s, slices)
        return s.result

    def register(problem: Any, fn: Any, supports: Any, **more: Any) -> None:
        name = f"norm_act_{fn.__name__}_{suffix}"
        kernel(problem, device="cuda", step=6, supports=supports, dtypes=dtypes, name=name, **about | more)(fn)

    def scaled(problem: Any) -> dict[str, Any]:
        """In 16 bits the error scale of the float32 outputs is that of the factors' rounding."""
        if dtypes != HALVES:
            return {}

        def error_scale(*arrays, **params):
            first, *wide = problem.error_scale(*arrays, **params)
            return first, *(None if v is None else v * EPS_OF_BFLOAT16 for v in wide)

        return dict(error_scale=error_scale)

    register(CONV2D_NORM_ACT_FPROP, fprop, _fprop_takes, **scaled(CONV2D_NORM_ACT_FPROP))
    register(CONV2D_NORM_ACT_DGRAD, dgrad, _dgrad_takes, **scaled(CONV2D_NORM_ACT_DGRAD))
    register(CONV2D_NORM_ACT_WGRAD, wgrad, _wgrad_takes)


def _fprop_takes(x, scale, shift, w, *, groups, **_):
    return groups == 1 and x.dtype == w.dtype and w.shape[0] % (16 // x.dtype.itemsize) == 0


def _dgrad_takes(dy, y, f, w, x, scale, shift, mean, inv_std, *, groups, **_):
    (k, c, r, s), whole = w.shape, 16 // w.dtype.itemsize
    same = all(a is None or a.dtype == dy.dtype for a in (y, w, x))
    return groups == 1 and same and k % whole == 0 and c % whole == 0 and r * s <= MOST_TAPS


def _wgrad_takes(x, scale, shift, dy, y, f, *, groups, **_):
    same = all(a is None or a.dtype == x.dtype for a in (dy, y))
    return groups == 1 and same and dy.shape[1] % (16 // x.dtype.itemsize) == 0


def _shared(lines: int) -> int:
    """Shared memory for the lines of all stages."""
    return STAGES * lines * LINE


def _over_channels(function: Function, channels: int, args: tuple) -> None:
    launch(Launch(function, (blocks(channels, _CHANNELS),), (_CHANNELS, _SHARERS), args))


def _activations(a: Any) -> Any:
    return _NULL if a is None else aligned(to_nhwc(a))


def _dense(a: Any) -> Any:
    return _NULL if a is None else aligned(dense(a))


def _vector(v: Any, channels: int) -> Any:
    """A vector with zeros up to so many channels, aligned."""
    if v is None:
        return _NULL
    if v.shape[0] == channels:
        return _dense(v)
    wider = namespace(v).zeros(channels, v.dtype)
    wider[: v.shape[0]] = v
    return wider


_register("tensor", HALVES, 1, error_factor=1, note=_NOTE)
_register(
    "3xtf32",
    ("float32",),
    3,
    error_factor=64,
    rank=lambda *arrays, **params: 0,
    exact=False,
    note="three products of split factors; only by name",
)
