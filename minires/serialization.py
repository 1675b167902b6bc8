"""State dicts as safetensors files: names and arrays, no code, readable by every framework."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .device import CPU, device, is_cuda_array, to_device
from .engine import Tensor


def save(state_dict: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write Tensors (or arrays) by name, as of `Module.state_dict()`, to a safetensors file.

    The file appears whole or not at all. TypeError names an entry that is no tensor.
    """
    from safetensors.numpy import save_file

    arrays = {}
    for name, value in state_dict.items():
        array = value.array if isinstance(value, Tensor) else value
        if not isinstance(array, np.ndarray) and not is_cuda_array(array):
            raise TypeError(f"save: {name!r} is {type(value).__name__}; a state dict holds tensors by name")
        # in C order: safetensors 0.8 writes the memory of other orders as it lies, and so wrong values
        arrays[name] = np.asarray(to_device(array, CPU), order="C")
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(arrays, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Tensor]:
    """The Tensors by name of a safetensors file, on the device `map_location`.

    ValueError where the file is not a safetensors file, or holds a dtype that NumPy and ml_dtypes lack.
    """
    import ml_dtypes
    import safetensors

    try:
        entries = safetensors.deserialize(Path(path).read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); .pth files need minires.interop") from error
    kinds = {"BOOL": "bool", "F64": "f8", "F32": "f4", "F16": "f2", "BF16": ml_dtypes.bfloat16, "C64": "c8"}
    kinds |= {f"{letter}{8 * n}": f"{letter.lower()}{n}" for letter in "IU" for n in (1, 2, 4, 8)}
    state = {}
    for name, entry in entries:
        if entry["dtype"] not in kinds:
            raise ValueError(f"{path}: {name!r} has dtype {entry['dtype']}, known are {', '.join(kinds)}")
        array = np.frombuffer(entry["data"], kinds[entry["dtype"]]).reshape(entry["shape"]).copy()
        state[name] = Tensor(to_device(array, device(map_location)))
    return state
