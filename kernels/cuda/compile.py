"""CUDA source to machine code with NVRTC, which needs no GPU, and a disk cache that notices every edit.

A source is one text: the `#include "..."` lines of our own headers are replaced by the headers, so that the cache,
whose key is that text with arch, options and NVRTC's version, cannot miss an edit in a header. (CuPy's own cache does
not look into headers, and its RawKernel(code=...) forces denormals to zero.)

Machine code is made for a real arch (sm_80), never PTX for a virtual one on trust: NVRTC makes PTX without running
ptxas, so that only a cubin shows registers, spills and instructions that the arch lacks. PTX is for the interpreter.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import os
import re
import struct
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..cpu.jit import cache_root

INCLUDE = Path(__file__).parent / "include"
_OPTIONS = ("-std=c++17", "-default-device", "-lineinfo")
_OWN_INCLUDE = re.compile(r'^[ \t]*#include[ \t]+"([^"]+)"[^\n]*$', re.MULTILINE)


class CompileError(ValueError):
    """NVRTC refused a source. The message is one line; `log` is all that NVRTC said."""

    def __init__(self, message: str, log: str):
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Usage:
    """What one kernel needs on one arch: registers per thread, bytes of stack and of spills per thread, bytes of static
    shared memory per block."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclass(frozen=True)
class Cubin:
    """Machine code for one arch.

    code: the ELF file. path: where the cache keeps it (None where no cache can be written). usage: by entry.
    advisories: the lines in which ptxas says that it ignored or serialised something (C75xx).
    log: everything that NVRTC and ptxas said.
    """

    code: bytes
    path: Path | None
    usage: dict[str, Usage]
    advisories: tuple[str, ...]
    log: str


def nvrtc() -> ModuleType:
    """CuPy's binding of NVRTC; RuntimeError in one line where CuPy or NVRTC is not installed."""
    if importlib.util.find_spec("cupy") is None:
        raise RuntimeError("CUDA kernels are compiled with CuPy, which is not installed: pip install 'minires[cuda]'")
    module = importlib.import_module("cupy.cuda").nvrtc
    try:
        module.getVersion()
    except Exception as error:  # DynamicLibNotFoundError, an ImportError or an OSError, as the release may be
        raise RuntimeError(
            "CUDA kernels are compiled with NVRTC, and CuPy finds none: pip install 'minires[cuda]' "
            f"({type(error).__name__})"
        ) from error
    return module


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """NVRTC's version, such as (13, 0)."""
    return nvrtc().getVersion()


def supported_archs() -> frozenset[str]:
    """The archs that this NVRTC compiles for, with the arch-specific "sm_90a" and its kin."""
    plain = {f"sm_{number}" for number in nvrtc().getSupportedArchs()}
    return frozenset(plain | {f"{arch}a" for arch in plain if int(arch[3:]) >= 90})


def whole_source(path: Path) -> str:
    """The text of a .cu file with our headers in the place of their #include lines, each once.

    ValueError names a header that is not there.
    """
    seen: set[str] = set()

    def with_headers(text: str, name: str) -> str:
        def header(found: re.Match) -> str:
            wanted = found[1]
            if wanted in seen:
                return ""
            seen.add(wanted)
            if not (INCLUDE / wanted).is_file():
                known = ", ".join(sorted(p.name for p in INCLUDE.glob("*.cuh")))
                raise ValueError(f"{path.name} includes {wanted!r}, which kernels/cuda/include has not: {known}")
            here = text.count("\n", 0, found.start()) + 2
            body = with_headers((INCLUDE / wanted).read_text(), wanted)
            return f'#line 1 "{wanted}"\n{body}\n#line {here} "{name}"'

        return _OWN_INCLUDE.sub(header, text)

    return with_headers(path.read_text(), path.name)


def compile_cubin(source: str, name: str, arch: str, options: tuple[str, ...] = ()) -> Cubin:
    """Machine code for `arch` ("sm_80"), from the cache or compiled now.

    source: a whole source (`whole_source`). name: what messages call it. options: NVRTC's, such as "-DREAL=double".
    CompileError where NVRTC refuses it, ValueError for an arch that it does not know, RuntimeError without NVRTC.
    """
    if not re.fullmatch(r"sm_\d+a?", arch):
        raise ValueError(f"arch={arch!r} must be a real arch such as 'sm_80': for a virtual one ptxas does not run")
    version = nvrtc_version()
    if arch not in supported_archs():
        raise ValueError(f"NVRTC {version[0]}.{version[1]} compiles no code for {arch}")
    text = json.dumps([source, arch, _OPTIONS, options, version])
    path = cache_root() / "cuda" / f"{name.removesuffix('.cu')}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.cubin"
    if (kept := _read(path)) is not None:
        return kept
    code, log = _compile(source, name, (*_OPTIONS, f"-arch={arch}", "--ptxas-options=-v", *options), "getCUBIN")
    log = re.sub(r"\n?ptxas info\s*: Compile time[^\n]*", "", log)
    advisories = tuple(line.strip() for line in log.splitlines() if re.search(r"\bC75\d\d\b", line))
    cubin = Cubin(_whole_elf(code), None, _usage(log), advisories, log)
    return cubin if not _write(path, cubin) else Cubin(**vars(cubin) | {"path": path})


def compile_ptx(source: str, name: str, arch: str, options: tuple[str, ...] = ()) -> str:
    """PTX for a virtual arch ("compute_80"; "sm_80" means the same here), for the interpreter. Raises as
    `compile_cubin`. Not cached on disk."""
    return _ptx(source, name, arch.replace("sm_", "compute_"), options)


@functools.lru_cache(256)
def _ptx(source: str, name: str, arch: str, options: tuple[str, ...]) -> str:
    code, _ = _compile(source, name, (*_OPTIONS, f"-arch={arch}", *options), "getPTX")
    return code.decode() if isinstance(code, bytes) else code


def _compile(source: str, name: str, options: tuple[str, ...], get: str) -> tuple[Any, str]:
    """(what NVRTC made, its log)."""
    binding = nvrtc()
    program = binding.createProgram(source, name, (), ())
    try:
        try:
            binding.compileProgram(program, options)
        except binding.NVRTCError as error:
            log = binding.getProgramLog(program).strip("\0 \n")
            first = next((line for line in log.splitlines() if "error" in line), log.partition("\n")[0])
            arch = next(option for option in options if option.startswith("-arch"))
            raise CompileError(f"{name} does not compile with {arch}: {first or error}", log) from error
        return getattr(binding, get)(program), binding.getProgramLog(program).strip("\0 \n")
    finally:
        binding.destroyProgram(program)


def _whole_elf(code: bytes) -> bytes:
    """An ELF file with its last byte: CuPy's getCUBIN takes it for the NUL at the end of a text and drops it."""
    sections, size, count = struct.unpack_from("<Q", code, 40)[0], *struct.unpack_from("<HH", code, 58)
    segments, segment_size, segment_count = struct.unpack_from("<Q", code, 32)[0], *struct.unpack_from("<HH", code, 54)
    end = max(sections + size * count, segments + segment_size * segment_count)
    return code.ljust(end, b"\0")


def _usage(log: str) -> dict[str, Usage]:
    """By entry, from lines such as "Compiling entry function 'k' for 'sm_80'", "0 bytes stack frame, 0 bytes spill
    stores, 0 bytes spill loads" and "Used 48 registers, used 1 barriers, 8704 bytes smem"."""
    usage = {}
    for part in log.split("Compiling entry function '")[1:]:
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        if stack is None or registers is None:
            raise RuntimeError(f"ptxas reports in a form that minires does not know: {part[:200]!r}")
        frame, stores, loads = (int(n) for n in stack.groups())
        usage[part.partition("'")[0]] = Usage(int(registers[1]), frame, stores, loads, int(shared[1]) if shared else 0)
    return usage


def _read(path: Path) -> Cubin | None:
    """The cache's entry, or None where there is none, or one that is not whole."""
    try:
        code, about = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
        if hashlib.sha256(code).hexdigest() != about["sha256"]:
            return None
        usage = {entry: Usage(**numbers) for entry, numbers in about["usage"].items()}
        return Cubin(code, path, usage, tuple(about["advisories"]), about["log"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, cubin: Cubin) -> bool:
    """Put an entry into the cache, whole or not at all: False where the folder cannot be written."""
    about = {
        "sha256": hashlib.sha256(cubin.code).hexdigest(),
        "usage": {entry: asdict(usage) for entry, usage in cubin.usage.items()},
        "advisories": cubin.advisories,
        "log": cubin.log,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, data in ((path, cubin.code), (path.with_suffix(".json"), json.dumps(about).encode())):
            handle, temporary = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, target)
    except OSError:
        return False
    return True
