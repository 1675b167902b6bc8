"""What AMX's instructions do, in loops over an array: the operations of amx.py where MINIRES_AMX=emulate.

The state is the 64 bytes of a configuration, the eight tiles, and a byte that tells whether the configuration is in
force. What hardware answers by a fault raises RuntimeError. Rows and bytes beyond a tile's own are zeros, as after any
write to a tile.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TILESTORED,
TILEZERO, TILERELEASE, TDPBF16PS.
"""

from __future__ import annotations

import numpy as np

from .jit import helper
from .vectors import load, store

_TILES, _TILE, _ROW, _IN_FORCE = 64, 1024, 64, -1  # the offset of tile 0, bytes of a tile and of a row, a flag
_LEAST = np.float32(2.0**-126)  # anything smaller is denormal


@helper()
def configure(state):
    """LDTILECFG: tiles get their shapes, and are zeros."""
    if state[0] != 1 or state[1] != 0:
        raise RuntimeError("AMX: the palette is not 1")
    for tile in range(8):
        rows, row_bytes = _shape(state, tile)
        if rows == 0 or rows > 16 or row_bytes == 0 or row_bytes > 64 or row_bytes % 4:
            raise RuntimeError("AMX: a tile has 1 to 16 rows of 4, 8, ... 64 bytes")
    state[_TILES:] = 0
    state[_IN_FORCE] = 1


@helper()
def release(state):
    """TILERELEASE: as before the first configuration."""
    state[_TILES:] = 0


@helper()
def _shape(state, tile):
    return np.int64(state[48 + tile]), np.int64(state[16 + 2 * tile]) + 256 * np.int64(state[17 + 2 * tile])


@helper()
def _bytes_of(state, tile):
    """The memory of a tile."""
    if state[_IN_FORCE] == 0:
        raise RuntimeError("AMX: a tile is used before the configuration, or after its release")
    return state[_TILES + tile * _TILE : _TILES + (tile + 1) * _TILE]


@helper()
def tile_zero(state, tile):
    """TILEZERO."""
    _bytes_of(state, tile)[:] = 0


@helper()
def tile_load(state, tile, address, stride):
    """TILELOADD: a tile's rows, `stride` bytes apart in memory."""
    memory, (rows, row_bytes) = _bytes_of(state, tile), _shape(state, tile)
    words = memory.view(np.float32)
    memory[:] = 0
    for i in range(rows):
        for j in range(row_bytes // 4):
            store(words[16 * i + j :].ctypes.data, load(address + i * stride + 4 * j, 1, words.dtype))


@helper()
def tile_store(state, tile, address, stride):
    """TILESTORED: a tile's rows, `stride` bytes apart in memory."""
    words, (rows, row_bytes) = _bytes_of(state, tile).view(np.float32), _shape(state, tile)
    for i in range(rows):
        for j in range(row_bytes // 4):
            store(address + i * stride + 4 * j, load(words[16 * i + j :].ctypes.data, 1, words.dtype))


@helper()
def tile_dot(state, c, a, b):
    """TDPBF16PS: C += A B, the even and the odd numbers of the pairs summed apart, each sum added to C rounded."""
    c_rows, c_bytes = _shape(state, c)
    b_rows, b_bytes = _shape(state, b)
    a_rows, a_bytes = _shape(state, a)
    if a == b or a == c or b == c or a_rows != c_rows or b_bytes != c_bytes or a_bytes // 4 != b_rows:
        raise RuntimeError("AMX: the tiles of a product do not fit")
    sums = _bytes_of(state, c).view(np.float32)
    left, right = _bytes_of(state, a).view(np.uint16), _bytes_of(state, b).view(np.uint16)
    for m in range(c_rows):
        for n in range(c_bytes // 4):
            even, odd = np.float32(0), np.float32(0)
            for k in range(b_rows):
                even = _fused(even, left[32 * m + 2 * k], right[32 * k + 2 * n])
                odd = _fused(odd, left[32 * m + 2 * k + 1], right[32 * k + 2 * n + 1])
            both = _flushed(_flushed(even) + _flushed(odd))
            sums[16 * m + n] = _flushed(_flushed(sums[16 * m + n]) + both)


@helper()
def _fused(total, x, y):
    """total + x y, rounded once, x and y being bits of bfloat16. (A product has 16 bits: float64 holds the sum.)"""
    return _flushed(np.float32(np.float64(total) + np.float64(_wide(x)) * np.float64(_wide(y))))


@helper()
def _wide(bits):
    """bfloat16 as float32."""
    return _flushed(np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32))


@helper()
def _flushed(v):
    """Zero in the place of a denormal."""
    return np.float32(0) if abs(v) < _LEAST else v
