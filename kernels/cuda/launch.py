"""Launches as data. A launcher computes grid, block, shared memory and arguments; whatever runs it is chosen here.

    launch(Launch(FUNCTION, grid, block, (x, y, n)))

CuPy arrays run on their GPU (`gpu.py`); NumPy arrays run in `kernels/interpreter`, which steps the kernel's PTX on the
CPU. The launcher does not know which: it allocates with `memory.empty(..., like=x)` and never names CuPy. So what a
test without a GPU checks is the very code that runs on one.

Arguments: an array is passed as its address; int and bool as int32, float as float32; a NumPy scalar or 0-d array (a
structured one too: a struct) and a `TensorMap` by value; a tuple of arrays, or None for no array, as a struct of
their addresses.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from . import compile as compiler

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120")  # T4, A100, RTX 30, RTX 40, H100/H200, RTX 50
SM_80 = ARCHS[1:]  # asynchronous copies, bf16, TF32
SHARED_STATIC = 48 * 1024  # what a block gets without asking
# Bytes of shared memory that a block may ask for (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_MOST = {"sm_75": 65536, "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_120": 101376}
_GRID_MOST = (2**31 - 1, 65535, 65535)
_SIZE_MOST = 2**31 - 1


@dataclass(frozen=True)
class Function:
    """A kernel of a .cu file. Making one at module level lists it for `minires kernels compile`.

    file: the source. entry: its extern "C" name. options: NVRTC's, such as "-DREAL=double". archs: what it is compiled
    for. registers: how many it may use on any of them. alignment: bytes that its array arguments must be aligned to.
    """

    file: Path
    entry: str
    options: tuple[str, ...] = ()
    archs: tuple[str, ...] = ARCHS
    registers: int = 255
    alignment: int = 1

    def __post_init__(self) -> None:
        if self not in _FUNCTIONS:
            _FUNCTIONS.append(self)

    @classmethod
    def unlisted(cls, *args: Any, **kwargs: Any) -> Function:
        """A function of a file outside the tree."""
        before = functions()
        function = cls(*args, **kwargs)
        _FUNCTIONS[:] = before
        return function

    def cubin(self, arch: str) -> compiler.Cubin:
        """Its machine code for `arch`. Raises as `compile.compile_cubin`."""
        return compiler.compile_cubin(compiler.whole_source(self.file), self.file.name, arch, self.options)

    def ptx(self) -> str:
        """Its PTX for the least arch that it is made for."""
        return compiler.compile_ptx(compiler.whole_source(self.file), self.file.name, self.archs[0], self.options)


@dataclass(frozen=True)
class Launch:
    """One launch: function, grid (x, y, z) of blocks, threads of a block, arguments, bytes of dynamic shared memory."""

    function: Function
    grid: tuple[int, ...]
    block: tuple[int, ...]
    args: tuple[Any, ...] = field(repr=False)
    shared: int = 0


class Executor(Protocol):
    """What runs a checked launch: `gpu.run` or `interpreter.interpret`."""

    def __call__(self, launch: Launch) -> None: ...


_FUNCTIONS: list[Function] = []
_executor: Executor | None = None


STORED_AS = {"float32": "float", "float64": "double", "float16": "fp16", "bfloat16": "bf16"}  # in include/types.cuh
ALL = tuple(STORED_AS)


def variants(
    file: Path, entry: str, dtypes: tuple[str, ...] = ("float32", "float64"), **about: Any
) -> dict[str, Function]:
    """The functions that `-DNUMBER=...` makes of one entry, by the name of the dtype. about: fields of `Function`."""
    return {dtype: Function(file, entry, (f"-DNUMBER={STORED_AS[dtype]}",), **about) for dtype in dtypes}


def functions() -> tuple[Function, ...]:
    """All functions, in the order in which their modules made them."""
    return tuple(_FUNCTIONS)


@contextlib.contextmanager
def executed_by(executor: Executor) -> Iterator[None]:
    """Within it, `executor` gets every launch (tests: other schedules, a record of launches)."""
    global _executor
    saved, _executor = _executor, executor
    try:
        yield
    finally:
        _executor = saved


def launch(what: Launch) -> None:
    """Check `what` and run it where its arrays lie; nothing to do for an empty grid.

    ValueError for what no GPU can launch.
    """
    if math.prod(what.grid) == 0:
        return
    check(what)
    (_executor or _executor_of(what))(what)


def blocks(n: int, size: int) -> int:
    """How many blocks of `size` cover n."""
    return -(-n // size)


def check(what: Launch) -> None:
    """ValueError unless grid and block are within CUDA's limits, and arrays dense, aligned and 32-bit countable."""
    name = what.function.entry
    if any(n > most for n, most in zip(what.grid, _GRID_MOST, strict=False)) or len(what.grid) > 3:
        raise ValueError(f"{name}: grid {what.grid} exceeds CUDA's {_GRID_MOST}; use a smaller batch")
    if not 0 < math.prod(what.block) <= 1024 or len(what.block) > 3:
        raise ValueError(f"{name}: a block of {what.block} threads; CUDA takes 1 to 1024")
    if what.shared > max(SHARED_MOST.values()):
        raise ValueError(f"{name}: {what.shared} bytes of shared memory; no GPU gives a block that many")
    nested = ((i, a) for i, arg in enumerate(what.args) for a in (arg if isinstance(arg, tuple) else (arg,)))
    for i, a in nested:
        if not is_array(a) and not (isinstance(a, np.ndarray) and isinstance(what.args[i], tuple)):
            continue
        if not a.flags.c_contiguous:
            raise ValueError(f"{name}: argument {i}, of shape {a.shape} and strides {a.strides}, is not C-contiguous")
        if a.size > _SIZE_MOST:
            raise ValueError(f"{name}: argument {i} has {a.size} elements, more than 2^31 - 1: use a smaller batch")
        if address(a) % max(what.function.alignment, a.dtype.itemsize):
            raise ValueError(f"{name}: argument {i} lies at {address(a):#x}, not aligned to {what.function.alignment}")


def is_array(arg: Any) -> bool:
    """Whether an argument is passed by address: an array with axes, or any array of the GPU's."""
    return hasattr(arg, "strides") and (arg.ndim > 0 or not isinstance(arg, (np.ndarray, np.generic)))


def address(a: Any) -> int:
    """Where an array's first element lies."""
    return a.ctypes.data if isinstance(a, np.ndarray) else a.data.ptr


def by_value(arg: Any) -> Any:
    """An argument that is no array, as the NumPy value whose bytes the kernel gets."""
    if isinstance(arg, tuple):
        return np.void(np.array([0 if a is None else address(a) for a in arg], np.uint64).tobytes())
    if isinstance(arg, (np.generic, np.ndarray)):  # first: np.float64 is a float, too
        return arg
    if isinstance(arg, (bool, int)):
        return np.int32(arg)
    return np.float32(arg) if isinstance(arg, float) else arg


def _executor_of(what: Launch) -> Executor:
    if any(is_array(a) and isinstance(a, np.ndarray) for a in what.args):
        from ..interpreter import interpret

        return interpret
    from .gpu import run

    return run
