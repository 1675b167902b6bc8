"""Stepping through a launch: the record, how it is shown, and the command."""

import numpy as np
import pytest
from minires.kernels.interpreter import __main__ as command
from minires.kernels.interpreter import record
from minires.kernels.interpreter.step import EXAMPLE, numbers, ranges

TEXT = EXAMPLE.read_text()


def _record(threads=64, **settings):
    x, total = np.arange(64, dtype=np.float32), np.zeros(1, np.float32)
    return record(TEXT, "block_sum", [1], [threads], [x, total], **settings), total


@pytest.mark.parametrize("seed", [None, 0])
def test_record_has_the_state_after_every_instruction(seed):
    moments, total = _record(seed=seed)
    assert total[0] == 2016 and moments[-1].fault is None
    loads = [m for m in moments if m.instruction == "ld.global.nc.f32 %f2, [%rd6]"]
    assert sum(m.lanes.sum() for m in loads) == 64
    assert loads[-1].as_type("%f2", "f32").tolist() == list(range(64)) and "%f2" in loads[-1].written
    before, after = loads[0], [m for m in moments if m.instruction == "bar.sync 0"][-1]
    assert np.isnan(before.shared.view(np.float32)).all()
    assert after.shared.view(np.float32).tolist() == [list(range(64))]
    shuffles = [m for m in moments if m.instruction.startswith("shfl")]
    assert [int(m.lanes.sum()) for m in shuffles] == [32] * 5 and moments[0].where == "block_sum.cu:4"
    assert "%r7" in moments[-1].registers and "%r7" not in loads[-1].registers
    with pytest.raises(KeyError, match="%r7 was not written yet"):
        loads[0].as_type("%r7")


def test_a_fault_ends_the_record():
    moments, _ = _record(threads=96)
    assert moments[-1].fault is not None and moments[-1].fault.kind == "out of bounds"
    assert moments[-1].instruction.startswith("ld.global.nc")


def test_how_lanes_and_numbers_are_shown():
    lanes = np.zeros(40, bool)
    lanes[[0, 1, 2, 7, 30, 31]] = True
    assert ranges(lanes) == "0-2, 7, 30-31" and ranges(lanes & False) == "none"
    assert numbers(np.arange(40), lanes) == "0 1 2 7 30 31"
    assert numbers(np.full(40, 2.5), lanes) == "2.5 in every lane"
    assert numbers(np.arange(40), np.ones(40, bool), 2) == "0 1 … (40 lanes)"


def test_command_prints_all_steps(capsys):
    assert command.main(["--all"]) == 0
    out = capsys.readouterr().out
    assert "block_sum.cu:7       sums[t] = x[t];" in out and "shared memory of block 0: 0 1 2 3" in out
    assert "argument 1 afterwards: [2016.]" in out


def test_command_says_what_went_wrong(capsys, tmp_path):
    assert command.main(["--all", "--block", "96"]) == 1
    assert "FAULT out of bounds: thread (64, 0, 0)" in capsys.readouterr().out
    for arguments, message in (
        (["--args", "f32"], "write TYPE:SIZE"),
        (["--args", "f32:3"], "2 parameters, and 1 are given"),
        (["--kernel", "other"], "no kernel 'other'; it has block_sum"),
        ([str(tmp_path / "absent.ptx")], "No such file"),
        (["--block", "0"], "at least 1"),
    ):
        assert command.main(["--all", *arguments]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_command_walks_forwards_and_backwards(capsys, monkeypatch):
    keys = iter(["", "", "b", "l", "p %r1", "m", "c", "p %f1 f32", "q"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(keys))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert command.main([]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line[:4].strip().isdigit()]
    numbers = [int(line[:4]) for line in shown]
    assert numbers[:4] == [0, 1, 2, 1] and numbers[4] == 2 and numbers[-1] == numbers[-2] > 40


def test_command_takes_a_file_and_numbers(tmp_path, capsys):
    path = tmp_path / "mine.ptx"
    path.write_text(TEXT.replace("block_sum.cu", "mine.cu"))
    assert command.main([str(path), "--args", "f32:64=2", "f32:1=0"]) == 0
    assert "[128.]" in capsys.readouterr().out
