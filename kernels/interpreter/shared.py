"""Shared memory of a wave's blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .shadow import Clocks, Intervals, Shadow

if TYPE_CHECKING:
    from .wave import Fragment, Wave

BASE = 1024  # the first address: 0 stays invalid, and a dynamic array may ask for the alignment of a swizzle, 1,024
WINDOW = 1 << 40  # generic addresses of shared memory are these, plus the address
_POISON = 0xFF  # every pattern of it is a NaN, or -1


class Shared:
    """bytes: of all blocks, one after the other, `stride` each."""

    unknown_swizzle = 255

    def __init__(self, wave: Wave, dynamic_bytes: int):
        program = wave.program
        self.wave = wave
        self.limit = program.shared_end + dynamic_bytes  # the first address past the end
        self.stride = -(-self.limit // 1024) * 1024
        self.bytes = np.full(wave.blocks * self.stride, _POISON, np.uint8)
        self.granule = program.granule
        self.swizzle = np.full(len(self.bytes) // 16, self.unknown_swizzle, np.uint8)  # of tensor copies, per 16 bytes
        granules = len(self.bytes) // self.granule
        self.shadow: Shadow = Clocks(wave, granules) if program.fine else Intervals(wave, granules)

    def locate(self, address: Any, size: int, fragment: Fragment) -> tuple[np.ndarray, np.ndarray]:
        """Addresses of a fragment's lanes -> (places in `bytes`, lanes). Raises Fault."""
        wave = self.wave
        address = fragment.full(address).astype(np.int64)
        lanes = wave.every_lane if fragment.whole else fragment.lanes
        if not len(address):
            return address, lanes
        if (wrong := address & (size - 1)).any():
            first = int(np.flatnonzero(wrong)[0])
            text = f"byte {int(address[first]) - BASE} of shared memory is no multiple of {size}"
            raise wave.fault("misaligned", fragment, text, int(lanes[first]))
        if address.min() < BASE or address.max() > self.limit - size:
            first = int(np.flatnonzero((address < BASE) | (address > self.limit - size))[0])
            text = (
                f"byte {int(address[first]) - BASE} of shared memory, and {size} bytes from there; "
                f"the block has {self.limit - BASE}"
            )
            raise wave.fault("out of bounds", fragment, text, int(lanes[first]))
        return address + wave.block[lanes] * self.stride, lanes

    def granules(self, places: np.ndarray, size: int) -> np.ndarray:
        """The granules of `size` bytes at each place: (lanes,), or (parts, lanes)."""
        first, parts = places // self.granule, size // self.granule
        return first if parts == 1 else first + np.arange(parts)[:, None]

    def load(self, address: Any, size: int, fragment: Fragment) -> np.ndarray:
        """`size` bytes for each lane of the fragment, as one number, or for more than 8 as rows of 32-bit words."""
        places, lanes = self.locate(address, size, fragment)
        self.shadow.read(self.granules(places, size), lanes, fragment)
        return gather(self.bytes, places, size)

    def store(self, address: Any, value: np.ndarray, size: int, fragment: Fragment) -> None:
        """Write one number, or row of words, for each lane of the fragment."""
        places, lanes = self.locate(address, size, fragment)
        scatter(self.bytes, places, size, value)

        def same() -> bool:
            return bool((gather(self.bytes, places, size) == value).all())

        self.shadow.write(self.granules(places, size), lanes, fragment, same=same)


def gather(memory: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
    """`size` bytes at each place: (lanes,) of 1 to 8 bytes, or (lanes, words) of 4."""
    if size <= 8:
        return memory.view(f"u{size}")[places // size]
    return memory.view("u4").reshape(-1, size // 4)[places // size]


def scatter(memory: np.ndarray, places: np.ndarray, size: int, value: np.ndarray) -> None:
    """Write at each place what `gather` reads there. Of two lanes at one place the later one wins."""
    if size <= 8:
        memory.view(f"u{size}")[places // size] = value
    else:
        memory.view("u4").reshape(-1, size // 4)[places // size] = value
