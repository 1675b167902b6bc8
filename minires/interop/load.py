"""`minires.load`: weights from a file, of whatever format; what a file is, its first bytes say, not its name."""

from __future__ import annotations

import os
from typing import Any

from ..device import device, to_device
from ..engine import Tensor
from ..serialization import CheckpointError, parse_safetensors, read_file
from .torch_checkpoint import STREAM_START, ZIP_START, read_torch_checkpoint


def load(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """What a file of weights holds: Tensors by name, on the device `map_location`.

    A safetensors file holds nothing else. PyTorch's checkpoints (.pth, .pt, .th, .bin; both formats) may also hold
    dicts, lists, tuples, texts and numbers around their Tensors, such as {"state_dict": {...}, "epoch": 90}:
    `minires.interop.find_state_dict` finds the weights. They are read without pickle: nothing in the file is run.
    Tensors that shared a storage still do. Memory: the file's size, and as much again for values that lie unaligned.
    Raises OSError where there is no file, and CheckpointError (a ValueError) in one line with the reason and the byte
    for a file that is damaged, of another kind, or asks for anything to be run.
    """
    raw, where = read_file(path), device(map_location)
    if raw[:4].tobytes() in (ZIP_START, STREAM_START):
        found = read_torch_checkpoint(raw, str(path))
        if not isinstance(found, dict):
            raise CheckpointError(f"{path} holds a {type(found).__name__}, not weights by name")
    elif raw[8:9].tobytes() == b"{":
        arrays, _ = parse_safetensors(raw, str(path))
        found = {name: Tensor(array) for name, array in arrays.items()}
    elif raw[257:262].tobytes() == b"ustar" or raw[:2].tobytes() in (
        b"\x80\x02",
        b"\x80\x03",
        b"\x80\x04",
        b"\x80\x05",
    ):
        raise CheckpointError(
            f"{path} is not a safetensors file or a checkpoint that is read: it is a tar file or a bare pickle; "
            "save it again with a PyTorch since 1.6"
        )
    else:
        raise CheckpointError(f"{path} is not a safetensors file or a checkpoint of PyTorch (.pth, .pt, .th, .bin)")
    return found if where.type == "cpu" else _moved(found, where)


def _moved(value: Any, where: Any) -> Any:
    """The same with its Tensors on another device."""
    if isinstance(value, Tensor):
        return Tensor(to_device(value.array, where))
    if isinstance(value, dict):
        return {key: _moved(inner, where) for key, inner in value.items()}
    return type(value)(_moved(inner, where) for inner in value) if type(value) in (list, tuple) else value
