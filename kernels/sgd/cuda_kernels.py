"""The step of gradient descent on a GPU: one fused pass over each parameter."""

from __future__ import annotations

from pathlib import Path

from ..cuda.launch import Launch, blocks, launch, variants
from ..memory import namespace
from ..registry import kernel
from .problem import SGD_STEP

_STEP = variants(Path(__file__).with_name("sgd.cu"), "sgd_step")
_MOST_BLOCKS = 4096


def _same_dtype(p, g, buf, **_):
    return g.dtype == p.dtype and (buf is None or buf.dtype == p.dtype)


@kernel(SGD_STEP, device="cuda", step=1, note="one fused pass", supports=_same_dtype)
def sgd_step_cuda(p, g, buf, *, lr, momentum, dampening, weight_decay, nesterov, first):
    order = sorted(range(p.ndim), key=lambda axis: -abs(p.strides[axis]))  # as p lies in memory
    flat_p, flat_g = _flat(p, order), _flat(g, order)
    flat_buf = flat_p if buf is None else _flat(buf, order)  # an address for the kernel; not read
    has_lr = hasattr(lr, "strides")  # a float32 array (1,)
    factors = (p.dtype.type(factor) for factor in (0 if has_lr else lr, momentum, 1 - dampening, weight_decay))
    flags = (has_lr, buf is not None, bool(nesterov), bool(first))
    args = (flat_p, flat_g, flat_buf, lr if has_lr else flat_p, p.size, *factors, *flags)
    launch(Launch(_STEP[p.dtype.name], (min(blocks(p.size, 256), _MOST_BLOCKS),), (256,), args))
    _write_back(p, flat_p, order)
    if buf is not None:
        _write_back(buf, flat_buf, order)


def _flat(a, order):
    """The numbers in the order of axes: a view where they lie so, else a copy."""
    return namespace(a).ascontiguousarray(a.transpose(order)).reshape(-1)


def _write_back(a, flat, order):
    turned = a.transpose(order)
    if not turned.flags.c_contiguous:
        turned[...] = flat.reshape(turned.shape)
