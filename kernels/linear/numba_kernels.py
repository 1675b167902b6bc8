"""The fully connected layer by our own register tiles: it is a 1x1 convolution of images of one pixel.

On layers as small as a ResNet's head the BLAS product is faster (the tiles' operands are packed at every call, for a
single pass over few rows), but its bits depend on the number of threads. `use_kernels` and `autotune` can choose it.
vector_kernels.py reads the operands where they lie.
"""

from ..conv2d.numba_kernels import dgrad_im2col_tile, fprop_im2col_tile, wgrad_im2col_tile
from ..registry import kernel
from .problem import LINEAR_DGRAD, LINEAR_FPROP, LINEAR_WGRAD

_ONE = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)


def _image(a):
    return a[:, :, None, None]


def _not_empty(*arrays):
    return all(a is None or a.size for a in arrays)


@kernel(
    LINEAR_FPROP,
    device="cpu",
    step=2,
    note="register tiles, as a 1x1 convolution",
    supports=_not_empty,
)
def linear_fprop_tile(x, w, b):
    y = fprop_im2col_tile(_image(x), _image(w), **_ONE)[:, :, 0, 0]
    if b is not None:
        y += b
    return y


@kernel(
    LINEAR_DGRAD,
    device="cpu",
    step=2,
    note="register tiles, as a 1x1 convolution",
    supports=_not_empty,
)
def linear_dgrad_tile(dy, w):
    return dgrad_im2col_tile(_image(dy), _image(w), **_ONE, input_hw=(1, 1))[:, :, 0, 0]


@kernel(
    LINEAR_WGRAD,
    device="cpu",
    step=2,
    note="register tiles, as a 1x1 convolution",
    supports=_not_empty,
)
def linear_wgrad_tile(x, dy):
    return wgrad_im2col_tile(_image(x), _image(dy), **_ONE, kernel_hw=(1, 1))[:, :, 0, 0]
