"""A state dict as a file that `torch.load(path, weights_only=True)` opens, written without PyTorch and without pickle.

The format is the zip archive that torch_checkpoint.py reads. Values begin at multiples of 64 bytes, as PyTorch's do,
so that whoever maps the file into memory finds them aligned.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..device import CPU, is_cuda_array, to_device
from ..engine import Tensor
from ..serialization import write_atomically

_ALIGNMENT = 64  # bytes
_HEADER = 30  # bytes of a local zip header, without its name and extra field
_PADDING = 0x4246  # the kind of extra field that PyTorch pads with
_KINDS = {
    np.dtype(dtype): kind
    for dtype, kind in (
        ("f8", "Double"), ("f4", "Float"), ("f2", "Half"), (ml_dtypes.bfloat16, "BFloat16"),
        ("i8", "Long"), ("i4", "Int"), ("i2", "Short"), ("i1", "Char"), ("u1", "Byte"), ("?", "Bool"),
    )
}  # fmt: skip


def write_torch_checkpoint(path: str | os.PathLike[str], state_dict: Mapping[str, Any]) -> None:
    """Write Tensors (or arrays) by name, as of `Module.state_dict()`, as PyTorch's `torch.save` would.

    The file appears whole or not at all. TypeError names an entry that is no tensor, or has a dtype that PyTorch's
    format lacks.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, value in state_dict.items():
        array = value.array if isinstance(value, Tensor) else value
        if not isinstance(name, str) or not (isinstance(array, np.ndarray) or is_cuda_array(array)):
            raise TypeError(f"{name!r} is {type(value).__name__}; a state dict holds tensors by name")
        if array.dtype not in _KINDS:
            known = ", ".join(dtype.name for dtype in _KINDS)
            raise TypeError(f"{name!r} is {array.dtype}, which PyTorch's files do not hold; known are {known}")
        arrays[name] = np.asarray(to_device(array, CPU), order="C")
    write_atomically(Path(path), lambda beside: _write(beside, Path(path).stem, arrays))


def _write(path: Path, root: str, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, content: Any) -> None:
            entry = zipfile.ZipInfo(f"{root}/{name}")
            start = file.tell() + _HEADER + len(entry.filename.encode()) + 4
            entry.extra = struct.pack("<HH", _PADDING, -start % _ALIGNMENT) + bytes(-start % _ALIGNMENT)
            archive.writestr(entry, content)

        add("data.pkl", _pickle(arrays))
        add("byteorder", b"little")
        for key, array in enumerate(arrays.values()):
            add(f"data/{key}", array.reshape(-1).view(np.uint8).data)
        add("version", b"3\n")


def _pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    """OrderedDict(name=_rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict()), ...) as opcodes."""
    parts = [b"\x80\x02", _EMPTY, b"("]
    for key, (name, array) in enumerate(arrays.items()):
        strides = [stride // array.itemsize for stride in np.empty(array.shape, array.dtype).strides]
        kind = f"ctorch\n{_KINDS[array.dtype]}Storage\n".encode()
        storage = _tuple([_text("storage"), kind, _text(str(key)), _text("cpu"), _integer(array.size)]) + b"Q"
        arguments = [storage, _integer(0), _integers(array.shape), _integers(strides), b"\x89", _EMPTY]
        parts += [_text(name), b"ctorch._utils\n_rebuild_tensor_v2\n", _tuple(arguments), b"R"]
    return b"".join([*parts, b"u."])


_EMPTY = b"ccollections\nOrderedDict\n)R"


def _tuple(parts: Iterable[bytes]) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def _integers(values: Iterable[int]) -> bytes:
    return _tuple(map(_integer, values))


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if value < 2**31 else b"\x8a\x08" + struct.pack("<q", value)


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data
