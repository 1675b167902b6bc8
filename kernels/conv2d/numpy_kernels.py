"""Convolution in plain NumPy: the definitions, then im2col and one matrix product (BLAS)."""

import numpy as np

from ..memory import empty_nhwc, to_nhwc
from ..registry import kernel
from .problem import (
    CONV2D_BIAS_ACT,
    CONV2D_DGRAD,
    CONV2D_FPROP,
    CONV2D_WGRAD,
    bias_act_reference,
    dgrad_reference,
    fprop_reference,
    out_hw,
    wgrad_reference,
)

kernel(CONV2D_FPROP, device="cpu", step=0, note="the definition, window by window", dtypes=("any",))(fprop_reference)
kernel(CONV2D_DGRAD, device="cpu", step=0, note="the definition: each window gets its share", dtypes=("any",))(
    dgrad_reference
)
kernel(CONV2D_WGRAD, device="cpu", step=0, note="the definition: x windows times dy", dtypes=("any",))(wgrad_reference)
kernel(CONV2D_BIAS_ACT, device="cpu", step=0, note="the definition: convolution, bias, skip, ReLU", dtypes=("any",))(
    bias_act_reference
)


def _columns(x, rs, stride, padding, dilation):
    """im2col without a copy: a view (N, P, Q, C, R, S) of the padded input."""
    xp = np.pad(to_nhwc(x), ((0, 0), (padding[0],) * 2, (padding[1],) * 2, (0, 0)))
    span = tuple(d * (taps - 1) + 1 for d, taps in zip(dilation, rs, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(xp, span, axis=(1, 2))
    return windows[:, :: stride[0], :: stride[1], :, :: dilation[0], :: dilation[1]]


@kernel(
    CONV2D_FPROP, device="cpu", step=1, note="im2col as a strided view, copied once, one BLAS product", dtypes=("any",)
)
def fprop_im2col_numpy(x, w, *, stride, padding, dilation, groups):
    n, (k, c, *rs) = x.shape[0], w.shape
    p, q = out_hw(x.shape[2:], tuple(rs), stride, padding, dilation)
    y, memory = empty_nhwc(n, k, p, q, np.result_type(x, w))
    columns = _columns(x, rs, stride, padding, dilation)
    for g in range(groups):
        mine = slice(g * k // groups, (g + 1) * k // groups)
        patches = columns[:, :, :, g * c : (g + 1) * c].reshape(n * p * q, -1)  # (NPQ, CRS)
        memory[..., mine] = (patches @ w[mine].reshape(k // groups, -1).T).reshape(n, p, q, -1)
    return y


@kernel(CONV2D_DGRAD, device="cpu", step=1, note="one BLAS product, then col2im tap by tap", dtypes=("any",))
def dgrad_col2im_numpy(dy, w, *, stride, padding, dilation, groups, input_hw):
    (n, k, p, q), (c, r, s), (h, v) = dy.shape, w.shape[1:], input_hw
    dx = np.zeros((n, h + 2 * padding[0], v + 2 * padding[1], c * groups), np.result_type(dy, w))
    dy = to_nhwc(dy)
    for g in range(groups):
        mine = slice(g * k // groups, (g + 1) * k // groups)
        # (NPQ, K) @ (K, CRS) -> every output position's contribution to the patch that it saw
        share = (dy[..., mine].reshape(n * p * q, -1) @ w[mine].reshape(k // groups, -1)).reshape(n, p, q, c, r, s)
        for i in range(r):
            rows = slice(i * dilation[0], i * dilation[0] + p * stride[0], stride[0])
            for j in range(s):
                cols = slice(j * dilation[1], j * dilation[1] + q * stride[1], stride[1])
                dx[:, rows, cols, g * c : (g + 1) * c][:, :p, :q] += share[..., i, j]
    return dx[:, padding[0] : padding[0] + h, padding[1] : padding[1] + v].transpose(0, 3, 1, 2)


@kernel(CONV2D_WGRAD, device="cpu", step=1, note="im2col, one BLAS product", dtypes=("any",))
def wgrad_im2col_numpy(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    (n, k, p, q), c = dy.shape, x.shape[1] // groups
    columns, dy = _columns(x, kernel_hw, stride, padding, dilation)[:, :p, :q], to_nhwc(dy)
    dw = []
    for g in range(groups):
        patches = columns[:, :, :, g * c : (g + 1) * c].reshape(n * p * q, -1)
        dw.append(dy[..., g * k // groups : (g + 1) * k // groups].reshape(n * p * q, -1).T @ patches)
    return np.concatenate(dw).reshape(k, c, *kernel_hw)
