"""Tensor maps: what TMA copies follow. On a GPU the driver makes them (cuTensorMapEncodeTiled); here they are data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SWIZZLES = {"none": 0, "32B": 1, "64B": 2, "128B": 3}
BYTES = 128  # of CUtensorMap


@dataclass(frozen=True, eq=False)
class TensorMap:
    """A tensor in global memory and the box that one copy moves; an argument of a launch, passed by value.

    array: C-contiguous; its last axis is coordinate 0. box: sizes of a tile, coordinate 0 first. swizzle: "none",
    "32B", "64B" or "128B". Elements outside the array read as zero. Raises ValueError for what cuTensorMapEncodeTiled
    refuses (CUDA driver API, "Tensor Map Object Management").
    """

    array: np.ndarray
    box: tuple[int, ...]
    swizzle: str = "128B"

    def __post_init__(self) -> None:
        size = self.array.dtype.itemsize
        if not 1 <= self.array.ndim <= 5 or len(self.box) != self.array.ndim:
            raise ValueError(f"a box {self.box} for an array of {self.array.ndim} axes: one size per axis, at most 5")
        if not all(1 <= b <= 256 for b in self.box):
            raise ValueError(f"box {self.box}: each side is 1 to 256")
        if self.swizzle not in SWIZZLES:
            raise ValueError(f"swizzle {self.swizzle!r}: one of {', '.join(SWIZZLES)}")
        if self.box[0] * size % 16 or any(s % 16 for s in self.array.strides[:-1]):
            raise ValueError(f"box {self.box}, strides {self.array.strides}: rows are multiples of 16 bytes")
        if self.swizzle != "none" and self.box[0] * size > int(self.swizzle[:-1]):
            raise ValueError(f"the inner side of box {self.box} is longer than the swizzle {self.swizzle}")

    def encode(self, address: int) -> bytes:
        """128 bytes that say it all: address, rank and sizes, shape, strides, box."""
        rank = self.array.ndim
        words = np.zeros(16, np.uint64)
        words[0] = address
        words[1] = rank | self.array.dtype.itemsize << 8 | SWIZZLES[self.swizzle] << 16 | 1 << 32
        words[2 : 2 + rank] = self.array.shape[::-1]
        words[7 : 6 + rank] = self.array.strides[-2::-1]
        words[11 : 11 + rank] = self.box
        return words.tobytes()


@dataclass(frozen=True)
class Decoded:
    """What `TensorMap.encode` wrote; coordinate 0 first."""

    address: int
    item: int
    swizzle: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


def decode(data: np.ndarray) -> Decoded | None:
    """A tensor map from its bytes; None where these are none."""
    words = np.ascontiguousarray(data).view(np.uint64)
    rank, item, swizzle, mark = (int(words[1]) >> shift & 255 for shift in (0, 8, 16, 32))
    if mark != 1 or not 1 <= rank <= 5:
        return None
    sizes = [tuple(int(n) for n in words[at : at + rank]) for at in (2, 11)]
    strides = (item, *(int(n) for n in words[7 : 6 + rank]))
    return Decoded(int(words[0]), item, swizzle, sizes[0], strides, sizes[1])


def swizzled(places: np.ndarray, mode: int) -> np.ndarray:
    """Shared addresses under a swizzle: bits 4 to 6 xor bits 7 to 9 for 128 bytes, fewer of them for 64 and 32."""
    if mode == 0:
        return places
    mask = (1 << mode) - 1
    return places ^ ((places >> 7 & mask) << 4)
