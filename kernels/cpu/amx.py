"""AMX: eight registers that are matrices, and an instruction that multiplies two of them, for bfloat16.

A tile is 16 rows of 64 bytes: 16 x 32 bfloat16 of A, 16 rows of 16 pairs of B (two neighbours in the sum side by side),
or 16 x 16 float32 sums. `tile_dot(state, c, a, b)` is

    C[m, n] += sum over k < 16 of A[m, 2k] * B[k, 2n] + A[m, 2k + 1] * B[k, 2n + 1]

Operations take literal numbers of tiles (0 to 7), byte addresses, and the `state`: an array of `new_state`, which holds
the configuration. Between `configure` and `release` nothing may raise: a thread that leaves its tiles configured makes
every later switch between threads carry 8 KiB more. So a kernel allocates first and then calls one function that does
all three.

Where the host has tiles these are LLVM's instructions. Under MINIRES_AMX=emulate they are amx_emulated.py's loops over
the state, so that all kernels above them are tested on any host.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1 chapter 18, volume 2 TDPBF16PS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import amx_emulated
from .features import amx
from .jit import helper

ROWS, BYTES, TILES = 16, 64, 8  # rows of a tile, bytes of a row, tiles
_CONFIGURATION = 64  # bytes
STATE_BYTES = _CONFIGURATION + TILES * ROWS * BYTES + BYTES  # the tiles, and a row to spare, are for the emulation

_BYTE, _INT64 = ir.IntType(8), ir.IntType(64)
_POINTER = _BYTE.as_pointer()


@helper()
def new_state():
    """The state of one thread: eight whole tiles (palette 1), not yet in force."""
    state = np.zeros(STATE_BYTES, np.uint8)
    state[0] = 1
    for tile in range(TILES):
        state[16 + 2 * tile] = BYTES  # of uint16 bytes of a row
        state[48 + tile] = ROWS
    return state


def _emit(builder: ir.IRBuilder, name: str, *arguments: Any) -> None:
    """Call LLVM's intrinsic `llvm.x86.NAME`."""
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _tile(number: types.Type) -> Any:
    """The number of a tile, which is part of the instruction."""
    return ir.Constant(_BYTE, number.literal_value) if isinstance(number, types.IntegerLiteral) else None


@intrinsic
def _configure(typing_context, state):
    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        data = context.make_array(state)(context, builder, args[0]).data
        _emit(builder, "ldtilecfg", builder.bitcast(data, _POINTER))
        return context.get_dummy_value()

    return types.void(state), emit


@intrinsic
def _release(typing_context, state):
    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _emit(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(state), emit


@intrinsic
def _zero(typing_context, state, tile):
    if _tile(tile) is None:
        return None  # Numba asks again with literal types

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _emit(builder, "tilezero", _tile(tile))
        return context.get_dummy_value()

    return types.void(state, tile), emit


def _move(name: str, tile: Any) -> Callable[..., Any]:
    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _emit(builder, name, _tile(tile), builder.inttoptr(args[2], _POINTER), args[3])
        return context.get_dummy_value()

    return emit


@intrinsic
def _load(typing_context, state, tile, address, stride):
    return _tile(tile) and (types.void(state, tile, types.int64, types.int64), _move("tileloadd64", tile))


@intrinsic
def _store(typing_context, state, tile, address, stride):
    return _tile(tile) and (types.void(state, tile, types.int64, types.int64), _move("tilestored64", tile))


@intrinsic
def _dot(typing_context, state, c, a, b):
    if any(_tile(t) is None for t in (c, a, b)):
        return None

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _emit(builder, "tdpbf16ps", *map(_tile, (c, a, b)))
        return context.get_dummy_value()

    return types.void(state, c, a, b), emit


if amx() == "emulated":
    configure, release = amx_emulated.configure, amx_emulated.release
    tile_zero, tile_load = amx_emulated.tile_zero, amx_emulated.tile_load
    tile_store, tile_dot = amx_emulated.tile_store, amx_emulated.tile_dot
else:
    configure, release = _configure, _release
    tile_zero, tile_load, tile_store, tile_dot = _zero, _load, _store, _dot
