"""PyTorch's checkpoints (.pth, .pt, .th, .bin), read without PyTorch and without pickle.

Two formats of `torch.save` are read. Since PyTorch 1.6 it is a zip archive,

    NAME/data.pkl    a pickle of the structure      NAME/data/0, NAME/data/1, ...    the values of each storage

and before it was a stream: three pickles (a magic number, the protocol, the sizes of C's integers), the pickle of the
structure, a pickle of the list of storages, and for each storage its number of elements (8 bytes) and its values. The
still older tar files, and archives of TorchScript, which hold code, are refused.

The pickles go through `Interpreter`, which runs nothing. The file is read into memory once; tensors are views of it,
so that storages stay shared, and none reaches beyond its storage.
"""

from __future__ import annotations

import re
import zlib
from typing import Any

import ml_dtypes
import numpy as np

from ..engine import Tensor
from .opcodes import Interpreter, Name, Storage
from .refusal import Cursor
from .zip_index import Entry, read_index

ZIP_START, STREAM_START = b"PK\3\4", b"\x80\x02\x8a\x0a"  # a stream begins with its magic number
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
# the last are what newer versions of PyTorch note down: .format_version, .data/serialization_id
_KNOWN_ENTRY = re.compile(r"data\.pkl|byteorder|version|data/[0-9]{1,10}|\.[a-z_]+(/[a-z_]+)?")
_DTYPES = {
    "Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": ml_dtypes.bfloat16,
    "Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1", "Bool": "?",
    "float64": "f8", "float32": "f4", "float16": "f2", "bfloat16": ml_dtypes.bfloat16,
    "int64": "i8", "int32": "i4", "int16": "i2", "int8": "i1", "bool": "?",
    "uint64": "u8", "uint32": "u4", "uint16": "u2", "uint8": "u1", "Untyped": "u1",
}  # fmt: skip


def read_torch_checkpoint(raw: np.ndarray, file: str) -> Any:
    """What `torch.save` wrote: dicts, lists, tuples, texts and numbers, with Tensors in them.

    raw: the file's bytes, (n,) uint8, which the Tensors become views of. file: its name, for messages.
    Raises CheckpointError with the reason and the byte for whatever is not plainly a state dict.
    """
    data = memoryview(raw.data)
    start = bytes(data[:4])
    if start == ZIP_START:
        return _Zip(raw, data, file).read()
    if start == STREAM_START:
        return _Stream(raw, data, file).read()
    Cursor(data, file).refuse("it begins neither as a zip archive nor as PyTorch's older format")


class _Reader:
    """What both formats share: storages by key, and the tensors in them."""

    def __init__(self, raw: np.ndarray, data: memoryview, file: str):
        self.raw, self.file = raw, file
        self.cursor = Cursor(data, file)
        self.claims: dict[str, Storage] = {}  # the first that the pickle says of each storage
        self.waiting: list[tuple[Tensor, Storage, int, tuple[int, ...], tuple[int, ...], Name | None]] = []

    def unpickle(self, cursor: Cursor) -> Any:
        return Interpreter(cursor, self.rebuild, Tensor).run()

    def rebuild(
        self,
        storage: Storage,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: Name | None,
        at: int,
    ) -> Tensor:
        """A Tensor that gets its values in `fill`, after everything about it has been checked."""
        claim = self.claims.setdefault(storage.key, storage)
        if (claim.dtype, claim.whole) != (storage.dtype, storage.whole):
            self.cursor.refuse(f"storage {storage.key!r} is said to have two dtypes or sizes", storage.at)
        if len(shape) != len(strides):
            self.cursor.refuse(f"a tensor of {len(shape)} sizes and {len(strides)} strides", at)
        size = _dtype(dtype or storage.dtype).itemsize
        room = storage.numel // size if dtype else storage.numel  # numel of an untyped storage counts bytes
        if min((0, offset, *shape, *strides)) < 0 or max((0, *shape, *strides)) >= 2**48:
            self.cursor.refuse("a tensor with a negative or absurd offset, size or stride", at)
        elements, last = 1, offset
        for n, stride in zip(shape, strides, strict=True):
            elements, last = elements * n, last + max(0, n - 1) * stride
        if elements and last >= room:
            self.cursor.refuse(f"a tensor reaches to element {last} of a storage of {room}", at)
        if elements > room:
            self.cursor.refuse(f"a tensor of {elements} elements, expanded from a storage of {room}; save a copy", at)
        tensor = Tensor(_NOTHING)
        self.waiting.append((tensor, storage, offset, shape, strides, dtype))
        return tensor

    def fill(self, values: dict[str, np.ndarray]) -> None:
        """Make every waiting Tensor a view of its storage: values holds their bytes by key."""
        for claim in self.claims.values():
            if claim.dtype == "torch.BoolStorage" and values[claim.key].max(initial=0) > 1:
                self.cursor.refuse(f"storage {claim.key!r} of Bool holds a byte that is neither 0 nor 1", claim.at)
        for tensor, storage, offset, shape, strides, dtype in self.waiting:
            kind = _dtype(dtype or storage.dtype)
            if 0 in shape:
                tensor.array = np.empty(shape, kind)
                continue
            size, start = kind.itemsize, storage.start + offset
            steps = [size * stride for stride in strides]
            tensor.array = np.ndarray(shape, kind, values[storage.key], start * size, steps)  # checks it once more

    def check_size(self, claim: Storage, size: int, at: int) -> None:
        expected = claim.whole * _dtype(claim.dtype).itemsize
        if size != expected:
            self.cursor.refuse(f"storage {claim.key!r} has {size} bytes, the pickle says {expected}", at)


class _Zip(_Reader):
    def read(self) -> Any:
        entries = read_index(self.cursor.data, self.file)
        root = next(iter(entries), "").partition("/")[0]
        self.entries = {self.inner(name, root, entry): entry for name, entry in entries.items()}
        if "data.pkl" not in self.entries:
            self.cursor.refuse("the zip archive has no data.pkl: it is no checkpoint of PyTorch")
        if "byteorder" in self.entries and self.content("byteorder") != b"little":
            self.cursor.refuse("values in big-endian order", self.entries["byteorder"].start)
        self.content("data.pkl")
        pickle = self.entries["data.pkl"]
        cursor = Cursor(self.cursor.data, self.file, pickle.start, pickle.end)
        found = self.unpickle(cursor)
        if cursor.at != cursor.end:
            cursor.refuse("something follows the pickle")
        self.fill({claim.key: self.storage(claim) for claim in self.claims.values()})
        return found

    def inner(self, name: str, root: str, entry: Entry) -> str:
        """The name without `root`, the folder that all entries lie in, if it is one that a checkpoint may have."""
        inner = name.removeprefix(f"{root}/")
        if inner == name or not _KNOWN_ENTRY.fullmatch(inner):
            code = inner.startswith("code/") or inner == "constants.pkl"
            what = "a TorchScript archive, which holds code" if code else "no state dict has such a file"
            self.cursor.refuse(f"zip entry {name[:80]!r}: {what}", entry.at)
        return inner

    def storage(self, claim: Storage) -> np.ndarray:
        entry = self.entries.get(f"data/{claim.key}")
        if entry is None:
            self.cursor.refuse(f"there is no storage {claim.key[:80]!r}", claim.at)
        self.check_size(claim, entry.end - entry.start, claim.at)
        self.content(f"data/{claim.key}")
        return _aligned(self.raw[entry.start : entry.end])

    def content(self, inner: str) -> bytes | memoryview:
        """The bytes of an entry, whose checksum must be right."""
        entry = self.entries[inner]
        content = self.cursor.data[entry.start : entry.end]
        if zlib.crc32(content) != entry.crc32:
            self.cursor.refuse(f"the checksum of zip entry {inner!r} is wrong: the file is damaged", entry.start)
        return content


class _Stream(_Reader):
    def read(self) -> Any:
        cursor = self.cursor
        for what, expected in (("magic number", _MAGIC), ("protocol", _PROTOCOL)):
            at = cursor.at
            said = self.unpickle(cursor)
            if type(said) is not int or said != expected:
                cursor.refuse(f"the {what} is not {expected}", at)
        at = cursor.at
        system = self.unpickle(cursor)
        if type(system) is not dict or system.get("little_endian") is not True:
            cursor.refuse("values in big-endian order", at)
        found = self.unpickle(cursor)
        at = cursor.at
        keys = self.unpickle(cursor)
        if type(keys) is not list or any(type(key) is not str for key in keys):
            cursor.refuse("the list of storages is no list of texts", at)
        if len(set(keys)) != len(keys) or set(keys) != self.claims.keys():
            cursor.refuse("the list of storages is not that of the tensors", at)
        values = {}
        for key in keys:
            claim, at = self.claims[key], cursor.at
            size = _dtype(claim.dtype).itemsize
            self.check_size(claim, cursor.number(8) * size, at)
            start = cursor.at
            cursor.take(claim.whole * size)
            values[key] = _aligned(self.raw[start : cursor.at])
        if cursor.at != cursor.end:
            cursor.refuse("something follows the last storage")
        self.fill(values)
        return found


_NOTHING = np.empty(0, np.float32)


def _dtype(name: Name) -> np.dtype:
    return np.dtype(_DTYPES[name.rpartition(".")[2].removesuffix("Storage")])


def _aligned(raw: np.ndarray) -> np.ndarray:
    """The bytes, copied where they do not begin as every dtype needs it: compiled kernels rely on it."""
    return raw if raw.ctypes.data % 16 == 0 else raw.copy()
