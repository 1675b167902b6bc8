"""The interpreter against what hardware answered: the golden outputs in the reports of `benchmarks/results`."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu_primitives
from benchmarks.gpu_primitives import PRIMITIVES, difference, drawn, golden, interpreted, primitives

REPORTS = sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("gpu-*.jsonl"))


def test_the_interpreter_answers_as_hardware_did():
    found = 0
    for report in REPORTS:
        for line in map(json.loads, report.read_text().splitlines()):
            for name, primitive, answer in golden(line) if line["unit"].startswith("primitives/") else ():
                found += 1
                off = difference(primitive, interpreted(primitive, drawn(primitive)), answer)
                assert off <= primitive.allowed, f"{name} on {line['gpu']}"
    if not found:
        pytest.skip("no report of a GPU lies in benchmarks/results yet")


@pytest.mark.parametrize("group", PRIMITIVES)
def test_every_primitive_answers_something(group, monkeypatch):
    """With the interpreter in the hardware's place: the rows are golden outputs that it stands up to."""
    monkeypatch.setattr(gpu_primitives, "on_device", interpreted)
    rows = list(primitives(group))
    assert [row["primitive"] for row in rows] == list(PRIMITIVES[group])
    for name, primitive, answer in golden({"rows": json.loads(json.dumps(rows))}):
        assert len(np.unique(answer)) > 3 or name == "vote.ballot", name
        assert not any("nan" in repr(row["difference"]) for row in rows)
        assert np.array_equal(answer, interpreted(primitive, drawn(primitive)))


def test_hardware_that_answers_otherwise_fails_the_unit(monkeypatch):
    """The planted faults: one bit of a result; a sum that is rounded more than is allowed."""

    def flipped(primitive, words):
        answer = interpreted(primitive, words)
        answer[7, 0] ^= 1
        return answer

    monkeypatch.setattr(gpu_primitives, "on_device", flipped)
    with pytest.raises(RuntimeError, match=r"not like the hardware in mul\.hi\.u64, .*lop3"):
        list(primitives("integers"))
    one = PRIMITIVES["matrices"]["mma bf16, rounding"]
    right = interpreted(one, drawn(one))
    assert difference(one, flipped(one, drawn(one)), right) <= one.allowed
    wrong = (right.view(np.float32) * np.float32(1 + 2**-12)).view(np.uint32)
    assert difference(one, wrong, right) > one.allowed
