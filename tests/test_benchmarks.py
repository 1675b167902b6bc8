"""`python -m benchmarks` checks, times and writes what it measured with its provenance."""

import csv
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from PIL import Image

import benchmarks.__main__ as command_line
from benchmarks import accuracy, layers, provenance, readme, roofline, turns
from benchmarks.networks import _differences
from benchmarks.peaks import Peaks
from benchmarks.worker import Worker, burst

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


def test_kernels_are_checked_then_ranked(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    output = tmp_path / "relu.csv"
    options = ("--case", "cifar_stage3", "--seconds", 0.01, "--kernels", tmp_path / "wrong.py", "--output", output)
    done = _run("relu_fprop", *options)
    assert done.returncode == 0, done.stderr
    rows = {row["kernel"]: row for row in _rows(output)}
    ours, wrong = rows["relu_fprop_numba"], rows["never_timed"]
    assert ours["verdict"] == "right" and int(ours["n"]) >= 5
    assert float(ours["p20_ms"]) <= float(ours["median_ms"]) <= float(ours["p80_ms"])
    assert 0 < float(ours["of_floor"]) and float(ours["fma_gflop_per_s"]) > 0
    assert wrong["verdict"].startswith("wrong value") and not wrong["median_ms"]


def test_gradient_error_is_measured_and_drawn(tmp_path):
    output = tmp_path / "error.csv"
    done = _run(*"gradient-error resnet20 --batch 2 --size 8 --draws 1 --no-peer --output".split(), output)
    assert done.returncode == 0, done.stderr
    errors = {(row["variant"], row["layer"]): float(row["error"]) for row in _rows(output)}
    assert len(errors) == 3 * 19 and (tmp_path / "error.png").stat().st_size > 10_000
    for layer in {layer for _, layer in errors}:
        assert 0 < errors["minires exact", layer] < 0.1 < errors["minires bf16", layer] + 0.1 < 2


def test_the_convolution_that_dispatch_chooses_is_timed(tmp_path):
    output = tmp_path / "conv.csv"
    done = _run("conv2d_wgrad", "--case", "resnet20_3x3_64to64_8", "--seconds", 0.05, "--output", output)
    assert done.returncode == 0, done.stderr
    chosen = [row for row in _rows(output) if row["chosen"] == "1"]
    assert len(chosen) == 1 and chosen[0]["verdict"] == "right" and chosen[0]["network"] == "resnet20"
    assert int(chosen[0]["flops"]) == 2 * 128 * 64 * 8 * 8 * 64 * 9


def test_networks(tmp_path):
    output = tmp_path / "networks.csv"
    small = ("--only", "resnet20", "--precision", "fp32", "--batch", 2, "--size", 8, "--peers", "none")
    done = _run("networks", *small, "--seconds", 0.1, "--least", 2, "--output", output)
    assert done.returncode == 0, done.stderr
    rows = _rows(output)
    assert [row["what"] for row in rows] == ["train", "infer"]
    assert all(float(row["images_per_s"]) > 0 and float(row["ratio"]) == 1 for row in rows)
    done = _run("networks", *small, "--what", "memory", "--output", tmp_path / "memory.csv")
    assert done.returncode == 0, done.stderr
    assert float(_rows(tmp_path / "memory.csv")[0]["peak_mib"]) > 0


def test_a_profile_tells_every_kernel_and_the_rest(tmp_path):
    output = tmp_path / "profile.csv"
    done = _run(*"profile resnet20 --batch 2 --size 8 --steps 3 --output".split(), output)
    assert done.returncode == 0, done.stderr
    *kernels, rest, whole = _rows(output)
    assert (rest["problem"], whole["problem"]) == ("outside of kernels", "the step")
    ms = [float(row["ms"]) for row in (*kernels, rest)]
    assert min(ms[:-1]) > 0 and sum(ms) == pytest.approx(float(whole["ms"]), rel=1e-2)
    assert ms[:-1] == sorted(ms[:-1], reverse=True)
    several = dict(fprop=("conv2d_fprop", "conv2d_genstats"), dgrad=("conv2d_dgrad", "conv2d_dgrad_add"))
    for direction, calls in (("fprop", 19), ("dgrad", 18), ("wgrad", 19)):
        rows = [row for row in kernels if row["problem"] in several.get(direction, ("conv2d_wgrad",))]
        assert sum(int(row["calls"]) for row in rows) == calls
    stem = next(row for row in kernels if row["shapes"] == "2x3x8x8 16x3x3x3")
    assert int(stem["flops"]) == 2 * 2 * 16 * 8 * 8 * 27 and int(stem["bytes"]) == 4 * (2 * 19 * 64 + 16 * 27)
    assert "outside of kernels" in done.stdout and "of floor" in done.stdout


def test_a_profile_of_inference_is_of_its_recording(tmp_path):
    output = tmp_path / "profile.csv"
    done = _run(*"profile resnet20 --what infer --batch 2 --size 8 --steps 3 --output".split(), output)
    assert done.returncode == 0, done.stderr
    convolutions = [row for row in _rows(output) if row["problem"] == "conv2d_bias_act"]
    assert sum(int(row["calls"]) for row in convolutions) == 19


def test_memory(tmp_path):
    output = tmp_path / "memory.csv"
    done = _run("memory", "resnet20:2:0,1", "--steps", 1, "--no-peer", "--output", output)
    assert done.returncode == 0, done.stderr
    assert [row["blocks_again"] for row in _rows(output)] == ["0", "1"]


@pytest.mark.peers
def test_peers_compute_the_same(tmp_path):
    pytest.importorskip("torch")
    output = tmp_path / "networks.csv"
    small = ("--only", "resnet20,resnet50", "--precision", "fp32", "--batch", 8, "--size", 64)
    peers = ("--peers", "torch,torch_channels_last,onnxruntime,openvino", "--seconds", 0, "--least", 1)
    done = _run("networks", *small, *peers, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "computes something else" not in done.stdout
    found = {(row["model"], row["what"], row["library"]) for row in _rows(output)}
    assert {(m, w, "torch") for m in ("resnet20", "resnet50") for w in ("train", "infer")} <= found


@pytest.mark.parametrize(
    "arguments",
    [
        ("conv9d",),
        ("conv2d", "--device", "tpu"),
        ("conv2d", "--network", "resnet19"),
        ("relu_fprop", "--case", "nowhere"),
        ("relu", "--kernels", "no.py"),
        ("networks", "--only", "resnet19"),
        ("networks", "--what", "nothing"),
        ("networks", "--device", "tpu"),
        ("memory", "resnet20"),
        ("profile", "resnet19"),
        ("profile", "resnet20", "--what", "nothing"),
        ("profile", "resnet20", "--steps", 0),
    ],
)
def test_bad_input_is_one_line(arguments):
    done = _run(*arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("benchmarks: ")


@pytest.mark.parametrize("network, convolutions, macs", [("resnet18", 20, 1.81e9), ("resnet50", 53, 4.09e9)])
def test_layers_are_those_of_the_network(network, convolutions, macs):
    found = layers.layers(network, batch=1)
    assert sum(layer.count for layer in found) == convolutions
    assert [layer.first for layer in found].count(True) == 1 and found[0].first
    flops = sum(layer.count * layers.work("conv2d_fprop", layer.case)[0] for layer in found)
    assert flops == pytest.approx(2 * macs, rel=0.01)


def test_the_floor_is_that_of_the_slower_resource():
    slow_copy, slow_fma = Peaks({32: 1e30}, 1e9, 0), Peaks({32: 1e9, 16: 1e8}, 1e30, 0)
    case = layers.layers("resnet20", batch=1)[0].case
    moved = 4 * (3 * 32 * 32 + 16 * 32 * 32 + 16 * 3 * 9)
    assert layers.work("conv2d_fprop", case) == (2 * 16 * 27 * 32 * 32, moved)
    assert slow_copy.floor(*layers.work("conv2d_fprop", case)) == pytest.approx(moved / 1e9)
    assert slow_fma.floor(*layers.work("conv2d_fprop", case)) == pytest.approx(2 * 16 * 27 * 32 * 32 / 1e9)
    infer, train = (layers.floor_seconds("resnet20", 1, 32, slow_fma, training) for training in (False, True))
    first = 2 * 16 * 27 * 32 * 32 / 1e9
    assert train == pytest.approx(3 * infer - first), "dgrad of the first layer is not needed"


def test_rivals_take_turns_and_ratios_are_of_one_round():
    order = []
    times = {"a": iter([1.0, 3.0, 2.0]), "b": iter([2.0, 2.0, 8.0])}

    def rival(name):
        return lambda seconds: order.append(name) or next(times[name])

    samples = turns.in_turn({name: rival(name) for name in "ab"}, 0, 0, 0, least=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert turns.best(samples, ["a", "b"]) in ("a", "b") and turns.best(samples, []) is None
    assert turns.ratio(samples, "a", "b").median == 0.5
    calls = []
    assert burst(lambda: calls.append(0), 0.0) > 0 and len(calls) == 1


def test_a_worker_that_fails_says_what_it_printed():
    worker = Worker("benchmarks.contestants", "no_such_library", "train", "fp32", "resnet20", 1, 8, 1)
    with pytest.raises(RuntimeError, match=r"(?s)ended with code 1.*KeyError: 'no_such_library'"):
        worker.read()
    worker.close()


def test_what_disagrees_is_seen():
    ours = {"loss": [1.0], "w": [3.0, 4.0]}
    assert _differences(ours, {"loss": [1.5], "w": [3.0, 4.5]}) == pytest.approx((0.5, 0.1))
    assert _differences(ours, {"loss": [1.0]}) == (float("inf"), float("inf"))
    assert not _differences(ours, {"loss": [float("nan")], "w": [3.0, 4.0]})[0] <= 1


def test_results_of_other_layers_stay_in_the_file(tmp_path):
    output = tmp_path / "r.csv"
    group = ("case",)
    provenance.write("r", [{"case": "a", "kernel": "old", "ms": 1}, {"case": "b", "kernel": "k", "ms": 2}], 1, output)
    provenance.write("r", [{"case": "a", "kernel": "new", "ms": 3}], 1, output, group)
    assert [(r["case"], r["kernel"], r["ms"]) for r in _rows(output)] == [("b", "k", "2"), ("a", "new", "3")]
    provenance.write("r", [{"case": "a", "other": 1}], 1, output, group)
    assert len(_rows(output)) == 1, "rows with other columns are of another version of the benchmark"


def test_the_readme_says_what_the_results_say():
    text = readme.README.read_text(encoding="utf-8")
    assert readme.replaced(text, readme.tables()) == text, "run python -m benchmarks readme"
    with pytest.raises(ValueError, match=r"README.md has no line '<!-- speeds"):
        readme.replaced("", "")


def test_tables_name_machine_peer_and_ratio(tmp_path):
    row = dict(model="resnet20", batch=128, size=32, what="train", precision="fp32", n=5, median_ms="100", p20_ms="99")
    row |= dict(p80_ms="101", images_per_s="1280", ratio_p20="0.4", ratio_p80="0.6", floor_ms="50")
    rows = [
        {**row, "library": "minires", "best": 0, "ratio": "1", "of_floor": "0.5"},
        {**row, "library": "torch", "best": 1, "ratio": "0.5", "of_floor": "0.25", "median_ms": "200"},
    ]
    provenance.write("networks", rows, 2, tmp_path / "networks-x-2t.csv")
    text = readme.tables(tmp_path)
    assert "| ResNet-20, batch 128, 32x32, training step, fp32 | 100 ms | torch | 200 ms |" in text
    assert "**0.50** (0.40 to 0.60, n=5) | 50% |" in text and "2 threads" in text
    assert readme.tables(tmp_path / "none") == "\nNothing is measured yet.\n"


def test_roofline(tmp_path):
    rows = []
    for i, problem in enumerate(("conv2d_fprop", "conv2d_dgrad", "conv2d_wgrad", "relu_fprop")):
        common = dict(problem=problem, case="c", network="resnet20", flops="1000000", bytes=str(10000 * (i + 1)))
        common |= dict(fma_gflop_per_s="500", copy_gbyte_per_s="50", cpu="a machine", threads="2")
        rows += [
            {**common, "kernel": "ours", "chosen": "1", "median_ms": "1", "gflop_per_s": "300"},
            {**common, "kernel": "torch", "chosen": "0", "median_ms": "2", "gflop_per_s": "150"},
        ]
    roofline.draw(rows, tmp_path / "roof.png")
    from PIL import Image

    with Image.open(tmp_path / "roof.png") as image:
        assert image.width > 800 and np.asarray(image.convert("L")).std() > 10
    with pytest.raises(ValueError, match="no times of convolutions"):
        roofline.draw(rows[-1:], tmp_path / "none.png")


@pytest.mark.peers
def test_pytorch_convolves_by_onednn_in_all_directions():
    pytest.importorskip("torch")
    code = (
        "import torch\n"
        "x, w = torch.randn(2, 16, 32, 32).requires_grad_(), torch.randn(16, 16, 3, 3).requires_grad_()\n"
        "for layout in (torch.contiguous_format, torch.channels_last):\n"
        "    torch.conv2d(x.to(memory_format=layout), w.to(memory_format=layout), None, 1, 1).sum().backward()"
    )
    environment = os.environ | {"ONEDNN_VERBOSE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("primitive,exec,cpu,convolution") == 6


def test_transfer(tmp_path):
    """Ten classes of noise, in an archive as that of the real images."""
    _noise(tmp_path / "images.tar")
    done = _run("transfer", "--quick", "--data", tmp_path / "images.tar", "--output", tmp_path / "transfer.csv")
    assert done.returncode == 0, done.stderr
    (row,) = _rows(tmp_path / "transfer.csv")
    assert all(0 <= float(row[name]) <= 1 for name in ("scratch", "pixels", "probe", "finetuned"))
    assert len(row["new_classes"].split()) == 3 and "fine-tuned is better by" in done.stdout


def test_accuracy_is_compared_and_finished_runs_are_not_done_again(tmp_path):
    _noise(tmp_path / "images.tar", one_in=20)
    options = ("--seeds", "3", "--epochs", "1", "--folder", tmp_path / "runs", "--output", tmp_path / "accuracy.csv")
    done = _run("accuracy", "--data", tmp_path / "images.tar", *options)
    assert done.returncode in (0, 1), done.stderr  # one seed spans nothing, and noise teaches nothing
    rows = _rows(tmp_path / "accuracy.csv")
    assert [row["arithmetic"] for row in rows] == ["exact", "winograd", "bf16"]
    assert len({row["test_loss"] for row in rows}) == 3, "three arithmetics round alike"
    again = _run("accuracy", "--data", tmp_path / "images.tar", *options)
    assert again.returncode == done.returncode and "seed 3:" in done.stdout and "seed 3:" not in again.stdout


@pytest.mark.parametrize("seeds", [("--seeds", "0", "1", "2"), ("--seeds", "0", "--seeds", "1", "--seeds=2")])
def test_several_values_follow_one_flag_or_one_each(seeds):
    command, bound, _ = command_line.app.parse_args(["accuracy", *seeds, "--arithmetic", "exact", "bf16"])
    assert command is accuracy.accuracy
    assert bound.arguments == {"seeds": (0, 1, 2), "arithmetic": ("exact", "bf16")}


def test_accuracy_is_judged():
    def row(name, share):
        return {"arithmetic": name, "test_accuracy": str(share)}

    exact = [row("exact", share) for share in (0.85, 0.86)]
    assert accuracy.judge([*exact, row("winograd", 0.855), row("bf16", 0.846)]) == 0
    assert accuracy.judge([*exact, row("winograd", 0.849)]) == 1
    assert accuracy.judge([*exact, row("bf16", 0.844)]) == 1


def _noise(path, one_in=50):
    with tarfile.open(path, "w") as tar:
        for name in (f"{part}/c{k}/{i}.png" for part in ("train", "test") for k in range(10) for i in range(500)):
            if crc32(name.encode()) % one_in == 0:  # of 50: those that `transfer --quick` takes
                pixels = np.random.default_rng(crc32(name.encode())).integers(0, 256, (32, 32, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(stream := io.BytesIO(), "PNG")
                info = tarfile.TarInfo(name)
                info.size = stream.tell()
                stream.seek(0)
                tar.addfile(info, stream)
