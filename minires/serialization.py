"""State dicts as safetensors files: names and arrays, no code, readable by every framework."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .device import CPU, is_cuda_array, to_device
from .engine import Tensor

TEMPORARY = ".tmp-"  # what the names of files that are being written have in them
_LONGEST_HEAD = 1 << 23  # bytes; 50,000 tensors
_NOTHING = np.empty(0, np.float32)


class CheckpointError(ValueError):
    """A file of weights that is damaged, or asks for what weights have no use for. Nothing of it was used."""


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


def load_arrays(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays by name, metadata) of a safetensors file. CheckpointError (a ValueError) where it is none, or damaged."""
    return parse_safetensors(read_file(path), str(path))


def read_file(path: str | os.PathLike[str]) -> np.ndarray:
    """The bytes of a regular file, (n,) uint8, writable. OSError where there is none, or it is a device or a pipe."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is no regular file")
        raw = np.empty(status.st_size, np.uint8)
        if file.readinto(raw.data) != len(raw) or file.read(1):
            raise OSError(f"{path} changed while it was read")
    return raw


def parse_safetensors(raw: np.ndarray, file: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays by name, metadata) of a safetensors file's bytes, (n,) uint8, which the arrays become views of.

    Every number in the head is checked against the size of the file, and the arrays must fill it without holes and
    overlaps. Names that are given twice, are empty, unprintable, or look like paths out of a folder are refused.
    Raises CheckpointError. Source: https://github.com/safetensors/safetensors, section "Format".
    """
    head, at = _safetensors_head(raw, file)
    metadata = head.pop("__metadata__", {})
    if type(metadata) is not dict or any(type(text) is not str for text in metadata.values()):
        raise CheckpointError(f"{file} is damaged: its __metadata__ are no texts by name")
    dtypes = _safetensors_dtypes()
    spans = []
    for name, entry in head.items():
        if not name.isprintable() or not name or name[0] in "/\\" or ".." in name.replace("\\", "/").split("/"):
            raise CheckpointError(f"{file} is refused: {name[:80]!r} is no name of a tensor")
        if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{file} is damaged: {name!r} has no dtype, shape and data_offsets")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if type(kind) is not str or kind not in dtypes:
            raise CheckpointError(f"{file}: {name!r} has dtype {kind!s:.20}, known are {', '.join(dtypes)}")
        if not _whole_numbers(shape) or len(shape) > 64 or not _whole_numbers(offsets) or len(offsets) != 2:
            raise CheckpointError(f"{file} is damaged: the shape or offsets of {name!r} are no whole numbers")
        start, end = offsets
        if end - start != math.prod(shape) * dtypes[kind].itemsize or math.prod(max(n, 1) for n in shape) >= 2**56:
            raise CheckpointError(f"{file} is damaged: {name!r} has {end - start} bytes, which is not {kind} {shape}")
        spans.append((start, end, name, dtypes[kind], shape))
    arrays, done = dict.fromkeys(head, _NOTHING), 0
    for start, end, name, dtype, shape in sorted(spans, key=lambda span: span[:2]):
        if start != done or end > len(raw) - at:
            raise CheckpointError(f"{file} is damaged: {name!r} lies at byte {at + start} and not at {at + done}")
        part, done = raw[at + start : at + end], end
        if dtype.kind == "b" and part.max(initial=0) > 1:
            raise CheckpointError(f"{file} is damaged: {name!r} is BOOL and holds a byte that is neither 0 nor 1")
        # copied where they do not begin as every dtype needs it: compiled kernels rely on it
        arrays[name] = (part if part.ctypes.data % 16 == 0 else part.copy()).view(dtype).reshape(shape)
    if done != len(raw) - at:
        raise CheckpointError(f"{file} is damaged: it ends at byte {len(raw)}, its last tensor at {at + done}")
    return arrays, metadata


def _safetensors_head(raw: np.ndarray, file: str) -> tuple[dict[str, Any], int]:
    """(the head, where the values begin)."""
    size = int.from_bytes(raw[:8].tobytes(), "little")
    if not 2 <= size <= len(raw) - 8 or raw[8] != ord("{"):
        raise CheckpointError(f"{file} is not a safetensors file: no head begins it")
    if size > _LONGEST_HEAD:
        raise CheckpointError(f"{file} is refused: its head of {size} bytes is longer than {_LONGEST_HEAD}")
    try:
        return json.loads(raw[8 : 8 + size].tobytes(), object_pairs_hook=_without_doubles), 8 + size
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a safetensors file, or damaged: its head is no JSON ({error})") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice[:80]!r} stands there twice")
    return found


def _whole_numbers(values: Any) -> bool:
    return type(values) is list and all(type(n) is int and 0 <= n < 2**48 for n in values)


def _safetensors_dtypes() -> dict[str, np.dtype]:
    import ml_dtypes

    kinds: dict[str, Any] = {
        "BOOL": "?",
        "F64": "f8",
        "F32": "f4",
        "F16": "f2",
        "BF16": ml_dtypes.bfloat16,
        "C64": "c8",
    }
    kinds |= {f"{letter}{8 * n}": f"{letter.lower()}{n}" for letter in "IU" for n in (1, 2, 4, 8)}
    return {name: np.dtype(kind) for name, kind in kinds.items()}


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
