"""Which of several kernels is fastest for these inputs, measured once and remembered on disk (for `minires.autotune`).

The file is named after all that the answer depends on: the CPU and how many threads compute, the versions of Python
and of the packages that compile, the source of all kernels. An entry belongs to a problem, shapes, dtypes and
parameters, and to the kernels that competed. Kernels of other devices, and those registered from outside the tree,
whose source is not known, are measured in every process.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from minires.kernels.cpu.jit import (  # pyright: ignore[reportMissingImports]
    cache_root,
    get_num_threads,
    host_cpu,
    source_hash,
)

from .device import synchronize

_PACKAGES = ("numba", "llvmlite", "numpy")
_REPEATS = 3
_HOPELESS = 2.0  # times the best so far: not measured again
_INSIDE = "minires.kernels."  # how the module of a kernel in the tree begins


def fastest(key: tuple, rivals: list[Any], arrays: tuple, params: dict) -> Any:
    """The kernel that takes the least time, as measured now or found on disk.

    key: (problem, device, shapes and dtypes, parameters). rivals: the kernels that take these inputs.
    """
    ours = key[1] == "cpu" and all(k.fn.__module__.startswith(_INSIDE) for k in rivals)
    names = {k.name: k for k in rivals}
    entry = json.dumps([*key, sorted(names)])
    if ours and (found := names.get(read(path()).get(entry, ""))) is not None:
        return found
    winner = measure(rivals, arrays, params)
    if ours:
        remember(entry, winner.name)
    return winner


def measure(rivals: list[Any], arrays: tuple, params: dict) -> Any:
    """The rival with the shortest of a few runs, the one that ranks highest first; what it writes into is a copy."""
    times: dict[Any, float] = {}
    for kernel in sorted(rivals, key=lambda k: -k.rank_for(*arrays, **params)):
        inputs = arrays
        if kernel.problem.writes:  # do not let a trial change what the caller passed
            inputs = tuple(None if a is None else a.copy() for a in arrays)
        kernel(*inputs, **params)  # compiles
        synchronize(*inputs)
        for _ in range(_REPEATS):
            start = time.perf_counter()
            kernel(*inputs, **params)
            synchronize(*inputs)
            seconds = time.perf_counter() - start
            times[kernel] = min(seconds, times.get(kernel, seconds))
            if seconds > _HOPELESS * min(times.values()):
                break
    return min(times, key=times.__getitem__)


def path() -> Path:
    """The file of this machine, these versions and this number of threads."""
    threads = get_num_threads()
    return cache_root() / "autotune" / f"{_machine()}-{threads}t.json"


@functools.cache
def _machine() -> str:
    versions = [platform.python_version(), *(importlib.metadata.version(name) for name in _PACKAGES)]
    return f"{source_hash()}-{hashlib.sha256(' '.join([host_cpu(), *versions]).encode()).hexdigest()[:12]}"


def read(file: Path) -> dict[str, str]:
    """What was measured: the winner's name by entry; nothing where there is no file. A damaged one is ignored, with a
    warning that says so."""
    try:
        modified = file.stat().st_mtime_ns
    except OSError:
        return {}
    return _parsed(file, modified)


@functools.lru_cache(4)
def _parsed(file: Path, modified: int) -> dict[str, str]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content.values()):
            raise ValueError("not a table of kernels")
    except (OSError, ValueError) as error:
        warnings.warn(f"{file} is damaged and ignored, autotune measures anew: {error}", RuntimeWarning, stacklevel=2)
        return {}
    return content


def remember(entry: str, name: str) -> None:
    """Add an entry to what other processes may have added meanwhile; where nothing can be written, nothing is."""
    file = path()
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False, encoding="utf-8") as stream:
            temporary = Path(stream.name)
            json.dump({**read(file), entry: name}, stream, indent=0)
        temporary.replace(file)
    except OSError:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
