"""`minires.load`: weights from a file, of whatever format; what a file is, its first bytes say, not its name."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..device import device, to_device
from ..engine import Tensor
from ..serialization import CheckpointError, parse_safetensors, read_file
from .torch_checkpoint import STREAM_START, ZIP_START, read_torch_checkpoint

_BARE_PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))


def load(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """What a file of weights holds: Tensors by name, on the device `map_location`.

    A safetensors file holds nothing else. PyTorch's checkpoints (.pth, .pt, .th, .bin; both formats) may also hold
    dicts, lists, tuples, texts and numbers around their Tensors, such as {"state_dict": {...}, "epoch": 90}:
    `minires.interop.find_state_dict` finds the weights. They are read without pickle: nothing in the file is run.
    Tensors that shared a storage still do. Memory: the file's size, and as much again for values that lie unaligned.
    Raises OSError where there is no file, and CheckpointError (a ValueError) in one line with the reason and the byte
    for a file that is damaged, of another kind, or asks for anything to be run.
    """
    found, where = parse(read_file(path), str(path)), device(map_location)
    return found if where.type == "cpu" else _moved(found, where)


def parse(raw: np.ndarray, file: str) -> dict[str, Any]:
    """What a file of weights holds, from its bytes, (n,) uint8. file: its name, for messages."""
    start = raw[:9].tobytes()
    if start[:4] in (ZIP_START, STREAM_START):
        found = read_torch_checkpoint(raw, file)
        if not isinstance(found, dict):
            raise CheckpointError(f"{file} holds a {type(found).__name__}, not weights by name")
        return found
    if start[8:] == b"{":
        arrays, _ = parse_safetensors(raw, file)
        return {name: Tensor(array) for name, array in arrays.items()}
    if raw[257:262].tobytes() == b"ustar" or start[:2] in _BARE_PICKLES:
        raise CheckpointError(
            f"{file} is not a safetensors file or a checkpoint that is read, but a tar file or a bare pickle; save it "
            "again with PyTorch 1.6 or later: torch.save(model.state_dict(), ...)"
        )
    raise CheckpointError(f"{file} is not a safetensors file or a checkpoint of PyTorch (.pth, .pt, .th, .bin)")


def _moved(value: Any, where: Any) -> Any:
    """The same with its Tensors on another device."""
    if isinstance(value, Tensor):
        return Tensor(to_device(value.array, where))
    if isinstance(value, dict):
        return {key: _moved(inner, where) for key, inner in value.items()}
    return type(value)(_moved(inner, where) for inner in value) if type(value) in (list, tuple) else value
