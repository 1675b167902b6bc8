"""The host's vectors: how many bytes wide, how many registers. `MINIRES_SIMD=avx512|avx2|neon|generic` overrides.

And its AMX tiles: `MINIRES_AMX=off` leaves them alone, `emulate` computes what they would.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import llvmlite.binding as llvm


@dataclass(frozen=True)
class Simd:
    """A vector unit. `tile_rows` x 2 accumulators, the two vectors of B and a broadcast of A fit in its registers."""

    name: str
    vector_bytes: int
    tile_rows: int


_UNITS = {
    "avx512": Simd("avx512", 64, 12),  # 32 registers
    "avx2": Simd("avx2", 32, 6),  # 16 registers
    "neon": Simd("neon", 16, 12),  # 32 registers
    "generic": Simd("generic", 16, 4),
}


@functools.cache
def simd() -> Simd:
    """The vector unit to emit code for. ValueError where MINIRES_SIMD names an unknown one."""
    if forced := os.environ.get("MINIRES_SIMD"):
        if forced not in _UNITS:
            raise ValueError(f"MINIRES_SIMD={forced!r} is unknown: use one of {', '.join(_UNITS)}")
        return _UNITS[forced]
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return _UNITS["avx512"]
    if features.get("avx2") and features.get("fma"):
        return _UNITS["avx2"]
    return _UNITS["neon" if features.get("neon") else "generic"]


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether the host multiplies pairs of bfloat16 into float32 sums by one instruction (AVX512-BF16)."""
    return simd().name == "avx512" and bool(llvm.get_host_cpu_features().get("avx512bf16"))


_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18  # a system call of x86-64, and what it is asked for


@functools.cache
def amx() -> str:
    """ "hardware" where this process may use AMX tiles for bfloat16, "emulated" under MINIRES_AMX=emulate, else "".

    Linux lends the 8 KiB of tiles only to processes that ask; what asks is the first call. ValueError where MINIRES_AMX
    is something else than off or emulate. Source: Linux, Documentation/arch/x86/xstate.rst.
    """
    wanted = os.environ.get("MINIRES_AMX", "")
    if wanted not in ("", "off", "emulate"):
        raise ValueError(f"MINIRES_AMX={wanted!r} is unknown: use off or emulate")
    if wanted:
        return "emulated" if wanted == "emulate" else ""
    features = llvm.get_host_cpu_features()
    if not (features.get("amx-tile") and features.get("amx-bf16")):
        return ""
    return "hardware" if sys.platform == "linux" and _may_use_tiles() else ""


def _may_use_tiles() -> bool:
    """Ask Linux for the tiles, for all threads of this process."""
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0


@functools.cache
def cache_bytes() -> int:
    """Of a core's second-level cache, where Linux tells; else a mebibyte."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(size.rstrip("KM")) << {"K": 10, "M": 20}[size[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        return 1 << 20
