"""Opcodes that read and write memory: ld, st, atom, red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import shared
from .convert import LOCAL_WINDOW
from .memory import sub_fragment
from .opcodes import DTYPES, HALVES, PACKED, kind_of, opcode, source, unknown
from .ptx import SIZES, Address, Immediate, Instruction, Operand, Register, Special, Symbol, Vector
from .shared import gather, scatter

MEMORY = "Data Movement and Conversion Instructions"
PARAM_BASE = 1 << 42  # the address of the parameter buffer
_SPACES = {"global", "shared", "local", "param", "const", "shared::cta", "param::entry"}
_STRONG = {"volatile", "relaxed", "acquire", "release"}


def address(operand: Operand) -> Callable[[Any, Any], Any]:
    """What computes an address operand: (wave, fragment) -> int64 for each lane, or one for all."""
    if not isinstance(operand, Address):
        raise TypeError(f"{operand} is no address")
    base, offset = operand.base, np.int64(operand.offset)
    if isinstance(base, Immediate):
        return lambda wave, f: np.int64(base.value) + offset
    if isinstance(base, Symbol):
        return lambda wave, f: np.int64(wave.address_of(base.name)) + offset
    read = source(base, "u64" if SIZES[base.type] == 8 else "u32")
    return lambda wave, f: read(wave, f).astype(np.int64) + offset


def space_of(i: Instruction) -> str:
    """The state space of an access; "" for a generic address."""
    return next((m.partition("::")[0] for m in i.modifiers if m in _SPACES), "")


def _lanes_of(i: Instruction) -> int:
    return next((int(m[1:]) for m in i.modifiers if m in ("v2", "v4", "v8")), 1)


@opcode("ld", MEMORY)
def _ld(i: Instruction) -> Callable:
    kind, lanes, space = kind_of(i), _lanes_of(i), space_of(i)
    size, where = SIZES[kind] * lanes, address(i.operands[1])
    to = i.operands[0].items if isinstance(i.operands[0], Vector) else (i.operands[0],)
    constant_read, strong = "nc" in i.modifiers, bool(_STRONG & set(i.modifiers))
    dtype = DTYPES[kind]

    def execute(wave: Any, f: Any) -> None:
        value = load(wave, f, space, where(wave, f), size, constant_read, strong)
        for register, lane in zip(to, unpack(value, dtype, lanes), strict=True):
            if isinstance(register, Register):
                wave.put(register, lane, f)

    return execute


def load(wave: Any, f: Any, space: str, at: Any, size: int, constant_read: bool = False, strong: bool = False) -> Any:
    """`size` bytes for each lane of the fragment, as `gather` returns them; one number where that is all there is."""
    if space == "shared":
        return wave.shared.load(at, size, f)
    if space == "global":
        return wave.globals.load(at, size, f, constant_read, strong)
    if space == "const":
        return wave.globals.load(at, size, f, constant=True)
    if space == "param":
        return _load_param(wave, f, at, size)
    if space == "local":
        return _load_local(wave, f, at, size)
    spaces, at = _generic(wave, f, at)
    if len(spaces) == 1:
        name, offset, _ = spaces[0]
        return load(wave, f, name, at - offset, size, constant_read, strong)
    result: Any = None
    for name, offset, part in spaces:
        values = load(wave, sub_fragment(f, part), name, at[part] - offset, size, constant_read, strong)
        if result is None:
            result = np.zeros((f.count, *np.shape(values)[1:]), values.dtype)
        result[part] = values
    return result


def store(wave: Any, f: Any, space: str, at: Any, value: Any, size: int, strong: bool = False) -> None:
    """Write one number, or row of words, for each lane of the fragment."""
    if space == "shared":
        wave.shared.store(at, value, size, f)
    elif space == "global":
        wave.globals.store(at, value, size, f, strong)
    elif space == "local":
        scatter(wave.local, _local_places(wave, f, at, size), size, value)
    else:
        spaces, at = _generic(wave, f, at)
        for name, offset, part in spaces:
            inner = f if part.all() else sub_fragment(f, part)
            store(wave, inner, name, at[part] - offset, value[part], size, strong)


def _generic(wave: Any, f: Any, at: Any) -> tuple[list[tuple[str, int, np.ndarray]], np.ndarray]:
    """[(space, offset of its window, which lanes)] of generic addresses, and the addresses lane by lane."""
    at = f.full(at)
    windows = [("shared", shared.WINDOW), ("local", LOCAL_WINDOW), ("param", PARAM_BASE)]
    found, rest = [], np.ones(len(at), bool)
    for name, begin in windows:
        part = (at >= begin) & (at < begin + (1 << 32))
        if part.any():
            found.append((name, 0 if name == "param" else begin, part))
            rest &= ~part
    if rest.any():
        found.append(("global", 0, rest))
    return found, at


def _load_param(wave: Any, f: Any, at: Any, size: int) -> Any:
    at = f.compact(at)
    places = np.atleast_1d(at) - PARAM_BASE
    if places.min() < 0 or places.max() + size > len(wave.parameters):
        raise wave.fault("out of bounds", f, "a parameter is read past its end")
    words = wave.parameters[places[:, None] + np.arange(size)]
    value = words.view(f"u{size}").reshape(-1) if size <= 8 else words.view("u4")
    return value if np.ndim(at) else value[0]


def _local_places(wave: Any, f: Any, at: Any, size: int) -> np.ndarray:
    at = f.full(at)
    limit = wave.program.local_size
    lanes = wave.every_lane if f.whole else f.lanes
    if (at & (size - 1)).any():
        first = int(np.flatnonzero(at & (size - 1))[0])
        raise wave.fault("misaligned", f, f"byte {int(at[first])} of local memory", int(lanes[first]))
    if at.min() < 0 or at.max() > limit - size:
        first = int(np.flatnonzero((at < 0) | (at > limit - size))[0])
        raise wave.fault("out of bounds", f, f"byte {int(at[first])} of {limit} of local memory", int(lanes[first]))
    return lanes * limit + at


def _load_local(wave: Any, f: Any, at: Any, size: int) -> Any:
    return gather(wave.local, _local_places(wave, f, at, size), size)


def unpack(value: Any, dtype: np.dtype, lanes: int) -> list[Any]:
    """What was loaded -> one array per register, as `dtype`."""
    if lanes == 1:
        return [value.view(dtype)]
    if not value.ndim or (value.ndim == 1 and value.dtype.itemsize > 4):  # up to 8 bytes in one number
        rows = np.atleast_1d(value).view(dtype).reshape(-1, lanes)
    elif value.ndim == 1:
        rows = value.view(dtype).reshape(-1, lanes)
    else:
        rows = np.ascontiguousarray(value).view(dtype)
    columns = np.ascontiguousarray(rows.T)
    return list(columns) if len(rows) > 1 or value.ndim else [c[0] for c in columns]


@opcode("st", MEMORY)
def _st(i: Instruction) -> Callable:
    kind, lanes, space = kind_of(i), _lanes_of(i), space_of(i)
    size, where, strong = SIZES[kind] * lanes, address(i.operands[0]), bool(_STRONG & set(i.modifiers))
    parts = i.operands[1].items if isinstance(i.operands[1], Vector) else (i.operands[1],)
    unsigned = f"u{8 * SIZES[kind]}"
    reads = [source(p, unsigned) for p in parts]
    if space in ("param", "const"):
        raise unknown(i)

    def execute(wave: Any, f: Any) -> None:
        values = [f.full(r(wave, f)) for r in reads]
        value = values[0] if lanes == 1 else np.stack(values, axis=-1)
        if lanes > 1:
            value = value.view(f"u{size}")[:, 0] if size <= 8 else value.view("u4")
        store(wave, f, space, where(wave, f), value, size, strong)

    return execute


# Atomic operations: lanes take their turns in order of their number.

SYNCHRONISATION = "Parallel Synchronization and Communication Instructions"


def _sequence(op: str, memory_view: np.ndarray, places: np.ndarray, values: np.ndarray, compare: Any) -> np.ndarray:
    """Do the operations one lane after the other; returns what each lane found."""
    old = np.zeros(len(places), memory_view.dtype)
    for k, (p, v) in enumerate(zip(places, values, strict=True)):
        found = old[k] = memory_view[p]
        memory_view[p] = {
            "add": lambda found=found, v=v: found + v,
            "min": lambda found=found, v=v: min(found, v),
            "max": lambda found=found, v=v: max(found, v),
            "and": lambda found=found, v=v: found & v,
            "or": lambda found=found, v=v: found | v,
            "xor": lambda found=found, v=v: found ^ v,
            "exch": lambda v=v: v,
            "inc": lambda found=found, v=v: 0 if found >= v else found + 1,
            "dec": lambda found=found, v=v: v if found == 0 or found > v else found - 1,
            "cas": lambda k=k, found=found, v=v: v if found == compare[k] else found,
        }[op]()
    return old


_UFUNCS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}


def _atomic(i: Instruction, to: Operand | None, where: Operand, sources: tuple[Operand, ...]) -> Callable:
    op = next((m for m in i.modifiers if m in (*_UFUNCS, "xor", "exch", "inc", "dec", "cas")), None)
    kind, space = kind_of(i), space_of(i) or "global"
    if op is None or kind in PACKED or any(m in ("v2", "v4", "v8") for m in i.modifiers):
        raise unknown(i)
    dtype, size, at = DTYPES[kind], SIZES[kind], address(where)
    reads = [source(s, kind) for s in sources]
    silent = to is None or (isinstance(to, Special) and to.name == "_")

    def execute(wave: Any, f: Any) -> None:
        values = [np.array(f.full(r(wave, f))) for r in reads]
        if space == "shared":
            places, lanes = wave.shared.locate(at(wave, f), size, f)
            view = wave.shared.bytes.view(dtype)
            granules = wave.shared.granules(places, size)
            wave.shared.shadow.write(granules, lanes, f, atomic=True, same=None)
        else:
            array, places, lanes = wave.arena.locate(at(wave, f), size, wave, f, "updates")
            view = wave.arena.bytes.view(dtype)
            wave.globals.atomic(array, places, size, lanes, f)
        index = places // size
        if silent and op in _UFUNCS and kind not in HALVES:
            _UFUNCS[op].at(view, index, values[0])
            return
        order = (values[1], values[0]) if op == "cas" else (values[0], None)
        old = _sequence(op, view, index, *order)
        if isinstance(to, Register):
            wave.put(to, old, f)

    return execute


@opcode("atom", SYNCHRONISATION)
def _atom(i: Instruction) -> Callable:
    return _atomic(i, i.operands[0], i.operands[1], i.operands[2:])


@opcode("red", SYNCHRONISATION)
def _red(i: Instruction) -> Callable:
    if "async" in i.modifiers:
        raise unknown(i)
    return _atomic(i, None, i.operands[0], i.operands[1:])


for _name in ("prefetch", "prefetchu", "discard", "applypriority"):
    opcode(_name, MEMORY)(lambda i: lambda wave, f: None)  # hints to the cache
