"""`python -m benchmarks networks --device cuda` without a GPU: its tables, file and errors; what it runs is tested in
test_gpu_report.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_networks, readme
from benchmarks.networks import networks
from benchmarks.provenance import read

SPEED = {"minires_amp_one_op_graph": 300.0, "minires_amp_graph": 250.0, "torch_amp": 100.0, "torch_amp_compiled": 200.0}


@pytest.fixture
def asked(monkeypatch):
    """Units that were run, each at a made-up speed; one library fails, one is not installed."""
    units = []

    def run(unit, seconds):
        units.append(unit.name)
        library = unit.argument.split(":")[0]
        if library == "minires":
            return False, [{"library": library}], "exit code 1: RuntimeError: it broke"
        if library == "torch":
            return True, [{"library": library, "skipped": "PyTorch is not installed"}], ""
        speed = SPEED.get(library, 50.0)
        row = {"library": library, "model": "resnet20", "batch": 128, "n": 5, "images_per_s": speed, "first": [1.0]}
        return True, [row | {"p20_ms": 0.9, "median_ms": 1.0, "p80_ms": 1.1, "version": "1"}], ""

    monkeypatch.setattr(gpu_networks, "in_process", run)
    monkeypatch.setattr(gpu_networks, "gpu_name", lambda: "Stand-In 1")
    monkeypatch.setattr(gpu_networks, "driver", lambda: "13.0")
    monkeypatch.setattr(gpu_networks, "clocks", lambda: "1980 MHz, 2619 MHz")
    return units


def test_tables_are_printed_written_and_put_into_the_readme(asked, tmp_path, capsys):
    output = tmp_path / "networks-stand-in-1.csv"
    networks(device="cuda", only="resnet20", batch=128, what="train,infer", output=output)
    said, rows = capsys.readouterr().out, read(output)
    assert asked[0] == "training/minires_graph:resnet20:128:15" and len(asked) == len(set(asked)) == 17
    assert {(row["what"], row["precision"]) for row in rows} == {
        (w, p) for w in ("train", "infer") for p in ("fp32", "bf16")
    }
    train = [row for row in rows if (row["what"], row["precision"]) == ("train", "bf16")]
    assert [row["library"] for row in train[:2]] == ["minires_amp_one_op_graph", "minires_amp_graph"]
    assert train[0]["over_best_peer"] == "1.5" and train[0]["clocks"] == "1980 MHz, 2619 MHz"
    assert [row["library"] for row in train if row["best"] == "1"] == ["torch_amp_compiled"]
    assert "minires: skipped, exit code 1: RuntimeError: it broke" in said and "torch: skipped, PyTorch is not" in said
    assert "1.50 of the best peer's" in said and str(output) in said
    table = readme.tables(tmp_path)
    assert "Stand-In 1, driver 13.0; commit" in table
    line = (
        "| ResNet-20, batch 128, 32x32, training step, bf16 | minires_amp_one_op_graph | 300.0 | torch_amp_compiled |"
    )
    assert f"{line} 200.0 | **1.50** |" in table
    networks(device="cuda", only="resnet20", batch=128, what="train", precision="bf16", peers="none", output=output)
    again = read(output)
    assert len(again) == len(rows) - 2, "the table that was measured again takes the place of the old one"
    assert "networks --device cuda" not in readme.tables(tmp_path)


def test_peers_are_chosen_and_seconds_shared(asked, tmp_path):
    options = dict(device="cuda", only="resnet50", batch=64, what="train", precision="bf16")
    networks(**options, peers="torch_amp", seconds=8.0, output=tmp_path / "x.csv")
    assert [name.split(":")[0] for name in asked] == [
        f"training/{name}" for name in ("minires_amp_one_op_graph", "minires_amp_graph", "torch_amp", "minires_amp")
    ]
    assert {name.split(":", 1)[1] for name in asked} == {"resnet50:64:2"}


def test_nothing_measured_is_an_error(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_networks, "in_process", lambda unit, seconds: (False, [], "it broke"))
    with pytest.raises(RuntimeError, match="nothing could be measured"):
        networks(device="cuda", only="resnet20", batch=128, what="infer", precision="fp32", output=tmp_path / "x.csv")


MISTAKES = {
    "memory": (dict(what="train,memory"), "--what memory is measured on the CPU alone"),
    "batch": (dict(only="resnet20", batch=7), "nothing to time on 'cuda' for resnet20 at batch 7"),
    "peer": (dict(peers="onnxruntime"), "--peers 'onnxruntime' is not one of torch, torch_amp"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name, asked):
    options, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        networks(device="cuda", **options)


def test_without_a_gpu_it_says_so():
    import minires

    if minires.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "benchmarks", "networks", "--device", "cuda"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("benchmarks: device cuda:0 needs ") and done.stderr.count("\n") == 1
