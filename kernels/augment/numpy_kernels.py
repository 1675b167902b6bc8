"""Batches in NumPy: the definition, then all images normalised at once into their padding and cut out of it."""

import numpy as np

from ..memory import empty, empty_nhwc
from ..registry import kernel
from .problem import AUGMENT, augment_reference

kernel(AUGMENT, device="cpu", step=0, note="the definition", dtypes=("any",))(augment_reference)


@kernel(AUGMENT, device="cpu", step=1, note="normalised together, cropped one by one", dtypes=("any",))
def augment_numpy(images, rows, places, scale, shift, border, *, padding, dtype):
    (_, h, w, c), n, p = images.shape, len(rows), padding
    y, memory = empty_nhwc(n, c, h, w, dtype)
    changed = p > 0 or places.any()
    x = empty((n, h + 2 * p, w + 2 * p, c), shift.dtype) if changed or memory.dtype != shift.dtype else memory
    if p:
        x[...] = border
    # along rows of W * C numbers: loops over the C channels alone would be too short
    inside = x.reshape(n, h + 2 * p, (w + 2 * p) * c)[:, p : p + h, p * c : (p + w) * c]
    np.multiply(images[rows].reshape(n, h, w * c), np.tile(scale, w), out=inside, dtype=shift.dtype)
    inside += shift.reshape(h, w * c)
    if x is memory:
        return y
    for i, (row, column, mirrored, top, left, bottom, right) in enumerate(places.tolist()):
        window = x[i, row : row + h, column : column + w]
        memory[i] = window[:, ::-1] if mirrored else window
        if bottom > top:
            memory[i, top:bottom, left:right] = 0
    return y
