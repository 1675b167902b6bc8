"""The step of gradient descent in plain NumPy: the definition, then in place with one temporary."""

import numpy as np

from ..groups import roles_of
from ..memory import empty
from ..registry import kernel
from .problem import SGD_STEP, roles_with, sgd_step_reference

kernel(SGD_STEP, device="cpu", step=0, note="the definition", dtypes=("any",))(sgd_step_reference)


@kernel(SGD_STEP, device="cpu", step=1, note="in place, one temporary", dtypes=("any",))
def sgd_step_inplace(lr, found, *tensors, momentum, dampening, weight_decay, nesterov, first):
    if found is not None and found[0] != 0:
        return
    rate = float(lr[0])
    for p, g, *rest in zip(*roles_of(tensors, roles_with(momentum)), strict=True):
        d = np.multiply(p, weight_decay, out=empty(p.shape, p.dtype))
        d += g
        if not rest:
            d *= rate
        elif first:
            rest[0][...] = d
            d *= rate * (1 + momentum) if nesterov else rate
        else:
            (buf,) = rest
            buf *= momentum
            buf += (1 - dampening) * d
            if nesterov:
                d += momentum * buf
                d *= rate
            else:
                np.multiply(buf, rate, out=d)
        p -= d
