"""Hostile checkpoints as files: CORPUS is a list of (name, bytes, what the refusal says).

The pickles of hostile.py in each format, and archives, streams and safetensors files that are themselves wrong.
"""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile

import hostile
from hostile import EXECUTES, SHELL, call, name, program, storage, tensor, zip_of

from benchmarks.fuzz import stream, zipped

# --- zip archives -----------------------------------------------------------------------------------------------------

GOOD = zip_of(tensor())


def entries(*files, method=zipfile.ZIP_STORED, comment=b""):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for file, content in files:
            archive.writestr(zipfile.ZipInfo(file), content, method)
        archive.comment = comment
    return out.getvalue()


def with_entry(file, content=b"x"):
    return entries(("a/data.pkl", program(tensor())), ("a/data/0", bytes(16)), (file, content))


def change(data, *changes):
    """The bytes with others at some places: (where, bytes), where counted from the end if negative."""
    out = bytearray(data)
    for where, new in changes:
        where %= len(out)
        out[where : where + len(new)] = new
    return bytes(out)


def directory(data, nth=0):
    """Where the nth entry of the zip directory begins."""
    where = data.index(b"PK\1\2")
    for _ in range(nth):
        where = data.index(b"PK\1\2", where + 4)
    return where


def _renamed_local():
    return change(GOOD, (30, b"a/data.pkx"))


def _moved(more, where):
    """GOOD with more bytes at a place, and a directory that knows it."""
    data = GOOD[:where] + more + GOOD[where:]
    for nth in (0, 1):
        at = directory(data, nth) + 42
        old = struct.unpack("<I", data[at : at + 4])[0]
        data = change(data, (at, struct.pack("<I", old + len(more) * (old >= where))))
    return change(data, (-6, struct.pack("<I", directory(data))))


def _overlap():
    """Two entries with one place in the file."""
    first = struct.pack("<I", 0)
    return change(GOOD, (directory(GOOD, 1) + 42, first))


def _twice():
    data = entries(
        ("a/data.pkl", program(tensor())), ("a/data.pkx", call("os", "system", SHELL)), ("a/data/0", bytes(16))
    )
    return data.replace(b"data.pkx", b"data.pkl")


def _big_directory():
    return change(GOOD, (-14, struct.pack("<HH", 0xFFFE, 0xFFFE)))


ZIPS = {
    "compressed": entries(("a/data.pkl", program(tensor())), ("a/data/0", bytes(16)), method=zipfile.ZIP_DEFLATED),
    "a zip bomb": entries(("a/data.pkl", program(tensor())), ("a/data/0", bytes(10**7)), method=zipfile.ZIP_DEFLATED),
    "compressed by bzip2": entries(("a/data.pkl", program(tensor())), method=zipfile.ZIP_BZIP2),
    "encrypted": change(GOOD, (6, b"\x01"), (directory(GOOD) + 8, b"\x01")),
    "two files of a name": _twice(),
    "two roots": entries(("a/data.pkl", program(tensor())), ("b/data.pkl", program(tensor())), ("a/data/0", bytes(16))),
    "no root": entries(("data.pkl", program(tensor())), ("data/0", bytes(16))),
    "no pickle": entries(("a/data/0", bytes(16))),
    "no entries": entries(),
    "TorchScript": with_entry("a/code/__torch__.py"),
    "TorchScript's constants": with_entry("a/constants.pkl"),
    "torch.package": with_entry("a/model/model.pkl"),
    "path out of the folder": with_entry("a/../../../tmp/x"),
    "absolute path": with_entry("/tmp/x"),
    "path with a backslash": with_entry("a\\..\\x"),
    "key with a sign": with_entry("a/data/-1"),
    "local header with another name": _renamed_local(),
    "local header with another method": change(GOOD, (8, b"\x08")),
    "no local header": change(GOOD, (0, b"PK\3\4"), (directory(GOOD, 1) + 42, b"\x01\x00\x00\x00")),
    "overlapping": _overlap(),
    "local header beyond the end": change(GOOD, (directory(GOOD, 1) + 42, b"\xf0\xff\xff\x00")),
    "size of 4 GB": change(GOOD, (directory(GOOD, 1) + 20, b"\xfe\xff\xff\xff" * 2)),
    "zip64 without its sizes": change(GOOD, (directory(GOOD, 1) + 20, b"\xff\xff\xff\xff" * 2)),
    "wrong checksum of the pickle": change(GOOD, (directory(GOOD) + 16, b"\0\0\0\0")),
    "wrong checksum of a storage": change(GOOD, (directory(GOOD, 1) + 16, b"\1\0\0\0")),
    "damaged values": GOOD.replace(bytes(16), bytes(15) + b"\1", 1),
    "something appended": GOOD + b"x",
    "cut off": GOOD[:-1],
    "half": GOOD[: len(GOOD) // 2],
    "a comment": entries(("a/data.pkl", program(tensor())), ("a/data/0", bytes(16)), comment=b"x"),
    "an archive in its comment": entries(("a/data.pkl", program(tensor())), comment=GOOD),
    "several disks": change(GOOD, (-18, b"\1")),
    "more entries than said": change(GOOD, (-14, b"\1\0\1\0")),
    "fewer entries than said": change(GOOD, (-14, b"\3\0\3\0")),
    "as many entries as fit nowhere": _big_directory(),
    "directory elsewhere": change(GOOD, (-6, b"\0\0\0\0")),
    "a hidden entry before": _moved(GOOD[:40] + bytes(4), 0),
    "a gap between entries": _moved(bytes(25), GOOD.index(b"PK\3\4", 4)),
    "local header with other sizes": change(GOOD, (18, b"\1\0\0\0\1\0\0\0")),
    "big-endian": with_entry("a/byteorder", b"big"),
    "name that is no UTF-8": GOOD.replace(b"a/data/0", b"\xff/data/0"[:8]),
    "something after the pickle": zipped(program(tensor()) + b"}.", {"0": bytes(16)}),
    "bool of 2": zipped(program(tensor(where=storage(kind=name("torch", "BoolStorage")))), {"0": b"\2\0\0\0"}),
    "NumPy's archive": entries(("arr_0.npy", b"\x93NUMPY\x01\x00")),
}

# --- streams ----------------------------------------------------------------------------------------------------------

STREAM = stream(program(tensor()), {"0": bytes(16)})


def tar():
    """The format before the stream, of which CVE-2025-32434 made PyTorch's safe mode run a pickle."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for file in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(file)
            content = pickle.dumps([]) if file != "pickle" else EXECUTES["exec"]
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


STREAMS = {
    "tar (CVE-2025-32434)": tar(),
    "another magic number": change(STREAM, (4, b"\x00")),
    "protocol 1002": change(STREAM, (18, b"\xea")),
    "big-endian": STREAM.replace(b"little_endian\x88", b"little_endian\x89"),
    "no byte order": STREAM.replace(b"little_endian", b"little_indian"),
    "stream cut off": STREAM[:-1],
    "stream with something appended": STREAM + b"x",
    "stream without storages": STREAM[: STREAM.index(b"\x80\x02](X")],
    "storage that is listed twice": stream(program(tensor()), {"0": bytes(16)}).replace(
        b"](X\x01\0\0\x000e", b"](X\x01\0\0\x000X\x01\0\0\x000e"
    ),
    "storage that is not listed": STREAM.replace(b"](X\x01\0\0\x000e", b"](e"),
    "storage that no tensor has": stream(program(tensor()), {"0": bytes(16), "1": bytes(16)}),
    "list of numbers": STREAM.replace(b"](X\x01\0\0\x000e", b"](K\x00e"),
    "list that is a dict": STREAM.replace(b"](X\x01\0\0\x000e", b"}"),
    "storage of 2^63": change(STREAM, (-24, b"\xff" * 7 + b"\x7f")),
    "storage shorter than said": change(STREAM, (-24, b"\x03")),
    "code in the list of storages": STREAM.replace(b"](X\x01\0\0\x000e", EXECUTES["exec"][2:-1]),
    "code for the magic number": b"\x80\x02\x8a\x0a" + STREAM[4:14] + b"0" + EXECUTES["exec"][2:] + STREAM[15:],
}

# --- safetensors ------------------------------------------------------------------------------------------------------


def head(text, values=bytes(16)):
    text = text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode()
    return struct.pack("<Q", len(text)) + text + values


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


_ONE = json.dumps(entry())
SAFETENSORS = {
    "name twice": head(f'{{"a": {_ONE}, "a": {_ONE}}}'),
    "name that is a path": head({"../../etc/x": entry()}),
    "name that is an absolute path": head({"/etc/x": entry()}),
    "name that is empty": head({"": entry()}),
    "name with a line feed": head({"a\nb": entry()}),
    "head longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "head of 2^64": b"\xff" * 8 + b"{}",
    "head that ends early": head(f'{{"a": {_ONE}'),
    "head that is no UTF-8": head(b'{"\xff": 1}'),
    "head nested a hundred thousand deep": head('{"a":' * 100_000 + "1" + "}" * 100_000),
    "head of NaN": head('{"a": NaN}'),
    "head of 5,000 digits": head(f'{{"a": {"1" * 5000}}}'),
    "head of numbers": head({"a": 1}),
    "unknown dtype": head({"a": entry("F128")}),
    "dtype that is a list": head({"a": {**entry(), "dtype": ["F32"]}}),
    "negative size": head({"a": entry(shape=(-4,))}),
    "size that is a float": head({"a": entry(shape=(4.0,))}),
    "size that is true": head({"a": entry(shape=(True, 4))}),
    "sizes that overflow": head({"a": entry(shape=(2**32, 2**32))}),
    "shape that is a number": head({"a": {**entry(), "shape": 4}}),
    "absurd size beside a zero": head({"a": entry(shape=(0, 2**47, 2**47), offsets=(0, 0))}, b""),
    "shape of 65": head({"a": entry(shape=(1,) * 64 + (4,))}),
    "offsets the wrong way round": head({"a": entry(offsets=(16, 0))}),
    "offsets beyond the end": head({"a": entry(offsets=(16, 32))}),
    "negative offsets": head({"a": entry(offsets=(-16, 0))}),
    "three offsets": head({"a": entry(offsets=(0, 8, 16))}),
    "too few bytes": head({"a": entry(shape=(5,))}),
    "a hole": head({"a": entry(offsets=(4, 20))}, bytes(20)),
    "overlapping tensors": head({"a": entry(), "b": entry(offsets=(8, 24))}, bytes(24)),
    "safetensors with something appended": head({"a": entry()}, bytes(17)),
    "safetensors cut off": head({"a": entry()}, bytes(15)),
    "nothing but values": head({}),
    "field missing": head({"a": {"dtype": "F32", "shape": [4]}}),
    "field too many": head({"a": {**entry(), "x": 1}}),
    "metadata of numbers": head({"__metadata__": {"a": 1}, "b": entry()}),
    "metadata that is a list": head({"__metadata__": [], "b": entry()}),
    "BOOL of 2": head({"a": entry("BOOL", (16,))}, bytes(15) + b"\2"),
}

# --- all --------------------------------------------------------------------------------------------------------------

OTHERS = {
    "an empty file": b"",
    "one byte": b"\x80",
    "a page of HTML": b"<!DOCTYPE html><html>Not Found</html>",
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(40),
    "gzip": gzip.compress(STREAM),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(40),
    "a NumPy file": b"\x93NUMPY\x01\x00" + bytes(40),
    "zeros": bytes(1000),
    "a pickle that gunzips": gzip.compress(EXECUTES["exec"]),
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}

_AT_BYTE = "refused at byte"
CORPUS = [(f"zip: {k}", zipped(v, {}), _AT_BYTE) for k, v in EXECUTES.items()]
CORPUS += [(f"stream: {k}", stream(v, {}), _AT_BYTE) for k, v in EXECUTES.items()]
CORPUS += [(f"bare: {k}", v, "not a safetensors file") for k, v in EXECUTES.items()]
CORPUS += [(f"calls {m}.{a}", zipped(call(m, a, SHELL), {}), "it asks for") for m, a in hostile.GADGETS]
CORPUS += [
    (f"opcode {k}", zipped(program(v), {}), "opcode 0x|an integer of 255 bytes") for k, v in hostile.OPCODES.items()
]
CORPUS += [(k, zipped(program(v)[:-2], {}), "announced|UTF-8|does not end") for k, v in hostile.LENGTHS.items()]
CORPUS += [(k, zipped(v, {"0": bytes(16)}), f"{_AT_BYTE}|not weights by name") for k, v in hostile.STACK.items()]
CORPUS += [
    (f"{w}: {k}", f, _AT_BYTE)
    for k, v in {**hostile.TARGETS, **hostile.STORAGES, **hostile.TENSORS}.items()
    for w, f in (("zip", zip_of(v)), ("stream", stream(program(v), {"0": bytes(16)})))
    if (w, k) not in (("zip", "storage smaller than its file"),)
]
CORPUS += [
    ("storage smaller than its file", zip_of(hostile.TENSORS["storage smaller than its file"]), "the pickle says 12")
]
CORPUS += [(f"bomb: {k}", zipped(v, {}), f"{_AT_BYTE}|not weights by name") for k, v in hostile.BOMBS.items()]
CORPUS += [(f"archive: {k}", v, f"{_AT_BYTE}|not a safetensors file") for k, v in ZIPS.items()]
CORPUS += [(f"stream: {k}", v, f"{_AT_BYTE}|tar file") for k, v in STREAMS.items()]
CORPUS += [(f"safetensors: {k}", v, "damaged|refused|not a safetensors file|known are") for k, v in SAFETENSORS.items()]
CORPUS += [(k, v, "not a safetensors file") for k, v in OTHERS.items()]
