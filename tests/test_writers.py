"""The records of a run: rows in three kinds of files, and what a resumed run finds."""

import csv
import json
import sys

import numpy as np
import pytest

from minires.train.writers import open_writers, read_rows


def row(step, **more):
    return {"step": step, "loss": 1 / (step + 1), **more}


def table(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.reader(file))


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_lines_and_table_hold_the_same_rows(tmp_path):
    with open_writers(tmp_path) as writers:
        assert names(tmp_path) == []  # nothing before the first row
        for step in (1, 2, 2, 5):
            writers.add(row(step, note='a, "b"\nü'))
            assert read_rows(tmp_path / "metrics.jsonl")[-1]["step"] == step  # on the disk at once
    assert names(tmp_path) == ["metrics.csv", "metrics.jsonl"]
    rows = [row(step, note='a, "b"\nü') for step in (1, 2, 2, 5)]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()] == rows
    head, *lines = table(tmp_path)
    assert head == ["step", "loss", "note"]
    assert [[int(a), float(b), c] for a, b, c in lines] == [list(r.values()) for r in rows]  # every digit of a float


def test_columns_stay_and_new_ones_come_last(tmp_path):
    writers = open_writers(tmp_path)
    writers.add({"step": 1, "b": 1})
    writers.add({"a": 3, "step": 2})
    writers.add({"b": 5, "step": 3})
    assert table(tmp_path) == [["step", "b", "a"], ["1", "1", ""], ["2", "", "3"], ["3", "5", ""]]


def test_numbers_of_numpy_and_numbers_that_are_none(tmp_path):
    open_writers(tmp_path).add(
        {"step": np.int64(3), "loss": np.float32(0.5), "speed": float("nan"), "lr": float("inf"), "best": True}
    )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: 1 / 0) == {
        "step": 3,
        "loss": 0.5,
        "speed": None,
        "lr": None,
        "best": True,
    }
    assert table(tmp_path)[1] == ["3", "0.5", "", "", "True"]


@pytest.mark.parametrize("tensorboard", [False, True])
@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "lo', b'{"step": 6, "loss": 0.1}', b"\xff\x00"])
def test_resume_leaves_no_gap_and_no_repetition(tmp_path, torn, tensorboard):
    if tensorboard:
        pytest.importorskip("tensorboardX")
    writers = open_writers(tmp_path, tensorboard)  # killed: never closed
    for step in range(1, 6):
        writers.add(row(step))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    with open_writers(tmp_path, tensorboard) as resumed:
        assert [r["step"] for r in resumed.rows()] == [1, 2, 3, 4, 5]
        resumed.truncate_to(3)
        assert [line[0] for line in table(tmp_path)] == ["step", "1", "2", "3"]
        for step in range(4, 8):
            resumed.add(row(step))
    uninterrupted = tmp_path / "whole"
    uninterrupted.mkdir()
    with open_writers(uninterrupted) as whole:
        for step in range(1, 8):
            whole.add(row(step))
    for name in ("metrics.jsonl", "metrics.csv"):
        assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes()
    if tensorboard:
        assert scalars(tmp_path) == {"loss": [(step, np.float32(1 / (step + 1))) for step in range(1, 8)]}


def test_truncate_to_the_start(tmp_path):
    writers = open_writers(tmp_path)
    writers.add(row(4))
    writers.truncate_to(0)
    assert writers.rows() == [] and (tmp_path / "metrics.csv").read_text() == ""
    writers.add({"step": 1, "other": 2})
    assert table(tmp_path) == [["step", "other"], ["1", "2"]]


def scalars(folder):
    """What TensorBoard would show: (step, value) by name, from the records of the event files."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # length (8 bytes), its checksum (4), event, its checksum (4)
            n = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + n])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, np.float32(value.simple_value)))
            data = data[16 + n :]
    return found


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    with open_writers(tmp_path, tensorboard=True) as writers:
        writers.add(row(1, speed=float("nan"), note="no number"))
        writers.add(row(2, accuracy=0.25))
    assert names(tmp_path) == ["metrics.csv", "metrics.jsonl", "tensorboard"]
    assert scalars(tmp_path) == {
        "loss": [(1, np.float32(1 / 2)), (2, np.float32(1 / 3))],
        "accuracy": [(2, np.float32(0.25))],
    }


def test_without_tensorboardx_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(RuntimeError, match=r"^tensorboard needs tensorboardX: pip install 'minires\[tensorboard\]'$"):
        open_writers(tmp_path, tensorboard=True)
    assert names(tmp_path) == []
    open_writers(tmp_path).add(row(1))


@pytest.mark.parametrize("bad", [{"loss": 1.0}, {"step": "3"}, {"step": 2.5}, {"step": 1}, {"step": None}])
def test_a_row_without_a_step_in_order_is_refused(tmp_path, bad):
    writers = open_writers(tmp_path)
    writers.add(row(2))
    with pytest.raises(ValueError, match=r"a row's step must be a whole number from 2, not"):
        writers.add(bad)
    assert writers.rows() == [row(2)]


def test_a_full_disk_leaves_whole_rows(tmp_path):
    """The system refuses to let files grow beyond a size: what would not fit whole is not there at all."""
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    writers = open_writers(tmp_path)
    for step in range(1, 4):
        writers.add(row(step))
    before, limit = (tmp_path / "metrics.jsonl").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limit[1]))
        for _ in range(2):
            with pytest.raises(OSError):
                writers.add(row(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    writers.add(row(4))
    assert [line[0] for line in table(tmp_path)] == ["step", "1", "2", "3", "4"]


@pytest.mark.parametrize("line", [b"{]", b"[1]", b"{}", b'{"step": "x"}', b"\xff"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not a row of metrics .*; remove the line"):
        open_writers(tmp_path)
    assert path.read_bytes().count(b"\n") == 3 and names(tmp_path) == ["metrics.jsonl"]
