"""The register tile: an LLVM function that multiplies a few rows of A by a few vectors of B, emitted through Numba.

LLVM's vectoriser does not find a register tile in a loop nest, so we write it down: `rows x vectors` accumulators
that live in registers over the whole sum, per step one load of each vector of B and one broadcast of each row of A.

    C[m, v] (+)= sum over o < outer, k < steps of A[m, o, k] * B[o, k, v]     m < rows, v a vector of `lanes` numbers

The sum has two levels because a convolution's has: the rows of a filter, and within a row its taps and channels, which
are one run of memory. A may have any strides (its transpose too); B and C are rows of contiguous vectors. Addresses
are integers, strides are in elements. `multiply_fetching` asks for other memory meanwhile, a line at each step.

bfloat16 is multiplied in pairs (`multiply_pairs_2d`, and `multiply_fetching` of uint16): a step takes two numbers that
lie side by side in A and in B,

    C[m, v] (+)= sum over o, k of A[m, o, k, 0] * B[o, k, v, 0] + A[m, o, k, 1] * B[o, k, v, 1]

in float32, by one instruction (AVX512-BF16's vdpbf16ps: twice the products per second) or by two of widened numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .bfloat16 import BFLOAT, load_bfloat16, store_bfloat16
from .features import has_bfloat16_products, simd
from .jit import helper

ROWS = simd().tile_rows
LINE = 64  # bytes of a cache line
INT64 = ir.IntType(64)
_INT32 = ir.IntType(32)


def lanes(dtype) -> int:
    """How many numbers of this dtype a vector of the host holds."""
    return simd().vector_bytes // np.dtype(dtype).itemsize


@intrinsic
def multiply_tile(typing_context, a, a_row, a_step, b, b_step, c, c_row, steps, accumulate, rows, vectors, dtype):
    """The tile with a sum of one level.

    a, b, c: addresses. a_row, a_step: strides of A between rows and along the sum; b_step: stride of B along the sum;
    c_row: stride of C between rows. steps: length of the sum. accumulate: add to C instead of overwriting it. `rows`
    and `vectors` must be literal integers and `dtype` an array's dtype: they are part of the signature, so that each
    combination is compiled, and cached, for itself.
    """

    if not literal(rows, vectors):
        return None  # Numba asks again with literal types

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        a, a_row, a_step, b, b_step, c, c_row, steps, accumulate = args[:9]
        zero, one = ir.Constant(INT64, 0), ir.Constant(INT64, 1)
        tile = Tile(builder, rows.literal_value, vectors.literal_value, dtype.dtype)
        tile.multiply(a, a_row, a_step, zero, b, b_step, zero, steps, one)
        tile.write(c, c_row, accumulate)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8, types.boolean, rows, vectors, dtype), emit


@intrinsic
def multiply_fetching(
    typing_context, a, a_row, a_step, b, b_step, c, c_row, steps, accumulate, ahead, run, apart, rows, vectors, dtype
):
    """`multiply_tile`, during which memory is asked for that will be read or written soon: a line at each step. A dtype
    of uint16 stands for pairs of bfloat16: strides of A and B are in pairs, and C is of float32.

    The lines are those from the address `ahead` on, none where it is 0: 2**run of them side by side, then as many that
    begin `apart` bytes after the first, and so on.
    """
    if not literal(rows, vectors):
        return None  # Numba asks again with literal types

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        a, a_row, a_step, b, b_step, c, c_row, steps, accumulate, ahead, run, apart = args[:12]
        zero, one, line = (ir.Constant(INT64, n) for n in (0, 1, LINE))
        asks = builder.icmp_signed("!=", ahead, zero)
        near, apart, line = (builder.select(asks, *two) for two in ((ahead, a), (apart, zero), (line, zero)))
        among = builder.sub(builder.shl(one, run), one)
        tile = tile_of(builder, rows.literal_value, vectors.literal_value, dtype.dtype)

        def ask(k: Any) -> None:
            first = builder.add(near, builder.mul(builder.lshr(k, run), apart))
            tile.prefetch(builder.add(first, builder.mul(builder.and_(k, among), line)), False)

        tile.multiply(a, a_row, a_step, zero, b, b_step, zero, steps, one, ask)
        tile.write(c, c_row, accumulate)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8, types.boolean, *[types.int64] * 3, rows, vectors, dtype), emit


@intrinsic
def multiply_tile_2d(
    typing_context,
    a,
    a_row,
    a_step,
    a_outer,
    b,
    b_step,
    b_outer,
    c,
    c_row,
    steps,
    outer,
    accumulate,
    rows,
    vectors,
    dtype,
):
    """The tile with a sum of two levels; a_outer and b_outer are the strides of A and B between the outer steps."""

    if not literal(rows, vectors):
        return None  # Numba asks again with literal types

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        a, a_row, a_step, a_outer, b, b_step, b_outer, c, c_row, steps, outer, accumulate = args[:12]
        tile = Tile(builder, rows.literal_value, vectors.literal_value, dtype.dtype)
        tile.multiply(a, a_row, a_step, a_outer, b, b_step, b_outer, steps, outer)
        tile.write(c, c_row, accumulate)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11, types.boolean, rows, vectors, dtype), emit


@intrinsic
def multiply_pairs_2d(
    typing_context,
    a,
    a_row,
    a_step,
    a_outer,
    b,
    b_step,
    b_outer,
    c,
    c_row,
    steps,
    outer,
    accumulate,
    rows,
    vectors,
    dtype,
):
    """The tile of pairs of bfloat16, with a sum of two levels. dtype: of C, whose vectors are of float32's length:
    float32, or uint16 for bfloat16, which is rounded as it is written (and cannot be accumulated). Strides of A and B
    are in pairs, c_row in elements of C."""

    if not literal(rows, vectors):
        return None  # Numba asks again with literal types

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        a, a_row, a_step, a_outer, b, b_step, b_outer, c, c_row, steps, outer, accumulate = args[:12]
        tile = PairTile(builder, rows.literal_value, vectors.literal_value, types.float32)
        tile.multiply(a, a_row, a_step, a_outer, b, b_step, b_outer, steps, outer)
        if dtype.dtype == types.uint16:
            tile.write_rounded(c, c_row)
        else:
            tile.write(c, c_row, accumulate)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11, types.boolean, rows, vectors, dtype), emit


@helper()
def lines_of(size):
    """`run` of `multiply_fetching` for so many bytes: the largest power of two of lines that they have."""
    run = 0
    while 2 << run <= size // LINE:
        run += 1
    return run


def literal(*parameters: types.Type) -> bool:
    """Whether these parameters of an intrinsic are literal integers."""
    return all(isinstance(p, types.IntegerLiteral) for p in parameters)


class Emitter:
    """Addresses, loads and stores of the host's vectors of `number`. Addresses are bytes, strides elements.

    uint16 stands for bfloat16: vectors of float32, widened as they are loaded and rounded as they are stored.
    """

    def __init__(self, builder: ir.IRBuilder, number: types.Type):
        wide = {types.uint16: types.float32, types.float32: types.float32, types.float64: types.float64}[number]
        self.builder, self.narrow = builder, number != wide
        self.scalar = ir.FloatType() if wide == types.float32 else ir.DoubleType()
        self.size, self.width = number.bitwidth // 8, simd().vector_bytes * 8 // wide.bitwidth
        self.vector = ir.VectorType(self.scalar, self.width)

    def at(self, base, index, stride=1):
        """The address of element `index * stride` from `base`."""
        index, stride = (ir.Constant(INT64, n) if isinstance(n, int) else n for n in (index, stride))
        return self.builder.add(base, self.builder.mul(self.builder.mul(index, stride), ir.Constant(INT64, self.size)))

    def load(self, address, kind):
        if self.narrow:
            return load_bfloat16(self.builder, address, kind.count)
        value = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        value.align = self.size
        return value

    def store(self, value, address) -> None:
        if self.narrow:
            return store_bfloat16(self.builder, value, address)
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, pointer).align = self.size

    def broadcast(self, value):
        undefined = ir.Constant(self.vector, ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
        return self.builder.shuffle_vector(
            first, undefined, ir.Constant(ir.VectorType(_INT32, self.width), [0] * self.width)
        )

    def prefetch(self, address, write: bool, level: int = 1) -> None:
        """Ask for the line of this address, to be read or written, into the cache of this level."""
        builder, pointer = self.builder, ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        hints = [ir.Constant(_INT32, hint) for hint in (int(write), 4 - level, 1)]  # 1: data
        builder.call(function, [builder.inttoptr(address, pointer), *hints])


class Tile(Emitter):
    """Emits code for rows x vectors accumulators.

    They are stack slots here, which keeps the loops readable; LLVM's mem2reg turns them into registers.
    """

    def __init__(self, builder: ir.IRBuilder, rows: int, vectors: int, number: types.Type):
        super().__init__(builder, number)
        self.rows, self.vectors = rows, vectors
        self.slots = [[cgutils.alloca_once(builder, self.vector) for _ in range(vectors)] for _ in range(rows)]
        for row in self.slots:
            for slot in row:
                builder.store(ir.Constant(self.vector, [0.0] * self.width), slot)

    def multiply(self, a, a_row, a_step, a_outer, b, b_step, b_outer, steps, outer, ahead=None) -> None:
        """Add the products of all steps to the accumulators. ahead: emits what else is to be done at a step."""
        builder = self.builder
        with cgutils.for_range(builder, outer, intp=INT64) as o:
            a_run, b_run = self.at(a, o.index, a_outer), self.at(b, o.index, b_outer)
            with cgutils.for_range(builder, steps, intp=INT64) as k:
                column_of_a, row_of_b = self.at(a_run, k.index, a_step), self.at(b_run, k.index, b_step)
                if ahead is not None:
                    ahead(k.index)
                vectors_of_b = [self.load(self.at(row_of_b, v * self.width), self.vector) for v in range(self.vectors)]
                for i in range(self.rows):
                    x = self.broadcast(self.load(self.at(column_of_a, i, a_row), self.scalar))
                    for v, y in enumerate(vectors_of_b):
                        builder.store(self.add_product(builder.load(self.slots[i][v]), x, y), self.slots[i][v])

    def add_product(self, total, x, y):
        """total + x y, as one fused instruction."""
        product = self.builder.fmul(x, y, flags=("contract",))
        return self.builder.fadd(total, product, flags=("contract",))

    def write(self, c, c_row, accumulate) -> None:
        """Write the accumulators to C, or add them to it."""
        rows = [self.at(c, i, c_row) for i in range(self.rows)]
        with self.builder.if_then(accumulate):
            for slots, row in zip(self.slots, rows, strict=True):
                for v, slot in enumerate(slots):
                    c = self.load(self.at(row, v * self.width), self.vector)
                    self.builder.store(self.builder.fadd(self.builder.load(slot), c), slot)
        for slots, row in zip(self.slots, rows, strict=True):
            for v, slot in enumerate(slots):
                self.store(self.builder.load(slot), self.at(row, v * self.width))


class PairTile(Tile):
    """The tile whose numbers are pairs of bfloat16, loaded and broadcast as the float32 whose memory they take."""

    def add_product(self, total, x, y):
        """total + x[0] y[0] + x[1] y[1]"""
        builder = self.builder
        if has_bfloat16_products():
            pairs = ir.VectorType(BFLOAT, 2 * self.width)
            kind = ir.FunctionType(self.vector, [self.vector, pairs, pairs])
            dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
            return builder.call(dot, [total, builder.bitcast(x, pairs), builder.bitcast(y, pairs)])
        for first, second in zip(self._widened(x), self._widened(y), strict=True):
            total = super().add_product(total, first, second)
        return total

    def _widened(self, pairs) -> tuple[Any, Any]:
        """The first, and the second, numbers of the pairs as float32."""
        bits = ir.VectorType(_INT32, self.width)
        both = self.builder.bitcast(pairs, bits)
        first = self.builder.shl(both, ir.Constant(bits, [16] * self.width))
        second = self.builder.and_(both, ir.Constant(bits, [0xFFFF0000] * self.width))
        return self.builder.bitcast(first, self.vector), self.builder.bitcast(second, self.vector)

    def write_rounded(self, c, c_row) -> None:
        """Write the accumulators to C as bfloat16."""
        half = ir.Constant(INT64, 2)  # bytes of a number, where `at` counts with 4
        for i, slots in enumerate(self.slots):
            row = self.builder.add(c, self.builder.mul(self.builder.mul(c_row, half), ir.Constant(INT64, i)))
            for v, slot in enumerate(slots):
                place = self.builder.add(row, ir.Constant(INT64, v * self.width * 2))
                store_bfloat16(self.builder, self.builder.load(slot), place)


def tile_of(builder: ir.IRBuilder, rows: int, vectors: int, number: types.Type) -> Tile:
    """The tile for such numbers; uint16 stands for bfloat16, in pairs."""
    if number == types.uint16:
        return PairTile(builder, rows, vectors, types.float32)
    return Tile(builder, rows, vectors, number)
