"""What the interpreter puts in the place of the driver's tensor maps: 128 bytes that say the same, and the swizzle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..cuda.tensor_map import BYTES, SWIZZLES, TensorMap

__all__ = ["BYTES", "Decoded", "TensorMap", "decode", "encode", "swizzled"]


def encode(tensor: TensorMap, address: int) -> bytes:
    """Address, rank and sizes, shape, strides, box with steps."""
    array, rank = tensor.array, tensor.array.ndim
    words = np.zeros(BYTES // 8, np.uint64)
    words[0] = address
    words[1] = rank | array.dtype.itemsize << 8 | SWIZZLES[tensor.swizzle] << 16 | 1 << 32
    words[2 : 2 + rank] = array.shape[::-1]
    words[7 : 6 + rank] = array.strides[-2::-1]
    words[11 : 11 + rank] = [b | s << 32 for b, s in zip(tensor.box, tensor.every, strict=True)]
    return words.tobytes()


@dataclass(frozen=True)
class Decoded:
    """What `encode` wrote; coordinate 0 first."""

    address: int
    item: int
    swizzle: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]


def decode(data: np.ndarray) -> Decoded | None:
    """A tensor map from its bytes; None where these are none."""
    words = np.ascontiguousarray(data).view(np.uint64)
    rank, item, swizzle, mark = (int(words[1]) >> shift & 255 for shift in (0, 8, 16, 32))
    if mark != 1 or not 1 <= rank <= 5:
        return None
    shape, sides = ([int(n) for n in words[at : at + rank]] for at in (2, 11))
    strides = (item, *(int(n) for n in words[7 : 6 + rank]))
    box, steps = tuple(n & 0xFFFFFFFF for n in sides), tuple(n >> 32 for n in sides)
    return Decoded(int(words[0]), item, swizzle, tuple(shape), strides, box, steps)


def swizzled(places: np.ndarray, mode: int) -> np.ndarray:
    """Shared addresses under a swizzle: bits 4 to 6 xor bits 7 to 9 for 128 bytes, fewer of them for 64 and 32."""
    if mode == 0:
        return places
    mask = (1 << mode) - 1
    return places ^ ((places >> 7 & mask) << 4)
