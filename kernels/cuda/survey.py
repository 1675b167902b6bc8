"""Every CUDA kernel compiled for every arch that it declares: for `minires kernels compile` and the tests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from . import compile as compiler
from .launch import SHARED_STATIC, Function, functions


@dataclass(frozen=True)
class Compiled:
    """A function on one arch: what it uses (None where it did not compile) and what is wrong with it, if anything."""

    function: Function
    arch: str
    usage: compiler.Usage | None
    faults: tuple[str, ...] = ()


def survey(chosen: Sequence[Function] | None = None, archs: Sequence[str] | None = None) -> list[Compiled]:
    """Compile functions (all of them) for the archs that they declare (or those of `archs` among them).

    RuntimeError where there is no NVRTC.
    """
    known = compiler.supported_archs()
    jobs = [
        (function, arch)
        for function in (functions() if chosen is None else chosen)
        for arch in function.archs
        if arch in known and (archs is None or arch in archs)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC runs without Python's lock
        list(pool.map(_compiled, {(f.file, f.options, arch): (f, arch) for f, arch in jobs}.values()))
    return [_compiled(job) for job in jobs]  # from the cache by now


def _compiled(job: tuple[Function, str]) -> Compiled:
    function, arch = job
    try:
        cubin = function.cubin(arch)
    except compiler.CompileError as error:
        return Compiled(function, arch, None, (str(error),))
    if function.entry not in cubin.usage:
        return Compiled(function, arch, None, (f'{function.file.name} has no extern "C" kernel {function.entry}',))
    return Compiled(function, arch, cubin.usage[function.entry], tuple(faults(function, cubin)))


def faults(function: Function, cubin: compiler.Cubin) -> list[str]:
    """What is wrong with machine code that compiled: spills, advisories, more registers or memory than allowed."""
    usage = cubin.usage[function.entry]
    found = list(cubin.advisories)
    if usage.spill_stores or usage.spill_loads:
        found.append(f"{usage.spill_stores} bytes of registers spilled to memory, {usage.spill_loads} read back")
    if usage.registers > function.registers:
        found.append(f"{usage.registers} registers, and {function.registers} are its budget")
    if usage.shared > SHARED_STATIC:
        found.append(f"{usage.shared} bytes of static shared memory, more than {SHARED_STATIC}")
    return found
