"""Batches on a GPU, from a data set that lies there."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..cuda.launch import Launch, blocks, launch, variants
from ..memory import empty_nhwc, namespace
from ..registry import HALVES, kernel
from .problem import AUGMENT

_AUGMENT = variants(Path(__file__).with_name("augment.cu"), "augment", ("float32", *HALVES))
_BATCH = np.dtype([(name, np.int32) for name in ("N", "H", "W", "C", "padding")])  # struct Batch
_MOST_BLOCKS = 1 << 16


@kernel(AUGMENT, device="cuda", step=1, note="a thread per number", dtypes=("float32",))
def augment_cuda(images, rows, places, scale, shift, border, *, padding, dtype):
    (_, h, w, c), n = images.shape, len(rows)
    y, memory = empty_nhwc(n, c, h, w, dtype, images)
    arrays = (namespace(a).ascontiguousarray(a) for a in (images, rows, places, scale, shift, border))
    about = np.array((n, h, w, c, padding), _BATCH)
    grid = (min(blocks(memory.size, 256), _MOST_BLOCKS),)
    launch(Launch(_AUGMENT[np.dtype(dtype).name], grid, (256,), (*arrays, memory, about)))
    return y
