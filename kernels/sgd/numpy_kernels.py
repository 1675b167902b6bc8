"""The step of gradient descent in plain NumPy: the definition, then in place with one temporary."""

import numpy as np

from ..memory import empty
from ..registry import kernel
from .problem import SGD_STEP, sgd_step_reference

kernel(SGD_STEP, device="cpu", step=0, note="the definition", dtypes=("any",))(sgd_step_reference)


@kernel(SGD_STEP, device="cpu", step=1, note="in place, one temporary", dtypes=("any",))
def sgd_step_inplace(p, g, buf, *, lr, momentum, dampening, weight_decay, nesterov, first):
    d = np.multiply(p, weight_decay, out=empty(p.shape, p.dtype))
    d += g
    if buf is None:
        d *= lr
    elif first:
        buf[...] = d
        d *= lr * (1 + momentum) if nesterov else lr
    else:
        buf *= momentum
        buf += (1 - dampening) * d
        if nesterov:
            d += momentum * buf
            d *= lr
        else:
            np.multiply(buf, lr, out=d)
    p -= d
