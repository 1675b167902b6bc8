"""Vectors as values in a kernel: `y = where(v > zero, v, zero)` on as many numbers at once as one likes.

LLVM's vectoriser makes good code of one short loop over arrays. It does not keep sums in registers over the rows of a
matrix, and it checks anew at every row whether arrays overlap. With vectors as values the kernel says what stays in
registers:

    total = splat(0.0, lanes, dtype)
    for i in range(rows):
        total = total + load(p + i * stride, lanes, dtype)

bfloat16, which Numba does not know, comes as uint16 (`bfloat16.bits`): `load` widens it to a vector of float32, and
`store_as` rounds a vector of float32 to it, to the nearest, ties to even.

`lanes` must be a literal integer and may be more than a register of the host holds: LLVM splits it into several.
`dtype` is an array's (`x.dtype`). Addresses are integers, as `array.ctypes.data` gives them.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

from .bfloat16 import load_bfloat16, store_bfloat16
from .features import simd

PANEL = (4 if simd().tile_rows == 12 else 2) * simd().vector_bytes // 4  # float32 numbers that a kernel takes at once


class Vector(types.Type):
    """The type of a vector of `lanes` numbers, or of truth values (dtype `types.boolean`)."""

    def __init__(self, dtype: types.Type, lanes: int):
        super().__init__(f"vector({dtype} x {lanes})")
        self.dtype, self.lanes = dtype, lanes

    def llvm(self) -> ir.VectorType:
        """As LLVM calls it."""
        kinds = {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.int32: ir.IntType(32)}
        return ir.VectorType(kinds.get(self.dtype, ir.IntType(1)), self.lanes)


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector):
        super().__init__(manager, kind, kind.llvm())


def _pointer(builder: ir.IRBuilder, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def load(typing_context, address, lanes, dtype):
    """The `lanes` numbers from `address` on."""
    if not isinstance(lanes, types.IntegerLiteral):
        return None  # Numba asks again with a literal type

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        kind = signature.return_type.llvm()
        if dtype.dtype == types.uint16:
            return load_bfloat16(builder, args[0], kind.count)
        value = builder.load(_pointer(builder, args[0], kind))
        value.align = dtype.dtype.bitwidth // 8
        return value

    number = types.float32 if dtype.dtype == types.uint16 else dtype.dtype
    return Vector(number, lanes.literal_value)(types.int64, lanes, dtype), emit


@intrinsic
def store(typing_context, address, vector):
    """Write the numbers of a vector from `address` on."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        builder.store(args[1], _pointer(builder, args[0], vector.llvm())).align = vector.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(types.int64, vector), emit


@intrinsic
def store_as(typing_context, address, vector, dtype):
    """Write the numbers of a vector from `address` on, in the dtype of the array that is there."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        if dtype.dtype == types.uint16:
            store_bfloat16(builder, args[1], args[0])
        else:
            builder.store(args[1], _pointer(builder, args[0], vector.llvm())).align = vector.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(types.int64, vector, dtype), emit


@intrinsic
def splat(typing_context, number, lanes, dtype):
    """A vector that is `number` everywhere."""
    if not isinstance(lanes, types.IntegerLiteral):
        return None

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        kind = signature.return_type.llvm()
        undefined, index = ir.Constant(kind, ir.Undefined), ir.IntType(32)
        first = builder.insert_element(undefined, args[0], ir.Constant(index, 0))
        return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(index, kind.count), [0] * kind.count))

    return Vector(dtype.dtype, lanes.literal_value)(dtype.dtype, lanes, dtype), emit


@intrinsic
def total(typing_context, vector):
    """The sum of its numbers, halves first."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        value, count, index = args[0], vector.lanes, ir.IntType(32)
        while count > 1:
            count //= 2
            halves = [
                builder.shuffle_vector(
                    value, value, ir.Constant(ir.VectorType(index, count), list(range(at, at + count)))
                )
                for at in (0, count)
            ]
            value = builder.fadd(*halves)
        return builder.extract_element(value, ir.Constant(index, 0))

    return vector.dtype(vector), emit


@intrinsic
def widen(typing_context, vector):
    """The same numbers in float64."""
    wide = Vector(types.float64, vector.lanes)

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return args[0] if vector == wide else builder.fpext(args[0], wide.llvm())

    return wide(vector), emit


@intrinsic
def where(typing_context, mask, a, b):
    """`a` where the mask is true, else `b`."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.select(*args)

    return a(mask, a, a), emit


def _define(function: Any, make: Any, result: Any) -> None:
    """An operator of two equal vectors: `make(builder, a, b)` emits it, `result(kind)` is its type."""

    @infer_global(function)
    class _(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return signature(result(args[0]), *args)
            return None

    @lower_builtin(function, Vector, Vector)
    def _(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return make(builder, *args)


def _compare(symbol: str) -> Any:
    """False where one side is a NaN; but for a NaN `a != a` is true."""
    floats = ir.IRBuilder.fcmp_unordered if symbol == "!=" else ir.IRBuilder.fcmp_ordered

    def make(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
        whole = isinstance(a.type.element, ir.IntType)
        return builder.icmp_signed(symbol, a, b) if whole else floats(builder, symbol, a, b)

    return make


_CONTRACT = ("contract",)  # a product with a sum behind it becomes one fused instruction
_define(operator.add, lambda builder, a, b: builder.fadd(a, b, flags=_CONTRACT), lambda kind: kind)
_define(operator.sub, lambda builder, a, b: builder.fsub(a, b, flags=_CONTRACT), lambda kind: kind)
_define(operator.mul, lambda builder, a, b: builder.fmul(a, b, flags=_CONTRACT), lambda kind: kind)
_define(operator.or_, lambda builder, a, b: builder.or_(a, b), lambda kind: kind)  # of truth values
for _function, _symbol in ((operator.gt, ">"), (operator.le, "<="), (operator.eq, "=="), (operator.ne, "!=")):
    _define(_function, _compare(_symbol), lambda kind: Vector(types.boolean, kind.lanes))
