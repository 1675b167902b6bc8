"""The step of AdamW on a GPU: one launch for a group, one pass over its memory."""

from __future__ import annotations

from pathlib import Path

from ..cuda.groups import launch_group
from ..cuda.launch import variants
from ..groups import flattened, roles_of, write_back
from ..memory import namespace
from ..registry import kernel
from .problem import ADAMW_STEP, roles_with

_STEP = variants(Path(__file__).with_name("adamw.cu"), "adamw_step")


def _same_dtype(*arrays, **_):
    return len({a.dtype for a in arrays if a is not None}) == 1


@kernel(ADAMW_STEP, device="cuda", step=1, note="one launch for all, one fused pass", supports=_same_dtype)
def adamw_step_cuda(factors, found, *tensors, beta1, beta2, eps, penalty, amsgrad):
    roles, copied = flattened(roles_of(tensors, roles_with(amsgrad)), (0, 2, 3, 4))
    factors = namespace(factors).ascontiguousarray(factors)
    numbers = (factors.dtype.type(number) for number in (1 - beta1, beta2, 1 - beta2, eps, penalty))
    lists = [*roles, roles[0]][:5]  # without amsgrad the fifth is not read
    flags = (found is not None, bool(amsgrad))
    launch_group(_STEP[factors.dtype.name], lists, factors, factors if found is None else found, *numbers, *flags)
    write_back(copied)
