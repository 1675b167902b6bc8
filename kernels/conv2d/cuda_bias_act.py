"""The convolution of inference on a GPU: the best of the ladder, then one pass for bias, skip and ReLU."""

from __future__ import annotations

from pathlib import Path

from ..cuda.launch import ALL, Launch, blocks, launch, variants
from ..memory import to_nhwc
from ..registry import kernel, kernels
from .cuda_shapes import dense
from .problem import CONV2D_BIAS_ACT

_BIAS_ACT = variants(Path(__file__).with_name("bias_act.cu"), "bias_act", ALL)
_MOST_BLOCKS = 4096


def _same_dtype(x, w, b, z, **_):
    return len({a.dtype for a in (x, w, b, z) if a is not None}) == 1


@kernel(CONV2D_BIAS_ACT, device="cuda", step=1, note="fprop, then one pass in place", supports=_same_dtype, dtypes=ALL)
def bias_act_cuda(x, w, b, z, *, stride, padding, dilation, groups, relu):
    window = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    rivals = [k for k in kernels("conv2d_fprop", "cuda") if k.takes(x, w, **window)]
    y = max(rivals, key=lambda k: k.rank_for(x, w, **window))(x, w, **window)
    memory = to_nhwc(y)
    skip = memory if z is None else to_nhwc(z)  # an address for the kernel; not read
    args = (memory, dense(b), skip, y.size, w.shape[0], z is not None, relu)
    launch(Launch(_BIAS_ACT[x.dtype.name], (min(blocks(y.size, 256), _MOST_BLOCKS),), (256,), args))
    return y
