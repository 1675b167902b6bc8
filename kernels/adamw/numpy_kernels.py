"""The step of AdamW in plain NumPy: the definition, then in place."""

import numpy as np

from ..groups import roles_of
from ..memory import empty
from ..registry import kernel
from .problem import ADAMW_STEP, adamw_step_reference, roles_with

kernel(ADAMW_STEP, device="cpu", step=0, note="the definition", dtypes=("any",))(adamw_step_reference)


@kernel(ADAMW_STEP, device="cpu", step=1, note="in place, two temporaries", dtypes=("any",))
def adamw_step_inplace(factors, found, *tensors, beta1, beta2, eps, penalty, amsgrad):
    if found is not None and found[0] != 0:
        return
    shrink, correction, rate = map(float, factors)
    for p, g, m, v, *rest in zip(*roles_of(tensors, roles_with(amsgrad)), strict=True):
        g = g + penalty * p if penalty else g
        d = np.subtract(g, m, out=empty(p.shape, p.dtype))
        d *= 1 - beta1
        m += d
        np.multiply(g, g, out=d)
        d *= 1 - beta2
        v *= beta2
        v += d
        if rest:
            np.copyto(rest[0], v, where=~(rest[0] > v))
        root = np.sqrt(rest[0] if rest else v)
        root /= correction
        root += eps
        np.divide(m, root, out=d)
        d *= rate
        p *= shrink
        p -= d
