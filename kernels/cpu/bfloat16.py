"""bfloat16 in emitted code: the upper half of a float32. Widening is a shift, rounding one instruction on some hosts.

Numba knows no bfloat16, so kernels see arrays of uint16 (`bits`), whose elements are widened as they are loaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

_INT16, _INT32 = ir.IntType(16), ir.IntType(32)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


BFLOAT = _BFloat()


def bits(a: Any) -> Any:
    """An array as kernels take it: the uint16 of a bfloat16 array, any other one, and None, as it is."""
    return a.view(np.uint16) if a is not None and a.dtype.kind == "V" and a.dtype.name == "bfloat16" else a


def computed(dtype: Any) -> np.dtype:
    """What numbers of this dtype are computed in: float32 for 16 bits (bfloat16 also as uint16), else the same."""
    return np.dtype(np.float32) if np.dtype(dtype).itemsize == 2 else np.dtype(dtype)


def load_bfloat16(builder: ir.IRBuilder, address: Any, count: int) -> Any:
    """The `count` numbers from `address` on, as a vector of float32."""
    pointer = builder.inttoptr(address, ir.VectorType(_INT16, count).as_pointer())
    value = builder.load(pointer)
    value.align = 2
    wide = builder.zext(value, ir.VectorType(_INT32, count))
    upper = builder.shl(wide, ir.Constant(wide.type, [16] * count))
    return builder.bitcast(upper, ir.VectorType(ir.FloatType(), count))


def store_bfloat16(builder: ir.IRBuilder, vector: Any, address: Any) -> None:
    """Round a vector of float32 to bfloat16, to the nearest, ties to even, and write it from `address` on."""
    count = vector.type.count
    narrow = builder.bitcast(builder.fptrunc(vector, ir.VectorType(BFLOAT, count)), ir.VectorType(_INT16, count))
    builder.store(narrow, builder.inttoptr(address, narrow.type.as_pointer())).align = 2
