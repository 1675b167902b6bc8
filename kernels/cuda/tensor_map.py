"""Tensor maps: what TMA copies follow. In a `Launch` they are data; on a GPU the driver makes the 128 bytes of them."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

SWIZZLES = {"none": 0, "32B": 1, "64B": 2, "128B": 3}  # CUtensorMapSwizzle
BYTES = 128  # of CUtensorMap
_DTYPES = {"uint8": 0, "float16": 6, "float32": 7, "bfloat16": 9}  # CUtensorMapDataType
_PROMOTE_128 = 2  # CUtensorMapL2promotion: a miss in the second-level cache brings 128 bytes
_ALIGNED = 64  # bytes, as the driver wants its output


@dataclass(frozen=True, eq=False)
class TensorMap:
    """A tensor in global memory and the box that one copy moves; an argument of a launch, passed by value.

    array: NumPy's or CuPy's, C-contiguous; its last axis is coordinate 0. box: sizes of a tile in shared memory,
    coordinate 0 first. swizzle: "none", "32B", "64B" or "128B". steps: along each coordinate every how-manyth element
    is taken; None: every one. Elements outside the array read as zero. Raises ValueError for what
    cuTensorMapEncodeTiled refuses (CUDA driver API, "Tensor Map Object Management").
    """

    array: Any
    box: tuple[int, ...]
    swizzle: str = "128B"
    steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        size = self.array.dtype.itemsize
        if not 1 <= self.array.ndim <= 5 or len(self.box) != self.array.ndim:
            raise ValueError(f"a box {self.box} for an array of {self.array.ndim} axes: one size per axis, at most 5")
        if len(self.every) != len(self.box) or self.every[0] != 1 or not all(1 <= s <= 8 for s in self.every):
            raise ValueError(f"steps {self.steps} of a box {self.box}: one per axis, 1 to 8, the first 1")
        if not all(1 <= b for b in self.box) or not all(
            b * s <= 256 for b, s in zip(self.box, self.every, strict=True)
        ):
            raise ValueError(f"box {self.box} with steps {self.every}: each side, times its step, is 1 to 256")
        if self.swizzle not in SWIZZLES:
            raise ValueError(f"swizzle {self.swizzle!r}: one of {', '.join(SWIZZLES)}")
        if self.box[0] * size % 16 or any(s % 16 for s in self.array.strides[:-1]):
            raise ValueError(f"box {self.box}, strides {self.array.strides}: rows are multiples of 16 bytes")
        if self.swizzle != "none" and self.box[0] * size > int(self.swizzle[:-1]):
            raise ValueError(f"the inner side of box {self.box} is longer than the swizzle {self.swizzle}")

    @property
    def every(self) -> tuple[int, ...]:
        """The steps, written out."""
        return (1,) * len(self.box) if self.steps is None else self.steps


def made_by_driver(tensor: TensorMap) -> np.ndarray:
    """The map as the 1-element array of 128 bytes that CuPy passes by value. RuntimeError where the driver refuses."""
    array, rank = tensor.array, len(tensor.box)
    buffer = ctypes.create_string_buffer(BYTES + _ALIGNED)
    begin = -ctypes.addressof(buffer) % _ALIGNED
    traversed = [b * s for b, s in zip(tensor.box, tensor.every, strict=True)]  # "boxDim", before the steps
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(buffer) + begin),
        ctypes.c_int(_DTYPES[array.dtype.name]),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(array.data.ptr),
        (ctypes.c_uint64 * rank)(*array.shape[::-1]),
        (ctypes.c_uint64 * max(1, rank - 1))(*array.strides[-2::-1]),
        (ctypes.c_uint32 * rank)(*traversed),
        (ctypes.c_uint32 * rank)(*tensor.every),
        *map(ctypes.c_int, (0, SWIZZLES[tensor.swizzle], _PROMOTE_128, 0)),  # no interleaving; zeros outside
    )
    if code:
        raise RuntimeError(
            f"cuTensorMapEncodeTiled refuses {array.shape} {array.dtype}, box {tensor.box}: error {code}"
        )
    return np.frombuffer(buffer.raw[begin : begin + BYTES], np.dtype((np.void, BYTES))).copy()


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
