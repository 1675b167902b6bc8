"""Small matrices from both sides, emitted: the transforms of Winograd convolution, in registers, over channels.

    target[i, j] = sum over a, b of matrix[i][a] * matrix[j][b] * source[a, b]      for each channel

Source and target are small grids of runs of channels: a patch of an activation, or one place in each of many planes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .microkernel import INT64, LINE, Emitter, literal

Matrix = Sequence[Sequence[float]]


def combine(matrix: Matrix, values: Sequence[Any]) -> list[Any]:
    """matrix @ values, for values that know + and - and multiplication by a number.

    Winograd's matrices come from the points +a and -a, so that neighbouring rows, or columns, are equal but for signs:
    what such a pair has in common is computed once.
    """
    rows, values = [list(map(float, row)) for row in matrix], list(values)
    for j in range(len(values) - 1):
        signs = {_sign(row[j], row[j + 1]) for row in rows if row[j] or row[j + 1]}
        if signs == {1, -1}:
            values[j], values[j + 1] = values[j] + values[j + 1], values[j] - values[j + 1]
            for row in rows:
                same = row[j] == row[j + 1]
                row[j], row[j + 1] = (row[j], 0.0) if same else (0.0, row[j])
    results: list[Any] = []
    while len(results) < len(rows):
        this, following = rows[len(results)], rows[len(results) + 1 : len(results) + 2]
        signs = [_sign(a, b) for a, b in zip(this, following[0], strict=True)] if following else []
        if {s for s, a in zip(signs, this, strict=False) if a} == {1, -1} and 0 not in signs:
            even, odd = (
                _sum([a if s == sign else 0.0 for a, s in zip(this, signs, strict=True)], values) for sign in (1, -1)
            )
            results += [even + odd, even - odd]
        else:
            results.append(_sum(this, values))
    return results


def _sign(a: float, b: float) -> int:
    """1 where a == b, -1 where a == -b, else 0."""
    return 1 if a == b else -1 if a == -b else 0


def _sum(coefficients: Sequence[float], values: Sequence[Any]) -> Any:
    """The sum of products; it begins with a term that needs no multiplication, where there is one."""
    terms = sorted(((c, v) for c, v in zip(coefficients, values, strict=True) if c), key=lambda term: term[0] != 1)
    (c, v), *rest = terms
    total = v if c == 1 else c * v
    for c, v in rest:
        total = total + v if c == 1 else total - v if c == -1 else total + c * v
    return total


@intrinsic
def copy(typing_context, source, target, count, dtype):
    """target[i] = source[i] for i < count, a whole number of vectors (of float32's length where numbers have 16 bits).
    Numba's own loop goes number by number."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        emitter = Emitter(builder, dtype.dtype)
        step, bits = ir.Constant(INT64, emitter.width), ir.IntType(dtype.dtype.bitwidth)  # rounded, they might change
        kind = ir.VectorType(bits, emitter.width).as_pointer()
        with cgutils.for_range_slice(builder, ir.Constant(INT64, 0), args[2], step, intp=INT64) as (i, _):
            place, target = (builder.inttoptr(emitter.at(base, i), kind) for base in args[:2])
            value = builder.load(place)
            value.align = emitter.size
            builder.store(value, target).align = emitter.size
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3, dtype), emit


@intrinsic
def interleave(typing_context, first, second, target, count, dtype):
    """What one step of a sum takes: target[i] = first[i], or of bfloat16 (uint16) the pair of first[i] and second[i].

    count: a whole number of vectors, of float32's length.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        in_pairs = dtype.dtype == types.uint16
        emitter = Emitter(builder, types.float32 if in_pairs else dtype.dtype)
        narrow, wide = (ir.VectorType(ir.IntType(size), emitter.width) for size in (16, 32))
        step = ir.Constant(INT64, emitter.width)
        with cgutils.for_range_slice(builder, ir.Constant(INT64, 0), args[3], step, intp=INT64) as (i, _):
            if in_pairs:
                halves = []
                for base in args[:2]:
                    place = builder.add(base, builder.mul(i, ir.Constant(INT64, 2)))
                    value = builder.load(builder.inttoptr(place, narrow.as_pointer()))
                    value.align = 2
                    halves.append(builder.zext(value, wide))
                value = builder.or_(halves[0], builder.shl(halves[1], ir.Constant(wide, [16] * emitter.width)))
            else:
                value = emitter.load(emitter.at(args[0], i), emitter.vector)
            emitter.store(value, emitter.at(args[2], i))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, dtype), emit


@intrinsic
def move(typing_context, source, target, size):
    """Copy so many bytes from one address to another; they do not overlap."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        places = [builder.inttoptr(address, ir.IntType(8).as_pointer()) for address in args[:2]]
        cgutils.raw_memcpy(builder, places[1], places[0], args[2], 1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), emit


@intrinsic
def move_rows(typing_context, source, source_row, target, target_row, rows, size):
    """`move` of `size` bytes, so many times: addresses, and bytes from one time to the next. Up to 64 bytes at least 16
    are one vector, or two that overlap, without a call."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, source_row, target, target_row, rows, size = args
        zero = ir.Constant(INT64, 0)

        def vectors(width: int, places: list[Any]) -> Any:
            kind = ir.VectorType(ir.IntType(8), width).as_pointer()

            def copied(i: Any) -> None:
                bases = (builder.add(a, builder.mul(i, row)) for a, row in ((source, source_row), (target, target_row)))
                here, there = ([builder.inttoptr(builder.add(base, at), kind) for at in places] for base in bases)
                values = [builder.load(place) for place in here]
                for value, place in zip(values, there, strict=True):
                    value.align = 1
                    builder.store(value, place).align = 1

            return copied

        def called(i: Any) -> None:
            bytes_, bases = ir.IntType(8).as_pointer(), ((target, target_row), (source, source_row))
            places = [builder.inttoptr(builder.add(a, builder.mul(i, row)), bytes_) for a, row in bases]
            cgutils.raw_memcpy(builder, *places, size, 1)

        def has(sign: str, n: int) -> Any:
            return builder.icmp_signed(sign, size, ir.Constant(INT64, n))

        last = {width: builder.sub(size, ir.Constant(INT64, width)) for width in (16, 32)}
        ways = [
            (has("==", 32), vectors(32, [zero])),
            (builder.and_(has(">", 32), has("<=", 64)), vectors(32, [zero, last[32]])),
            (builder.and_(has(">=", 16), has("<", 32)), vectors(16, [zero, last[16]])),
            (builder.or_(has("<", 16), has(">", 64)), called),
        ]
        for chosen, way in ways:
            with builder.if_then(chosen), cgutils.for_range(builder, rows, intp=INT64) as loop:
                way(loop.index)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), emit


@intrinsic
def clear(typing_context, target, size):
    """Set so many bytes from an address on to zero."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        cgutils.memset(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()), args[1], 0)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 2), emit


def _fetch_into(level: int) -> Any:
    """`fetch`, into the cache of this level."""

    @intrinsic
    def fetch(typing_context, source, size):
        """Ask for so many bytes from an address on, which are read or written soon; it need not be one that may be
        read."""

        def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            emitter, line = Emitter(builder, types.float32), ir.Constant(INT64, LINE)
            with cgutils.for_range_slice(builder, ir.Constant(INT64, 0), args[1], line, intp=INT64) as (i, _):
                emitter.prefetch(builder.add(args[0], i), False, level)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 2), emit

    return fetch


fetch, fetch_to_second_level = _fetch_into(1), _fetch_into(2)


@intrinsic
def transpose_block(typing_context, source, source_row, target, target_row, dtype):
    """target[j, i] = source[i, j] for a square block as large as a vector; rows are runs of memory.

    source, target: addresses; *_row: strides in elements. Each round interleaves the first half of the rows with the
    second: after log2(n) rounds row j holds what was column j.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        emitter = Emitter(builder, dtype.dtype)
        n = emitter.width
        rows = [emitter.load(emitter.at(args[0], i, args[1]), emitter.vector) for i in range(n)]
        lanes = [i // 2 + n * (i % 2) for i in range(n)]
        low, high = (ir.Constant(ir.VectorType(ir.IntType(32), n), [i + k for i in lanes]) for k in (0, n // 2))
        for _ in range(n.bit_length() - 1):
            pairs = zip(rows[: n // 2], rows[n // 2 :], strict=True)
            rows = [builder.shuffle_vector(a, b, half) for a, b in pairs for half in (low, high)]
        for j, row in enumerate(rows):
            emitter.store(row, emitter.at(args[2], j, args[3]))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, dtype), emit


class Value:
    """A vector in the code that is being emitted, with the arithmetic that `combine` needs."""

    def __init__(self, emitter: Emitter, value: Any):
        self.emitter, self.value = emitter, value

    def __add__(self, other: Value) -> Value:
        return Value(self.emitter, self.emitter.builder.fadd(self.value, other.value, flags=("contract",)))

    def __sub__(self, other: Value) -> Value:
        return Value(self.emitter, self.emitter.builder.fsub(self.value, other.value, flags=("contract",)))

    def __rmul__(self, number: float) -> Value:
        factor = ir.Constant(self.emitter.vector, [number] * self.emitter.width)
        return Value(self.emitter, self.emitter.builder.fmul(self.value, factor, flags=("contract",)))


def transform_2d(matrices: Mapping[int, Sequence[Matrix]]) -> Any:
    """An intrinsic that applies one of these matrices, chosen by the length of the tuple `sides` and a literal index:

        transform(source, source_row, source_col, target, target_row, target_col, channels, index, sides,
                  source_dtype, target_dtype)

    source, target: addresses of the grids' first elements. *_row, *_col: strides in elements. channels: how many, a
    multiple of the vector. Of the dtypes one may be uint16, for bfloat16, beside float32.
    """

    @intrinsic
    def transform(
        typing_context,
        source,
        source_row,
        source_col,
        target,
        target_row,
        target_col,
        channels,
        index,
        sides,
        source_dtype,
        target_dtype,
    ):
        if not literal(index):
            return None  # Numba asks again with literal types

        def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            matrix = matrices[sides.count][index.literal_value]
            reads, writes = (Emitter(builder, dtype.dtype) for dtype in (source_dtype, target_dtype))
            with transformed(reads, writes, matrix, *args[:7]) as (_, results):
                for result, place in results:
                    writes.store(result, place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, index, sides, source_dtype, target_dtype), emit

    return transform


@contextlib.contextmanager
def transformed(
    reads: Emitter, writes: Emitter, matrix: Matrix, *grids: Any
) -> Iterator[tuple[Any, list[tuple[Any, Any]]]]:
    """A loop over vectors of channels: the first channel, and the vectors that `matrix` makes of the source, each with
    its address in the target. grids: the first seven arguments of `transform_2d`'s intrinsic."""
    size, n, channels = len(matrix), range(len(matrix[0])), grids[6]
    sources, targets = _grid(reads, len(n), *grids[:3]), _grid(writes, size, *grids[3:6])
    step = ir.Constant(INT64, reads.width)
    with cgutils.for_range_slice(reads.builder, ir.Constant(INT64, 0), channels, step, intp=INT64) as (c, _):
        patch = [[Value(reads, reads.load(reads.at(sources[a][b], c), reads.vector)) for a in n] for b in n]
        columns = [combine(matrix, column) for column in patch]
        rows = [combine(matrix, [column[i] for column in columns]) for i in range(size)]
        yield c, [(rows[i][j].value, writes.at(targets[i][j], c)) for i in range(size) for j in range(size)]


def _grid(emitter: Emitter, n: int, base: Any, row: Any, column: Any) -> list[list[Any]]:
    """The addresses of an n x n grid's elements."""
    return [[emitter.at(emitter.at(base, i, row), j, column) for j in range(n)] for i in range(n)]
