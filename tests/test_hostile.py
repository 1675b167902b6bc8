"""Hostile and damaged checkpoints are refused in one line; nothing runs, is imported, or is written."""

import os
import pickle
import re
import subprocess
import sys
import tracemalloc

import hostile
import hostile_files
import pytest

import minires
from benchmarks.fuzz import run
from minires.cli import main
from minires.interop import CheckpointError


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """The current folder, which is empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", hostile.EXECUTES)
def test_pickle_would_run_them(empty, name):
    """What shows that the canary sings: Python's own reader does run these."""
    try:
        pickle.loads(hostile.EXECUTES[name])
    except Exception as error:  # some run first and then fail
        assert not isinstance(error, pickle.UnpicklingError) or os.path.exists(hostile.CANARY), error
    assert [p.name for p in empty.iterdir()] == [hostile.CANARY]


@pytest.mark.parametrize(
    ("data", "says"), [row[1:] for row in hostile_files.CORPUS], ids=[row[0] for row in hostile_files.CORPUS]
)
def test_corpus_is_refused(empty, data, says):
    minires.interop  # noqa: B018  (imported, before what is imported is looked at)
    (empty / "x.pth").write_bytes(data)
    before = set(sys.modules)
    with pytest.raises(CheckpointError) as caught:
        minires.load("x.pth")
    message = str(caught.value)
    assert re.search(says, message) and message.startswith("x.pth") and "\n" not in message and len(message) < 400
    assert set(sys.modules) == before
    assert [p.name for p in empty.iterdir()] == ["x.pth"]
    at = re.search(r"byte (\d+)", message)
    assert at is None or int(at[1]) <= len(data)


def test_corpus_is_long_and_its_good_files_are_read(empty):
    assert len(hostile_files.CORPUS) > 300 and len({row[0] for row in hostile_files.CORPUS}) == len(
        hostile_files.CORPUS
    )
    for data in (
        hostile_files.GOOD,
        hostile_files.STREAM,
        hostile_files.head({"a": hostile_files.entry()}),
    ):  # else a refusal shows nothing
        (empty / "x.pth").write_bytes(data)
        ((_, tensor),) = minires.load("x.pth").items()
        assert tensor.shape == (4,) and not tensor.array.any()


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_files_are_read_or_refused(seed):
    """`python -m benchmarks fuzz` does this with 100,000."""
    out = run(2000, seed)
    assert not out.bugs and out.refused > 1500 and out.read > 10
    assert out.slowest[0] < 5


def test_memory_of_bombs_is_bounded(empty):
    """At worst that of a million containers, one for each opcode that is read: measured in a process of its own."""
    pytest.importorskip("resource", reason="measures memory as Unix does")
    for number, (name, data, _) in enumerate(hostile_files.CORPUS):
        if "bomb" in name:
            (empty / f"{number}.pth").write_bytes(data)
    code = """
import resource, pathlib
from minires.interop import load
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for path in pathlib.Path().iterdir():
    try:
        load(path)
        print(path, "was read")
    except ValueError:
        pass
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(out) == 1 and int(out[0]) < 200e3 * (1024 if sys.platform == "darwin" else 1), out  # kB; there, bytes


def test_memory_of_large_claims_is_that_of_the_file(empty):
    """Terabytes are claimed; what is allocated is less than the megabyte of the file twice over."""
    huge = hostile.zipped(hostile.program(hostile.tensor((2**40,), where=hostile.storage(2**40))), {"0": bytes(2**20)})
    good = hostile.zipped(hostile.program(hostile.tensor((2**18,), where=hostile.storage(2**18))), {"0": bytes(2**20)})
    for data, fails in ((huge, True), (good, False)):
        (empty / "x.pth").write_bytes(data)
        minires.interop  # noqa: B018
        tracemalloc.start()
        try:
            minires.load("x.pth")
            assert not fails
        except CheckpointError:
            assert fails
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2.2 * len(data), peak


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices of Unix")
def test_only_regular_files_are_read(empty):
    os.mkfifo(empty / "pipe")
    reader = os.open(empty / "pipe", os.O_RDWR)  # else opening it would wait for a writer
    try:
        for path in ("pipe", "/dev/zero", "."):
            with pytest.raises(OSError):
                minires.load(path)
    finally:
        os.close(reader)


def test_command_line_says_it_in_one_line(empty, capsys):
    (empty / "x.pth").write_bytes(hostile.zipped(hostile.EXECUTES["os.system"], {}))
    assert main(["export", "--weights", "x.pth", "--model", "resnet20", "--format", "torch", "--out", "y.pth"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"minires: error: x\.pth: refused at byte \d+: it asks for 'os\.system'[^\n]*\n", error), error
    assert [p.name for p in empty.iterdir()] == ["x.pth"]
