"""Convolution on a GPU: the ladder's launchers. What each step changed and why is at the head of its .cu file."""

from __future__ import annotations

from pathlib import Path

from ..cuda.launch import Launch, blocks, launch, variants
from ..memory import empty, empty_nhwc, namespace, to_nhwc
from ..registry import kernel
from .cuda_shapes import conv
from .problem import CONV2D_DGRAD, CONV2D_FPROP, CONV2D_WGRAD, out_hw

_HERE = Path(__file__).parent
_MOST_BLOCKS = 1 << 16
_FPROP_DIRECT, _DGRAD_DIRECT, _WGRAD_DIRECT = (
    variants(_HERE / "01_direct.cu", entry) for entry in ("fprop_direct", "dgrad_direct", "wgrad_direct")
)


def _same_dtype(a, b, **_):
    return a.dtype == b.dtype


@kernel(CONV2D_FPROP, device="cuda", step=1, note="a thread per result, from the definition", supports=_same_dtype)
def fprop_direct(x, w, *, stride, padding, dilation, groups):
    (n, c, *hw), (k, _, *rs) = x.shape, w.shape
    pq = out_hw(hw, rs, stride, padding, dilation)
    y, memory = empty_nhwc(n, k, *pq, x.dtype, x)
    about = conv(n, hw, c, k, pq, rs, stride, padding, dilation, groups)
    grid = (min(blocks(memory.size, 256), _MOST_BLOCKS),)
    launch(Launch(_FPROP_DIRECT[x.dtype.name], grid, (256,), (to_nhwc(x), _dense(w), memory, about)))
    return y


@kernel(CONV2D_DGRAD, device="cuda", step=1, note="a thread per result, from the definition", supports=_same_dtype)
def dgrad_direct(dy, w, *, stride, padding, dilation, groups, input_hw):
    (n, k, *pq), (_, cg, *rs) = dy.shape, w.shape
    dx, memory = empty_nhwc(n, cg * groups, *input_hw, dy.dtype, dy)
    about = conv(n, input_hw, cg * groups, k, pq, rs, stride, padding, dilation, groups)
    grid = (min(blocks(memory.size, 256), _MOST_BLOCKS),)
    launch(Launch(_DGRAD_DIRECT[dy.dtype.name], grid, (256,), (to_nhwc(dy), _dense(w), memory, about)))
    return dx


@kernel(CONV2D_WGRAD, device="cuda", step=1, note="a warp per weight, from the definition", supports=_same_dtype)
def wgrad_direct(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    (n, c, *hw), (_, k, *pq) = x.shape, dy.shape
    dw = empty((k, c // groups, *kernel_hw), x.dtype, x)
    about = conv(n, hw, c, k, pq, kernel_hw, stride, padding, dilation, groups)
    grid = (blocks(dw.size, 4),)
    launch(Launch(_WGRAD_DIRECT[x.dtype.name], grid, (128,), (to_nhwc(x), to_nhwc(dy), dw, about)))
    return dw


def _dense(w):
    return namespace(w).ascontiguousarray(w)
