"""`python -m benchmarks` checks, times and writes what it measured with its provenance."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WRONG = """
from minires.kernels.registry import kernel, problem

@kernel(problem("relu_fprop"), device="cpu", step=1, note="wrong", dtypes=("any",))
def never_timed(x):
    return abs(x)
"""


def _run(*arguments):
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def _rows(path):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and all(row["cpu"] and row["numpy"] and row["date"] and row["threads"] for row in rows)
    return rows


def test_kernels_are_checked_then_timed(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    output = tmp_path / "relu.csv"
    options = ("--case", "cifar_stage3", "--seconds", 0.01, "--kernels", tmp_path / "wrong.py", "--output", output)
    done = _run("relu_fprop", *options)
    assert done.returncode == 0, done.stderr
    rows = {row["kernel"]: row for row in _rows(output)}
    ours, wrong = rows["relu_fprop_numba"], rows["never_timed"]
    assert ours["verdict"] == "right" and int(ours["n"]) >= 5
    assert float(ours["p20_ms"]) <= float(ours["median_ms"]) <= float(ours["p80_ms"])
    assert wrong["verdict"].startswith("wrong value") and not wrong["median_ms"]


def test_networks(tmp_path):
    output = tmp_path / "networks.csv"
    done = _run("networks", "--batch", 2, "--size", 8, "--rounds", 2, "--steps", 1, "--output", output)
    assert done.returncode == 0, done.stderr
    assert float(_rows(output)[0]["median_images_per_s"]) > 0


@pytest.mark.parametrize(
    "arguments", [("conv9d",), ("relu_fprop", "--case", "nowhere"), ("relu", "--kernels", "no.py")]
)
def test_bad_input_is_one_line(arguments):
    done = _run(*arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("benchmarks: ")
