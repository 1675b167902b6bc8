"""`python -m benchmarks fuzz`: damaged checkpoints by the hundred thousand, which must all be refused or be read.

Small files of every format (PyTorch's zip archive and older stream, safetensors) are changed at random: bytes, fields
of 2, 4 and 8 bytes, parts removed, repeated, swapped, cut off. Changes within a pickle are also wrapped up again with
right checksums, because else none would reach the interpreter. What comes of each must be weights or a
CheckpointError; anything else, and anything that takes long, is a bug.
"""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from minires import Tensor, save
from minires.interop import CheckpointError, find_state_dict, write_torch_checkpoint
from minires.interop.load import parse

_ODD = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
_SYSTEM = b"\x80\x02}(X\x0d\x00\x00\x00little_endian\x88u."


@dataclass
class Outcome:
    """read, refused: how many files were. slowest: seconds of the one that took longest, and its number. bugs: number
    and error of those that were neither; numbers are those of `mutated`."""

    read: int = 0
    refused: int = 0
    slowest: tuple[float, int] = (0.0, -1)
    seconds: float = 0.0
    bugs: list[tuple[int, str]] = field(default_factory=list)


def fuzz(n: int = 100_000, seed: int = 0, keep: Path | None = None) -> None:
    """Read `n` damaged checkpoints; fails where one is neither read nor refused, or takes more than a second.

    Parameters
    ----------
    n
        How many.
    seed
        Which ones.
    keep
        A folder for the files that show a bug.
    """
    out = run(n, seed, keep)
    seconds, slowest = out.slowest
    print(
        f"{n:,} damaged files in {out.seconds:.1f} s: {out.refused:,} refused, {out.read:,} read, "
        f"{len(out.bugs)} bugs; the slowest (number {slowest}) took {1e3 * seconds:.1f} ms"
    )
    for number, error in out.bugs[:10]:
        print(f"number {number} of seed {seed}: {error}")
    if out.bugs or seconds > 1:
        raise RuntimeError("damaged checkpoints were neither read nor refused, or took too long")


def run(n: int, seed: int, keep: Path | None = None) -> Outcome:
    """Read so many damaged files and count."""
    out, begin = Outcome(), time.perf_counter()
    for number, data in enumerate(mutated(n, seed)):
        start = time.perf_counter()
        try:
            touch(parse(np.frombuffer(data, np.uint8).copy(), "fuzz"))
            out.read += 1
        except CheckpointError:
            out.refused += 1
        except Exception as error:  # what this is all about
            out.bugs.append((number, f"{type(error).__name__}: {error}"))
            if keep is not None:
                (keep / f"fuzz-{seed}-{number}").write_bytes(data)
        out.slowest = max(out.slowest, (time.perf_counter() - start, number))
    out.seconds = time.perf_counter() - begin
    return out


def touch(found: dict) -> None:
    """Read every value of every tensor, so that one beyond the file's bytes would crash."""
    for tensor in find_state_dict(found).values():
        tensor.array.tobytes()


def mutated(n: int, seed: int) -> Iterator[bytes]:
    """n damaged files. The same seed gives the same ones."""
    rng = np.random.default_rng(seed)
    files = seeds()
    pickles = [(stored(archive, "data.pkl"), archive) for archive in files[:2]]
    for _ in range(n):
        kind = int(rng.integers(len(files) + 2))
        if kind < len(files):
            yield damaged(rng, files[kind])
        else:
            pickle, archive = pickles[kind - len(files)]
            yield replaced(archive, damaged(rng, pickle))


def damaged(rng: np.random.Generator, data: bytes) -> bytes:
    """The bytes after one to four random changes."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        _CHANGES[int(rng.integers(len(_CHANGES)))](rng, out)
    return bytes(out)


def _place(rng: np.random.Generator, out: bytearray) -> int:
    return int(rng.integers(len(out) + 1))


def _byte(rng: np.random.Generator, out: bytearray) -> None:
    if out:
        out[_place(rng, out) % len(out)] = int(rng.integers(256))


def _bit(rng: np.random.Generator, out: bytearray) -> None:
    if out:
        out[_place(rng, out) % len(out)] ^= 1 << int(rng.integers(8))


def _field(rng: np.random.Generator, out: bytearray) -> None:
    size, at = 2 ** int(rng.integers(4)), _place(rng, out)
    value = _ODD[int(rng.integers(len(_ODD)))] % 256**size
    out[at : at + size] = value.to_bytes(size, "little")


def _remove(rng: np.random.Generator, out: bytearray) -> None:
    at = _place(rng, out)
    del out[at : at + int(rng.integers(1, 40))]


def _repeat(rng: np.random.Generator, out: bytearray) -> None:
    at, to = _place(rng, out), _place(rng, out)
    out[to:to] = out[at : at + int(rng.integers(1, 40))]


def _swap(rng: np.random.Generator, out: bytearray) -> None:
    at, to, size = _place(rng, out), _place(rng, out), int(rng.integers(1, 9))
    out[at : at + size], out[to : to + size] = out[to : to + size], out[at : at + size]


def _insert(rng: np.random.Generator, out: bytearray) -> None:
    at = _place(rng, out)
    out[at:at] = rng.bytes(int(rng.integers(1, 9)))


def _cut(rng: np.random.Generator, out: bytearray) -> None:
    del out[_place(rng, out) :]


_CHANGES: tuple[Callable[[np.random.Generator, bytearray], None], ...] = (
    _byte, _byte, _bit, _bit, _field, _field, _remove, _repeat, _swap, _insert, _cut,
)  # fmt: skip


def seeds() -> list[bytes]:
    """Small whole files: two zip archives (the second with all that a pickle may hold), a stream, safetensors."""
    state = {
        "conv.weight": Tensor(np.arange(12, dtype=np.float32).reshape(3, 4).T),
        "bn.num_batches_tracked": Tensor(np.array(7)),
        "mask": Tensor(np.array([True, False])),
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.pth"
        write_torch_checkpoint(path, state)
        archive = path.read_bytes()
        save(state, path, {"epoch": "1"})
        tensors = path.read_bytes()
    return [archive, replaced(archive, RICH), stream(stored(archive, "data.pkl"), storages(archive)), tensors]


def stored(archive: bytes, name: str) -> bytes:
    """A file in an archive that PyTorch or minires wrote."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return next(file.read(entry) for entry in file.infolist() if entry.filename.endswith(f"/{name}"))


def storages(archive: bytes) -> dict[str, bytes]:
    """The storages in an archive, by key."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return {e.filename.rpartition("/")[2]: file.read(e) for e in file.infolist() if "/data/" in e.filename}


def replaced(archive: bytes, pickle: bytes) -> bytes:
    """The archive with another data.pkl, and right checksums."""
    return zipped(pickle, storages(archive))


def zipped(pickle: bytes, values: dict[str, bytes]) -> bytes:
    """A zip archive as of torch.save."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        for name, content in {"data.pkl": pickle, **{f"data/{k}": v for k, v in values.items()}}.items():
            file.writestr(zipfile.ZipInfo(f"a/{name}"), content)
    return out.getvalue()


def stream(pickle: bytes, values: dict[str, bytes], size: int = 4) -> bytes:
    """A file of PyTorch's older format, whose storages have elements of `size` bytes but for integers and bools."""
    sizes = {key: {8: 8, 2: 1}.get(len(value), size) for key, value in values.items()}
    keys = b"\x80\x02](" + b"".join(b"X" + len(k).to_bytes(4, "little") + k.encode() for k in values) + b"e."
    parts = [(len(value) // sizes[key]).to_bytes(8, "little") + value for key, value in values.items()]
    return b"".join([_MAGIC, _SYSTEM, pickle, keys, *parts])


# {"state_dict": OrderedDict(weight=parameter, with metadata), "epoch": 3, "lr": 0.1, "list": [1, (2, "x"), None]}, with
# memo entries, the opcodes of protocol 4, and a Size, as a pickler writes them
RICH = (
    b"\x80\x04}\x94(\x8c\x0astate_dict\x94ccollections\nOrderedDict\nq\x02)Rq\x03(\x8c\x06weight"
    b"\x8c\x0ctorch._utils\x8c\x12_rebuild_parameter\x93(ctorch._utils\n_rebuild_tensor_v2\n"
    b"((X\x07\x00\x00\x00storageq\x04ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x0ctQ"
    b"K\x00K\x04K\x03\x86K\x01K\x04\x86\x89h\x02)RtR\x88h\x02)RtRu"
    b"}X\x09\x00\x00\x00_metadata}sb"
    b"X\x05\x00\x00\x00epochM\x03\x00X\x02\x00\x00\x00lrG?\xb9\x99\x99\x99\x99\x99\x9a"
    b"X\x04\x00\x00\x00list](K\x01K\x02X\x01\x00\x00\x00x\x86NeX\x04\x00\x00\x00sizectorch\nSize\n(K\x01J\xff\xff\xff\x7f"
    b"\x8a\x02\x00\x01t\x85Ru."
)
