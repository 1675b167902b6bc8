"""Opcodes of warp-level matrices: ldmatrix, stmatrix, movmatrix, mma.sync.

Where an element of a matrix lies is written once, in `places`: from the number of a lane and of its register to the
row and column ("Warp Level Matrix Instructions" of the PTX ISA, figures of the fragments).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from .access import address
from .memory import sub_fragment
from .opcodes import F32, opcode, source, unknown
from .ptx import Instruction, Operand, Vector

MATRIX = "Warp Level Matrix Instructions"
_LANE = np.arange(32)


def items(operand: Operand) -> tuple[Operand, ...]:
    """The registers of a matrix operand."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def whole_warps(wave: Any, f: Any) -> int:
    """The number of warps of the fragment; Fault where one of them is not complete (lanes have exited)."""
    if f.count % 32 or (np.bincount(wave.warp[f.lanes], minlength=wave.warps) % 32).any():
        raise wave.fault("divergent", f, "it needs all 32 lanes of the warp", int(np.flatnonzero(f.mask)[0]))
    return f.count // 32


def _matrices(i: Instruction) -> int:
    if "m8n8" not in i.modifiers or i.modifiers[-1] != "b16":
        raise unknown(i)
    return next(int(m[1]) for m in i.modifiers if m in ("x1", "x2", "x4"))


def _row_lanes(wave: Any, f: Any, count: int) -> np.ndarray:
    """Of the fragment's lanes those whose address is that of a row: the first 8 for each matrix."""
    return np.tile(_LANE < 8 * count, whole_warps(wave, f))


@opcode("ldmatrix", MATRIX, together=32, control=True)
def _ldmatrix(i: Instruction) -> Callable:
    """8 x 8 matrices of 16-bit numbers: lane 8 i + r has the address of row r of matrix i; the element pair of row
    L / 4, columns 2 (L % 4) and the next, goes to lane L."""
    count, where, transposed = _matrices(i), address(i.operands[1]), "trans" in i.modifiers
    to = items(i.operands[0])

    def execute(wave: Any, f: Any) -> None:
        rows = _row_lanes(wave, f, count)
        words = wave.shared.load(f.full(where(wave, f))[rows], 16, sub_fragment(f, rows))
        matrix = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrix = np.ascontiguousarray(matrix.swapaxes(2, 3))
        lanes = matrix.view(np.uint32).reshape(-1, count, 32)
        for k, register in enumerate(to):
            wave.put(register, lanes[:, k].reshape(-1), f)

    return execute


@opcode("stmatrix", MATRIX, together=32, control=True)
def _stmatrix(i: Instruction) -> Callable:
    """The reverse of ldmatrix."""
    count, where, transposed = _matrices(i), address(i.operands[0]), "trans" in i.modifiers
    reads = [source(o, "b32") for o in items(i.operands[1])]

    def execute(wave: Any, f: Any) -> None:
        rows = _row_lanes(wave, f, count)
        lanes = np.stack([f.full(r(wave, f)).reshape(-1, 32) for r in reads], axis=1)  # warps, matrices, lanes
        matrix = np.ascontiguousarray(lanes).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrix = np.ascontiguousarray(matrix.swapaxes(2, 3))
        words = matrix.reshape(-1, 8).view(np.uint32)
        wave.shared.store(f.full(where(wave, f))[rows], words, 16, sub_fragment(f, rows))

    return execute


@opcode("movmatrix", MATRIX, together=32, control=True)
def _movmatrix(i: Instruction) -> Callable:
    """Transpose an 8 x 8 matrix of 16-bit numbers that lies in registers."""
    to, read = i.operands[0], source(i.operands[1], "b32")

    def execute(wave: Any, f: Any) -> None:
        whole_warps(wave, f)
        matrix = np.ascontiguousarray(f.full(read(wave, f))).view(np.uint16).reshape(-1, 8, 8)
        wave.put(to, np.ascontiguousarray(matrix.swapaxes(1, 2)).view(np.uint32).reshape(-1), f)

    return execute


@functools.cache
def places(operand: str, k: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the elements that lanes hold, of shape (registers, elements in a register, 32).

    operand: "a" (16 x k), "b" (k x 8) or "c" (16 x 8). bits: of an element. In each register a lane holds 32 / bits
    neighbours along k (along columns for c); groups of four lanes share a row of a, a column of b.
    """
    group, quad, per = _LANE // 4, _LANE % 4, 32 // bits
    half = np.arange(per)[:, None]
    if operand == "c":  # two columns; one or two registers for each of the two halves of rows
        registers = [(h, e) for h in range(2) for e in (range(2) if bits == 32 else range(1))]
        rows = np.stack([np.broadcast_to(group + 8 * h, (per, 32)) for h, _ in registers])
        columns = np.stack([2 * quad + (e if bits == 32 else half) + 0 * half for _, e in registers])
        return rows, columns
    along = per * quad + half  # of 4 * per numbers along k
    blocks = k // (4 * per)
    if operand == "b":
        rows = np.stack([along + 4 * per * j for j in range(blocks)])
        return rows, np.broadcast_to(group, rows.shape)
    rows = np.stack([np.broadcast_to(group + 8 * h, (per, 32)) for _ in range(blocks) for h in range(2)])
    return rows, np.stack([along + 4 * per * j for j in range(blocks) for _ in range(2)])


def floats(words: np.ndarray, kind: str) -> np.ndarray:
    """Registers (..., lanes) of uint32 -> float32 (..., elements in a register, lanes)."""
    if kind in ("tf32", "f32"):
        mask = np.uint32(0xFFFFE000 if kind == "tf32" else 0xFFFFFFFF)  # the tensor core ignores the low bits
        return (words & mask).view(F32)[..., None, :]
    dtype = np.float16 if kind == "f16" else ml_dtypes.bfloat16
    pairs = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)
    return np.moveaxis(pairs, -1, -2).copy().view(dtype).astype(F32)


def words_of(values: np.ndarray, kind: str) -> np.ndarray:
    """The reverse of `floats`."""
    if kind == "f32":
        return values[..., 0, :]
    halves = np.moveaxis(values.astype(np.float16), -2, -1)
    return np.ascontiguousarray(halves).view(np.uint32)[..., 0]


_KINDS = {"f16": 16, "bf16": 16, "tf32": 32}


@opcode("mma", MATRIX, together=32, control=True)
def _mma(i: Instruction) -> Callable:
    """D = A B + C, 16 x 8, with products and sums in float32. (Hardware adds in an order and precision of its own.)"""
    shape = re.fullmatch(r"m16n8k(\d+)", next((m for m in i.modifiers if m[0] == "m" and m[1:2].isdigit()), ""))
    d_kind, kind, b_kind, c_kind = i.modifiers[-4:]
    known = shape is not None and kind == b_kind and kind in _KINDS and {d_kind, c_kind} <= {"f32", "f16"}
    if not known or shape is None or "col" not in i.modifiers or "sparse" in i.opcode:
        raise unknown(i)
    k, bits = int(shape[1]), _KINDS[kind]
    d, a, b, c = (items(o) for o in i.operands)
    a_at, b_at = places("a", k, bits), places("b", k, bits)
    c_at, d_at = places("c", k, 32 if c_kind == "f32" else 16), places("c", k, 32 if d_kind == "f32" else 16)
    if (len(a), len(b), len(c), len(d)) != tuple(len(p[0]) for p in (a_at, b_at, c_at, d_at)):
        raise unknown(i, "numbers of registers that the shape has not")
    reads = [[source(r, "b32") for r in group] for group in (a, b, c)]

    def execute(wave: Any, f: Any) -> None:
        warps = whole_warps(wave, f)

        def matrix(index: int, kind: str, at: tuple[np.ndarray, np.ndarray], rows: int, columns: int) -> np.ndarray:
            words = np.stack([f.full(r(wave, f)).reshape(warps, 32) for r in reads[index]], axis=1)
            result = np.zeros((warps, rows, columns), F32)
            result[:, at[0], at[1]] = floats(words, kind)
            return result

        product = matrix(0, kind, a_at, 16, k) @ matrix(1, kind, b_at, k, 8)
        result = product + matrix(2, c_kind, c_at, 16, 8)
        words = words_of(result[:, d_at[0], d_at[1]], d_kind)  # warps, registers, lanes
        for n, register in enumerate(d):
            wave.put(register, words[:, n].reshape(-1), f)

    return execute
