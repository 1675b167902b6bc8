"""The step of gradient descent on a GPU: one launch for a group, one pass over its memory."""

from __future__ import annotations

from pathlib import Path

from ..cuda.groups import launch_group
from ..cuda.launch import variants
from ..groups import flattened, roles_of, write_back
from ..registry import kernel
from .problem import SGD_STEP, roles_with

_STEP = variants(Path(__file__).with_name("sgd.cu"), "sgd_step")


def _same_dtype(*arrays, **_):
    return len({a.dtype for a in arrays if a is not None}) == 1


@kernel(SGD_STEP, device="cuda", step=1, note="one launch for all, one fused pass", supports=_same_dtype)
def sgd_step_cuda(lr, found, *tensors, momentum, dampening, weight_decay, nesterov, first):
    roles, copied = flattened(roles_of(tensors, roles_with(momentum)), (0, 2))
    factors = (lr.dtype.type(factor) for factor in (momentum, 1 - dampening, weight_decay))
    flags = (found is not None, momentum != 0, bool(nesterov), bool(first))
    lists = [*roles, roles[0]][:3]  # without momentum the third is not read
    launch_group(_STEP[lr.dtype.name], lists, lr, lr if found is None else found, *factors, *flags)
    write_back(copied)
