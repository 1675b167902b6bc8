"""Run one launch of a kernel: prepare the program, place the arguments, run the grid wave by wave."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..cuda.launch import by_value, is_array
from . import access, arithmetic, asynchronous, bulk, control, convert, matrices, shared, warps, wgmma  # noqa: F401  (their opcodes enter the table)
from .memory import Arena
from .opcodes import TABLE, unknown
from .ptx import SIZES, Function, Instruction, parse
from .tensor_map import TensorMap, encode
from .wave import Counts, Fragment, Program, Step, Wave

LANES = 8192  # threads that run at once, where the grid has as many
LIMIT = 5_000_000  # steps of one wave of blocks: minutes, and a hundred times what any kernel of ours takes in tests


@dataclass
class Report:
    """What a launch cost. instructions: executed, each for many lanes at once; lanes: threads times instructions."""

    name: str
    seconds: float = 0.0
    counts: Counts = field(default_factory=Counts)

    def __str__(self) -> str:
        rate = self.counts.lanes / self.seconds / 1e6 if self.seconds else 0.0
        return (
            f"{self.name}: {self.counts.lanes:,} thread instructions in {self.counts.instructions:,} steps, "
            f"{self.seconds:.3f} s, {rate:.1f} million a second"
        )


def interpret(launch: Any, **settings: Any) -> Report:
    """Run a `cuda.launch.Launch`: the executor of launches whose arrays are NumPy's. settings: of `run`."""
    args = [
        a if is_array(a) or isinstance(a, (tuple, TensorMap)) else np.asarray(by_value(a)).tobytes()
        for a in launch.args
    ]
    name = launch.function.entry
    return run(launch.function.ptx(), name, launch.grid, launch.block, args, launch.shared, **settings)


def run(
    text: str,
    name: str,
    grid: Sequence[int] | int,
    block: Sequence[int] | int,
    args: Sequence[Any],
    shared_bytes: int = 0,
    *,
    names: Sequence[str] = (),
    seed: int | None = None,
    lanes: int = LANES,
    limit: int = LIMIT,
    watch: Callable[[Wave, Fragment, Step], None] | None = None,
) -> Report:
    """Run a kernel of a PTX text on the CPU, and write its results into the arrays it was given.

    name: the kernel's name in the text. grid, block: up to three sizes, x first. args: one per parameter: an array
    (its address is passed; C-contiguous), a NumPy number, bytes or a TensorMap (passed by value), or a tuple of arrays
    and None (a struct of their addresses). shared_bytes: of
    dynamic shared memory. names: of the arguments, for messages. seed: None runs all warps in step; a number runs them
    in bursts, in an order that it determines. lanes: how many threads to run at once. limit: the steps after which
    blocks that still run are taken to run for ever. watch(wave, fragment, step) is called before every instruction.

    Raises Fault where the kernel does what it must not, NotImplementedError where it uses what is not in the opcode
    table, and ValueError or TypeError for arguments that do not fit.
    """
    program = prepare(text, name)
    blocks, threads = _sizes(grid, "grid"), _sizes(block, "block")
    _check_limits(program.function, threads)
    arena = Arena(program.global_granule)
    parameters = _place(program, arena, args, names)
    for variable in program.module.variables.values():
        if variable.space in ("global", "const"):
            arena.symbols[variable.name] = arena.add_bytes(variable.initial, variable.size, variable.name)
    ids = np.stack(np.meshgrid(*[np.arange(n) for n in blocks], indexing="ij"), -1)
    ids = ids.transpose(2, 1, 0, 3).reshape(-1, 3)  # x runs fastest
    random = None if seed is None else np.random.default_rng(seed)
    if random is not None:
        ids = random.permutation(ids)
    at_once = max(1, lanes // int(np.prod(threads)))
    if program.fine:
        at_once = min(at_once, 4)
    report, begin = Report(name), time.perf_counter()
    for first in range(0, len(ids), at_once):
        wave = Wave(
            program,
            arena,
            parameters,
            ids[first : first + at_once],
            blocks,
            threads,
            shared_bytes,
            random,
            watch,
            limit,
        )
        wave.run()
        report.counts.instructions += wave.counts.instructions
        report.counts.lanes += wave.counts.lanes
    arena.copy_back()
    report.seconds = time.perf_counter() - begin
    return report


@functools.lru_cache(maxsize=256)
def prepare(text: str, name: str) -> Program:
    """Parse a PTX text and make a kernel of it ready to run. NotImplementedError for what is not in the table."""
    module = parse(text)
    function = module.function(name)
    symbols = {p.name: access.PARAM_BASE + p.offset for p in function.parameters}
    end = shared.BASE
    variables = [*module.variables.values(), *function.variables.values()]
    for v in sorted((v for v in variables if v.space == "shared"), key=lambda v: v.size == 0):
        end = -(-end // v.align) * v.align
        symbols[v.name] = end
        end += v.size
    local_size = 0
    for v in function.variables.values():
        if v.space == "local":
            local_size = -(-local_size // v.align) * v.align
            symbols[v.name] = local_size
            local_size += v.size
    steps = [_step(i) for i in function.instructions]
    clocks = [i for i in function.instructions if control.needs_clocks(i)]
    return Program(
        module,
        function,
        steps,
        symbols,
        end,
        -(-local_size // 16) * 16,
        _granule(function, "shared"),
        _granule(function, "global"),
        bool(clocks),
        128 if any(i.opcode == "wgmma" for i in function.instructions) else 32,
    )


def _step(instruction: Instruction) -> Step:
    entry = TABLE.get(instruction.opcode)
    if entry is None:
        raise unknown(instruction, "not in the interpreter's opcode table")
    try:
        execute = entry.build(instruction)
    except (KeyError, StopIteration, IndexError, ValueError, TypeError) as error:
        raise unknown(instruction, f"a form that the interpreter does not know ({error})") from error
    return Step(instruction, execute, entry.together(instruction), entry.control)


def _granule(function: Function, space: str) -> int:
    """The smallest access to a space, in bytes, at most 4."""
    sizes = [4]
    for i in function.instructions:
        if i.opcode in ("ld", "st", "atom", "red") and access.space_of(i) in (space, ""):
            sizes += [SIZES[m] for m in i.modifiers if m in SIZES]
    return min(sizes)


def _sizes(values: Sequence[int] | int, label: str) -> tuple[int, int, int]:
    sizes = [int(v) for v in np.atleast_1d(values)]
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise ValueError(f"{label} is {values}: it has one to three sizes of at least 1")
    x, y, z = [*sizes, 1, 1][:3]
    return x, y, z


def _check_limits(function: Function, block: tuple[int, int, int]) -> None:
    threads = int(np.prod(block))
    if threads > 1024:
        raise ValueError(f"a block of {threads} threads: 1,024 is the most")
    for limit in ("maxntid", "reqntid"):
        most = int(np.prod(function.limits.get(limit, (1024,))))
        if threads > most or (limit == "reqntid" and limit in function.limits and threads != most):
            raise ValueError(f"{function.name} was compiled for blocks of {most} threads (.{limit}), not {threads}")


def _place(program: Program, arena: Arena, args: Sequence[Any], names: Sequence[str]) -> np.ndarray:
    """The parameter buffer; arrays go to the arena, larger ones first, so that views of one array share its place."""
    parameters = program.function.parameters
    if len(args) != len(parameters):
        raise TypeError(f"{program.function.name} has {len(parameters)} parameters, and {len(args)} are given")
    labels = [names[k] if k < len(names) else f"argument {k}" for k in range(len(args))]
    arrays = sorted((k for k, a in enumerate(args) if isinstance(a, np.ndarray)), key=lambda k: -args[k].nbytes)
    addresses = {k: arena.add(args[k], labels[k]) for k in arrays}
    buffer = bytearray(max((p.offset + p.size for p in parameters), default=0))
    for k, (p, a) in enumerate(zip(parameters, args, strict=True)):
        value = np.uint64(addresses[k]).tobytes() if k in addresses else _by_value(a, labels[k], arena)
        if len(value) != p.size:
            raise TypeError(f"{labels[k]} of {program.function.name} has {len(value)} bytes; the kernel takes {p.size}")
        buffer[p.offset : p.offset + p.size] = value
    return np.frombuffer(bytes(buffer), np.uint8)


def _by_value(a: Any, label: str, arena: Arena) -> bytes:
    if a is None:
        return bytes(8)  # a null pointer
    if isinstance(a, bytes):
        return a
    if isinstance(a, tuple):
        places = [0 if one is None else arena.add(np.atleast_1d(one), f"{label}[{i}]") for i, one in enumerate(a)]
        return np.array(places, np.uint64).tobytes()
    if isinstance(a, TensorMap):
        return encode(a, arena.add(a.array, label))
    if isinstance(a, np.generic):
        return a.tobytes()
    raise TypeError(f"{label} is {a!r}: pass an array, a NumPy number, bytes, a tuple of arrays, or None for no array")
