"""State dicts as safetensors files: names and arrays, no code, readable by every framework."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .device import CPU, device, is_cuda_array, to_device
from .engine import Tensor

TEMPORARY = ".tmp-"  # what the names of files that are being written have in them


def save(
    state_dict: Mapping[str, Any], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write Tensors (or arrays) by name, as of `Module.state_dict()`, to a safetensors file.

    metadata: texts by name, kept in the file's head. The file appears whole or not at all (`write_atomically`).
    TypeError names an entry that is no tensor.
    """
    from safetensors.numpy import save as as_bytes

    arrays = {}
    for name, value in state_dict.items():
        array = value.array if isinstance(value, Tensor) else value
        if not isinstance(array, np.ndarray) and not is_cuda_array(array):
            raise TypeError(f"save: {name!r} is {type(value).__name__}; a state dict holds tensors by name")
        # in C order: safetensors 0.8 writes the memory of other orders as it lies, and so wrong values
        arrays[name] = np.asarray(to_device(array, CPU), order="C")
    data = as_bytes(arrays, dict(metadata) if metadata else None)
    write_atomically(Path(path), lambda beside: beside.write_bytes(data))


def load(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Tensor]:
    """The Tensors by name of a safetensors file, on the device `map_location`.

    ValueError where the file is not a safetensors file, or holds a dtype that NumPy and ml_dtypes lack.
    """
    arrays, _ = load_arrays(path)
    where = device(map_location)
    return {name: Tensor(to_device(array, where)) for name, array in arrays.items()}


def load_arrays(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays by name, metadata) of a safetensors file. Raises ValueError as `load` does."""
    import ml_dtypes
    import safetensors

    data = Path(path).read_bytes()
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); .pth files need minires.interop") from error
    kinds = {"BOOL": "bool", "F64": "f8", "F32": "f4", "F16": "f2", "BF16": ml_dtypes.bfloat16, "C64": "c8"}
    kinds |= {f"{letter}{8 * n}": f"{letter.lower()}{n}" for letter in "IU" for n in (1, 2, 4, 8)}
    arrays = {}
    for name, entry in entries:
        if entry["dtype"] not in kinds:
            raise ValueError(f"{path}: {name!r} has dtype {entry['dtype']}, known are {', '.join(kinds)}")
        arrays[name] = np.frombuffer(entry["data"], kinds[entry["dtype"]]).reshape(entry["shape"]).copy()
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return arrays, head.get("__metadata__") or {}


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write a file beside `path`, and move it there once it is on the disk.

    So whatever happens, even a loss of power, `path` is the old file or the new one, never a part of one. The
    temporary file's name has TEMPORARY in it; a killed process may leave it behind.
    """
    beside = path.with_name(f".{path.name}{TEMPORARY}{os.getpid()}")
    try:
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk, where the system can (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
