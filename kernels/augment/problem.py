"""A batch from a data set of small images: images (M, H, W, C) uint8, rows (N,) int64, places (N, 7) int32.

    y[n, c, i, j] = 0                                               where top <= i < bottom and left <= j < right
                    images[m, u, v, c] * scale[c] + shift[u, v, c]  where (u, v) is a pixel of the image m = rows[n]
                    border[c]                                       where it is not: padding
    u = i + row - padding,    v = (mirrored: W - 1 - j, else j) + column - padding
    places[n] = (row, column, mirrored, top, left, bottom, right)

scale, border (C,), shift (H, W, C), float32; y of the dtype of that name, channels last. The product is rounded before
the sum (no fused multiply-add), so that every device makes the same batch, to the bit. Who draws the places, from what,
is no matter of the kernel's.
"""

from __future__ import annotations

import numpy as np

from ..registry import BENCH, TEST, Case, Problem


def augment_reference(images, rows, places, scale, shift, border, *, padding, dtype):
    """y, image by image."""
    (_, h, w, c), p = images.shape, padding
    y = np.zeros((len(rows), h, w, c), dtype)
    for out, m, (row, column, mirrored, top, left, bottom, right) in zip(y, rows, places, strict=True):
        padded = np.tile(border, (h + 2 * p, w + 2 * p, 1))
        padded[p : p + h, p : p + w] = images[m] * scale + shift
        window = padded[row : row + h, column : column + w]
        out[...] = window[:, ::-1] if mirrored else window
        out[top:bottom, left:right] = 0
    return y.transpose(0, 3, 1, 2)


def _case(name, total, n, hw, c=3, padding=0, dtype="float32", tags=TEST):
    return Case(name, dict(total=total, n=n, hw=hw, c=c, padding=padding, dtype=dtype), tags)


CASES = (
    _case("plain", 5, 4, (5, 7)),
    _case("padded", 9, 11, (6, 5), padding=2),
    _case("one_channel", 3, 2, (4, 9), c=1, padding=1),
    _case("wide_padding", 2, 3, (3, 3), c=4, padding=5),
    _case("float16", 4, 5, (5, 7), padding=2, dtype="float16"),
    _case("bfloat16", 4, 5, (7, 6), padding=1, dtype="bfloat16"),
    _case("no_images", 3, 0, (4, 4)),
    _case("several_blocks", 20, 17, (16, 16), padding=4),
    _case("cifar", 50_000, 128, (32, 32), padding=4, tags=BENCH),
)


def _inputs(case, rng):
    p = case.params
    (h, w), n, reach = p["hw"], p["n"], 2 * p["padding"] + 1
    corners = rng.integers(0, [h, w], (n, 2))
    ends = np.minimum(corners + rng.integers(0, 4, (n, 2)), [h, w])  # some boxes are empty
    places = np.concatenate([rng.integers(0, reach, (n, 2)), rng.integers(0, 2, (n, 1)), corners, ends], 1)
    arrays = dict(
        images=rng.integers(0, 256, (p["total"], h, w, p["c"]), np.uint8),
        rows=rng.integers(0, p["total"], n),
        places=places.astype(np.int32),
        scale=1 / (255 * rng.uniform(0.2, 0.3, p["c"])),
        shift=rng.standard_normal((h, w, p["c"])),
        border=rng.standard_normal(p["c"]),
    )
    return arrays, dict(padding=p["padding"], dtype=p["dtype"])


def _size(images, rows) -> int:
    return len(rows) * int(np.prod(images.shape[1:]))


AUGMENT = Problem(
    "augment",
    augment_reference,
    _inputs,
    CASES,
    flops=lambda images, rows, *_, **__: 2 * _size(images, rows),
    bytes_moved=lambda images, rows, *_, padding, dtype: _size(images, rows) * (1 + np.dtype(dtype).itemsize),
    error_scale=lambda images, rows, places, scale, shift, border, **params: augment_reference(
        images, rows, places, scale, np.abs(shift), np.abs(border), **{**params, "dtype": "float64"}
    ),
    wide=("scale", "shift", "border"),
    output_dtypes=lambda _, *, padding, dtype: (dtype,),
)
