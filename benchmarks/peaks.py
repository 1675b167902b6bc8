"""What this machine can do at most, measured: fused multiply-adds per second, bytes copied per second, and sgemm.

A kernel is judged by its share of these, and absolute times are read beside them: they drift with the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from minires.kernels.cpu.amx import (  # pyright: ignore[reportMissingImports]
    BYTES,
    ROWS,
    configure,
    new_state,
    release,
    tile_dot,
)
from minires.kernels.cpu.features import amx, simd  # pyright: ignore[reportMissingImports]
from minires.kernels.cpu.jit import get_num_threads, helper  # pyright: ignore[reportMissingImports]
from minires.kernels.cpu.microkernel import PairTile  # pyright: ignore[reportMissingImports]
from minires.kernels.cpu.parallel import parallel  # pyright: ignore[reportMissingImports]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_WIDTHS = (16, 32, 64)  # bytes
_CHAINS = 12  # independent sums, to hide the latency; with two operands they fit into 16 registers
_STEPS = 3_000_000
_SGEMM = 2048
_COPY_NUMBERS = 1 << 26  # 256 MiB of float32, beyond any cache
_BLOCK = 1 << 20
_REPEATS = 10
_REST = 0.3  # seconds until OpenBLAS's threads have stopped spinning


@dataclass(frozen=True)
class Peaks:
    """fma: FLOP/s (float32) by vector width in bytes. copy: bytes read and written per second. sgemm: FLOP/s.

    pairs: FLOP/s of products of pairs of bfloat16, summed in float32, as the kernels form them, on vectors or on AMX
    tiles, whichever are more; 0: not measured.
    """

    fma: dict[int, float]
    copy: float
    sgemm: float
    pairs: float = 0.0

    @property
    def flops(self) -> float:
        """The most FLOP/s of any width."""
        return max(self.fma.values())

    def floor(self, flops: float, moved: float, bf16: bool = False) -> float:
        """Seconds that so many operations and bytes take at least; bf16: that multiply bfloat16."""
        return max(flops / (max(self.flops, self.pairs) if bf16 else self.flops), moved / self.copy)

    def columns(self) -> dict[str, str]:
        """For a results file."""
        fma, copy, sgemm = (f"{value / 1e9:.4g}" for value in (self.flops, self.copy, self.sgemm))
        rates = {"fma_gflop_per_s": fma, "copy_gbyte_per_s": copy, "sgemm_gflop_per_s": sgemm}
        return rates | {"bf16_gflop_per_s": f"{self.pairs / 1e9:.4g}" if self.pairs else ""}

    def __str__(self) -> str:
        widths = ", ".join(f"{8 * width} bits {rate / 1e9:.0f}" for width, rate in self.fma.items())
        widths += f", products of bfloat16 {self.pairs / 1e9:.0f}" if self.pairs else ""
        return f"FMA GFLOP/s: {widths}; copy {self.copy / 1e9:.1f} GB/s; sgemm {self.sgemm / 1e9:.0f} GFLOP/s"


def measure() -> Peaks:
    """Measure them on as many threads as the kernels use; takes about two seconds after compilation."""
    return Peaks(_fma_peaks(), _copy_peak(), measure_sgemm(), max(_pairs_peak(), _tiles_peak()))


def measure_sgemm() -> float:
    """FLOP/s of NumPy's BLAS on a product of two 2048 x 2048 matrices, float32: how fast the machine is just now."""
    a = np.ones((_SGEMM, _SGEMM), np.float32)
    out = np.empty_like(a)
    rate = 2 * _SGEMM**3 / _best(lambda: np.matmul(a, a, out))
    time.sleep(_REST)
    return rate


def _best(call: Callable[[], object]) -> float:
    """The shortest of a few times, in seconds: a peak, not what is usual."""
    call()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _fma_peaks() -> dict[int, float]:
    threads, peaks = get_num_threads(), {}
    sums = np.empty(threads, np.float32)
    for width in _WIDTHS:
        if width <= simd().vector_bytes:
            seconds = _best(lambda width=width: _multiply_add(threads, width, _STEPS, sums))
            peaks[width] = threads * _STEPS * _CHAINS * (width // 4) * 2 / seconds
    return peaks


def _pairs_peak() -> float:
    threads = get_num_threads()
    sums = np.empty(threads, np.float32)
    seconds = _best(lambda: _multiply_pairs(threads, _STEPS, sums))
    return threads * _STEPS * _CHAINS * (simd().vector_bytes // 4) * 4 / seconds


def _tiles_peak() -> float:
    if amx() != "hardware":
        return 0.0
    threads = get_num_threads()
    seconds = _best(lambda: _multiply_tiles(threads, _STEPS))
    return threads * _STEPS * 4 * (2 * ROWS**2 * BYTES // 2) / seconds


@parallel()
def _multiply_tiles(i, steps):
    state = new_state()
    _multiply_on_tiles(state, steps)


@helper()
def _multiply_on_tiles(state, steps):
    """Four sums, as many as hide the latency, of what lies in tiles already."""
    configure(state)
    for _ in range(steps):
        tile_dot(state, 0, 4, 6)
        tile_dot(state, 1, 4, 7)
        tile_dot(state, 2, 5, 6)
        tile_dot(state, 3, 5, 7)
    release(state)


def _copy_peak() -> float:
    source, target = np.ones(_COPY_NUMBERS, np.float32), np.zeros(_COPY_NUMBERS, np.float32)
    return 2 * source.nbytes / _best(lambda: _copy(_COPY_NUMBERS // _BLOCK, source, target))


@intrinsic
def _chains(typing_context: Any, steps: Any, x: Any, width: Any) -> Any:
    """The sum of `_CHAINS` vectors of `width` bytes, each `steps` times multiplied by x and added to x."""
    if not isinstance(width, types.IntegerLiteral):
        return None  # Numba asks again with a literal type

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        steps, x, _ = args
        vector = ir.VectorType(ir.FloatType(), width.literal_value // 4)
        index = ir.IntType(32)
        undefined = ir.Constant(vector, ir.Undefined)
        first = builder.insert_element(undefined, x, ir.Constant(index, 0))
        mask = ir.Constant(ir.VectorType(index, vector.count), [0] * vector.count)
        xs = builder.shuffle_vector(first, undefined, mask)
        slots = [cgutils.alloca_once(builder, vector) for _ in range(_CHAINS)]
        for i, slot in enumerate(slots):  # different beginnings, or LLVM would keep one chain for all
            builder.store(ir.Constant(vector, [float(i)] * vector.count), slot)
        with cgutils.for_range(builder, steps, intp=ir.IntType(64)):
            for slot in slots:
                product = builder.fmul(builder.load(slot), xs, flags=("contract",))  # pyright: ignore[reportCallIssue]
                total = builder.fadd(product, xs, flags=("contract",))  # pyright: ignore[reportCallIssue]
                builder.store(total, slot)
        total = builder.load(slots[0])
        for slot in slots[1:]:
            total = builder.fadd(total, builder.load(slot))
        return builder.extract_element(total, ir.Constant(index, 0))

    return types.float32(types.int64, types.float32, width), emit


@intrinsic
def _pair_chains(typing_context: Any, steps: Any, x: Any) -> Any:
    """The sum of `_CHAINS` vectors, to each of which products of x's halves are added `steps` times."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        tile = PairTile(builder, _CHAINS, 1, types.float32)
        xs = tile.broadcast(args[1])
        for i, (slot,) in enumerate(tile.slots):  # different beginnings, as above
            builder.store(ir.Constant(tile.vector, [float(i)] * tile.width), slot)
        with cgutils.for_range(builder, args[0], intp=ir.IntType(64)):
            for (slot,) in tile.slots:
                builder.store(tile.add_product(builder.load(slot), xs, xs), slot)
        total = builder.load(tile.slots[0][0])
        for (slot,) in tile.slots[1:]:
            total = builder.fadd(total, builder.load(slot))
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return types.float32(types.int64, types.float32), emit


@parallel()
def _multiply_pairs(t, steps, sums):
    sums[t] = _pair_chains(steps, np.float32(0.5))  # pyright: ignore[reportCallIssue]


@parallel()
def _multiply_add(t, width, steps, sums):
    sums[t] = _run_chains(width, steps)


@helper()
def _run_chains(width, steps):
    x = np.float32(0.5)
    if width == 64:
        return _chains(steps, x, 64)  # pyright: ignore[reportCallIssue]
    if width == 32:
        return _chains(steps, x, 32)  # pyright: ignore[reportCallIssue]
    return _chains(steps, x, 16)  # pyright: ignore[reportCallIssue]


@parallel()
def _copy(b, source, target):
    target[b * _BLOCK : (b + 1) * _BLOCK] = source[b * _BLOCK : (b + 1) * _BLOCK]
