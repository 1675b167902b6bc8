"""Unscaling on a GPU: one launch for all gradients."""

from __future__ import annotations

from pathlib import Path

from ..cuda.groups import launch_group
from ..cuda.launch import variants
from ..groups import flattened, write_back
from ..registry import kernel
from .problem import UNSCALE

_UNSCALE = variants(Path(__file__).with_name("unscale.cu"), "unscale")


def _same_dtype(*arrays):
    return len({a.dtype for a in arrays}) == 1


@kernel(UNSCALE, device="cuda", step=1, note="one launch for all, one pass", supports=_same_dtype)
def unscale_cuda(inverse_scale, found, *gradients):
    roles, copied = flattened([list(gradients)], (0,))
    flag = found if found.flags.c_contiguous else found.copy()
    launch_group(_UNSCALE[found.dtype.name], roles, inverse_scale, flag)
    write_back([*copied, (found, flag)][: len(copied) + (flag is not found)])
