"""Opcodes of asynchronous warpgroup matrices: wgmma.mma_async and its groups.

The operands are read, and the accumulators written, when the warpgroup waits for the group: as late as the hardware
may. From issue to wait the shared memory counts as being read by the warpgroup's tensor core, which has an entry of its
own in the vector clocks; a stage that is released before the wait is therefore always a race with whoever fills it
again, whichever comes first in this run. The accumulators may not be touched in between.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from .matrices import floats, items, places
from .opcodes import F32, immediate, opcode, source, unknown
from .ptx import Instruction, Register, Vector
from .shared import BASE
from .tensor_map import swizzled

WGMMA = "Asynchronous Warpgroup Level Matrix Instructions"
_BITS = {"f16": 16, "bf16": 16, "tf32": 32}
_WIDTH = {0: 16, 3: 32, 2: 64, 1: 128}  # bytes of a swizzled row, by the descriptor's mode
_MODE = {0: 0, 3: 1, 2: 2, 1: 3}  # the descriptor's mode -> that of a tensor map


@dataclass(eq=False)
class _Operand:
    """A matrix of one warpgroup, seen through a descriptor: the shared places of its bytes, row by row along k."""

    places: np.ndarray  # (rows, k), of the first byte of each element
    block: int


@dataclass(eq=False)
class _Product:
    lanes: np.ndarray
    tick: int
    a: Any  # an _Operand, or the values
    b: _Operand
    d: tuple[Register, ...]
    kind: str
    scale_d: bool
    signs: tuple[int, int]


class Warpgroups:
    """What the tensor cores of a wave have in hand, by the first lane of the warpgroup."""

    def __init__(self, wave: Any):
        self.wave = wave
        self.open: dict[int, list[_Product]] = {}  # not committed
        self.groups: dict[int, list[list[_Product]]] = {}

    def commit(self, first: int) -> None:
        self.groups.setdefault(first, []).append(self.open.pop(first, []))

    def wait(self, first: int, allowed: int) -> None:
        """The warpgroup waits until at most `allowed` groups are left; their products are made now."""
        wave, groups = self.wave, self.groups.setdefault(first, [])
        while len(groups) > allowed:
            for product in groups.pop(0):
                self._multiply(product)
                threads, block = wave.thread[product.lanes], int(wave.block[first])
                agent = wave.shared.shadow.warpgroup_agent(int(threads[0]))
                wave.order.known[block, threads, agent] = product.tick + 1
        held = [p for g in groups for p in g] + self.open.get(first, [])
        self._release(first, {r.index for p in held for r in p.d})

    def hold(self, lanes: np.ndarray, registers: list[Register]) -> None:
        """These registers belong to the tensor core until the wait."""
        for register in registers:
            mask = self.wave.busy.setdefault(register.index, np.zeros(self.wave.size, bool))
            mask[lanes] = True

    def _release(self, first: int, held: set[int]) -> None:
        for index, mask in list(self.wave.busy.items()):
            if index not in held:
                mask[first : first + 128] = False
                if not mask.any():
                    del self.wave.busy[index]

    def _multiply(self, p: _Product) -> None:
        wave = self.wave
        a = p.a if isinstance(p.a, np.ndarray) else self._values(p.a, p.kind)
        product = p.signs[0] * a @ (p.signs[1] * self._values(p.b, p.kind)).T
        lane = np.arange(128)
        row, column = 16 * (lane // 32) + lane % 32 // 4, 2 * (lane % 4)
        for n, register in enumerate(p.d):
            old = wave.registers[register.index]
            new = np.array(np.broadcast_to(np.float32(np.nan) if old is None else old, wave.size)).view(F32)
            part = product[row + 8 * (n >> 1 & 1), column + 8 * (n >> 2) + (n & 1)]
            new[p.lanes] = new[p.lanes] + part if p.scale_d else part
            wave.registers[register.index] = new

    def _values(self, operand: _Operand, kind: str) -> np.ndarray:
        memory = self.wave.shared.bytes
        if kind == "tf32":
            words = memory.view(np.uint32)[operand.places // 4]
            return (words & np.uint32(0xFFFFE000)).view(F32)
        dtype = np.float16 if kind == "f16" else ml_dtypes.bfloat16
        return memory.view(np.uint16)[operand.places // 2].view(dtype).astype(F32)


def _firsts(wave: Any, f: Any) -> np.ndarray:
    """The first lane of each warpgroup of the fragment; Fault where one is not whole."""
    lanes = wave.every_lane if f.whole else f.lanes
    whole = f.count % 128 == 0 and (wave.thread[lanes] % 128 == np.tile(np.arange(128), f.count // 128)).all()
    if not whole:
        raise wave.fault("divergent", f, "it needs all 128 threads of the warpgroup", int(lanes[0]))
    return lanes[::128]


def element_places(descriptor: int, rows: int, k: int, size: int, transposed: bool) -> np.ndarray:
    """Shared addresses of the elements (rows, k) that a matrix descriptor means ("Matrix Descriptor Format").

    transposed: the rows, not k, run along memory. In units of 16 bytes, a row of the swizzle's width holds 8 rows (or 8
    steps of k) one under the other; the stride offset leads to the next 8, the leading offset along memory.
    """
    begin, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    mode = descriptor >> 62 & 3
    width = _WIDTH[mode]
    across = np.arange(rows)[:, None] if not transposed else np.arange(k)[None, :]
    along = np.arange(k)[None, :] * size if not transposed else np.arange(rows)[:, None] * size  # bytes
    chunk, inside = along // 16, along % 16
    if mode:
        offset = chunk % (width // 16) * 16 + chunk // (width // 16) * leading + across // 8 * stride
    elif transposed:
        offset = chunk * stride + across // 8 * leading
    else:
        offset = chunk * leading + across // 8 * stride
    return swizzled(begin + offset + across % 8 * width + inside, _MODE[mode])


@opcode("wgmma", WGMMA, together=128, control=True)
def _wgmma(i: Instruction) -> Callable:
    what = i.modifiers[0]
    if what == "fence":
        return lambda wave, f: None
    if what == "commit_group":

        def commit(wave: Any, f: Any) -> None:
            for first in _firsts(wave, f):
                wave.unit(Warpgroups).commit(int(first))

        return commit
    if what == "wait_group":
        allowed = immediate(i.operands[0])

        def wait(wave: Any, f: Any) -> None:
            for first in _firsts(wave, f):
                wave.unit(Warpgroups).wait(int(first), allowed)

        return wait
    if what != "mma_async":
        raise unknown(i)
    return _mma_async(i)


def _mma_async(i: Instruction) -> Callable:
    shape = next((m for m in i.modifiers if re.fullmatch(r"m64n\d+k\d+", m)), "")
    d_kind, kind, b_kind = i.modifiers[-3:]
    if not shape or d_kind != "f32" or kind != b_kind or kind not in _BITS:
        raise unknown(i)
    n, k = (int(x) for x in shape[4:].split("k"))
    size = _BITS[kind] // 8
    d, a, b, scale, *numbers = i.operands
    signs, flips = [immediate(x) for x in numbers[:2]], [bool(immediate(x)) for x in numbers[2:]]
    from_registers = isinstance(a, Vector)
    flip_a = flips[0] if flips and not from_registers else False
    flip_b = flips[-1] if flips else False
    if k * size != 32 or n % 8 or len(items(d)) != n // 2 or (kind == "tf32" and (flip_a or flip_b)):
        raise unknown(i)
    registers = tuple(r for r in items(d) if isinstance(r, Register))
    a_reads = [source(r, "b32") for r in items(a)] if from_registers else [source(a, "u64")]
    b_read, scale_read = source(b, "u64"), source(scale, "pred")

    def execute(wave: Any, f: Any) -> None:
        unit = wave.unit(Warpgroups)
        b_words, keep = f.full(b_read(wave, f)), f.full(scale_read(wave, f))
        a_words = [f.full(r(wave, f)) for r in a_reads]
        for g, first in enumerate(_firsts(wave, f)):
            lanes, at = first + np.arange(128), 128 * g
            mine = slice(at, at + 128)
            uniform = [b_words[mine], *([] if from_registers else [a_words[0][mine]])]
            if any((w != w[0]).any() for w in uniform):
                raise wave.fault("bad descriptor", f, "the threads of the warpgroup give different ones", int(first))
            second = _operand(wave, f, int(b_words[at]), n, k, size, flip_b, lanes)
            left = (
                _fragment([w[mine] for w in a_words], kind, k)
                if from_registers
                else _operand(wave, f, int(a_words[0][at]), 64, k, size, flip_a, lanes)
            )
            tick = wave.order.timeline.now - 1
            scaled = bool(keep[at])
            signs_ab = (signs[0], signs[1]) if len(signs) == 2 else (1, 1)
            product = _Product(lanes, tick, left, second, registers, kind, scaled, signs_ab)
            unit.open.setdefault(int(first), []).append(product)
            unit.hold(lanes, list(registers))

    return execute


def _fragment(words: list[np.ndarray], kind: str, k: int) -> np.ndarray:
    """The 64 x k matrix A that the warpgroup's registers hold: 16 rows a warp, as for mma.sync."""
    at = places("a", k, _BITS[kind])
    result = np.zeros((4, 16, k), F32)
    result[:, at[0], at[1]] = floats(np.stack([w.reshape(4, 32) for w in words], axis=1), kind)
    return result.reshape(64, k)


def _operand(
    wave: Any, f: Any, descriptor: int, rows: int, k: int, size: int, transposed: bool, lanes: np.ndarray
) -> _Operand:
    """A matrix in shared memory; from now on the tensor core reads it. Raises Fault."""
    shared, first, block = wave.shared, int(lanes[0]), int(wave.block[lanes[0]])
    if descriptor >> 49 & 7:
        raise NotImplementedError("matrix descriptors with a base offset")
    at = element_places(descriptor, rows, k, size, transposed)
    if at.min() < BASE or at.max() + size > shared.limit:
        reach = f"{int(at.min()) - BASE} to {int(at.max()) + size - BASE}"
        text = f"a matrix from byte {reach} of shared memory, which has {shared.limit - BASE}"
        raise wave.fault("bad descriptor", f, text, first)
    at = at + block * shared.stride
    mode = _MODE[descriptor >> 62 & 3]
    lies = shared.swizzle[np.unique(at // 16)]
    if ((lies != mode) & (lies != shared.unknown_swizzle)).any():
        names = ("none", "32B", "64B", "128B")
        wrong = lies[(lies != mode) & (lies != shared.unknown_swizzle)][0]
        text = f"it reads with swizzle {names[mode]} what a tensor map wrote with swizzle {names[wrong]}"
        raise wave.fault("bad descriptor", f, text, first)
    granules = np.unique(np.concatenate([(at // shared.granule).ravel(), ((at + size - 1) // shared.granule).ravel()]))
    shared.shadow.unit_reads(granules, lanes, f)
    return _Operand(at, block)
