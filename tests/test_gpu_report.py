"""The report for a machine with a GPU, as far as it goes without one: its units, its budget, its resumption."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from device_double import install
from needs import nvrtc

from benchmarks.gpu_report import Report, Unit, go, in_process, main, units

WHERE = {"commit": "abc", "gpu": "none"}
UNITS = [Unit("a", "one", 10), Unit("a", "two", 10), Unit("b", "one", 100)]


class Clock:
    """Time that passes only when a unit runs."""

    def __init__(self, each):
        self.now, self.each, self.ran = 0.0, each, []

    def __call__(self):
        return self.now

    def execute(self, unit, seconds):
        self.ran.append(unit.name)
        self.now += self.each
        return unit.name != "a/two", [{"rows_of": unit.name}], "" if unit.name != "a/two" else "exit code 1: it broke"


def test_it_goes_on_with_what_is_missing(tmp_path, capsys):
    path, clock = tmp_path / "deep" / "report.jsonl", Clock(1)
    assert go(Report(path, WHERE), UNITS, 100, clock.execute, clock) == 1
    assert clock.ran == ["a/one", "a/two", "b/one"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["unit"], line["ok"], line["gpu"]) for line in lines] == [
        ("a/one", True, "none"),
        ("a/two", False, "none"),
        ("b/one", True, "none"),
    ]
    assert lines[1]["error"] == "exit code 1: it broke" and lines[0]["rows"] == [{"rows_of": "a/one"}]
    again = Clock(1)
    go(Report(path, WHERE), UNITS, 100, again.execute, again)
    assert again.ran == ["a/two"], "what failed is tried again, what is done is not"
    other = Clock(1)
    go(Report(path, WHERE | {"commit": "def"}), UNITS, 100, other.execute, other)
    assert len(other.ran) == 3, "another commit starts afresh"
    assert "a/two: FAILED, exit code 1: it broke" in capsys.readouterr().out


def test_the_budget_is_kept(tmp_path):
    clock = Clock(12)
    go(Report(tmp_path / "r.jsonl", WHERE), UNITS, 21, clock.execute, clock)
    assert clock.ran == ["a/one", "a/two"], "9 seconds are too few for a unit of 100"


def test_a_unit_that_fails_or_hangs_is_one_line(monkeypatch):
    ok, rows, error = in_process(Unit("no_such_section", "x", 60), 60)
    assert not ok and rows == [] and error.startswith("exit code") and "\n" not in error
    monkeypatch.setattr(sys, "executable", sys.executable)
    ok, rows, error = in_process(Unit("check", "relu_fprop:relu_fprop_cuda", 60), 0.01)
    assert not ok and error.startswith("exit code 124: stopped after 0 s")


def test_the_units_are_there(capsys):
    names = [unit.name for unit in units()]
    assert len(names) == len(set(names)) > 100
    assert main(["--dry-run"]) == 0
    assert "conformance/conv2d_fprop:fprop_tensor" in capsys.readouterr().out
    first = {name.partition("/")[0]: i for i, name in reversed(list(enumerate(names)))}
    order = "primitives check replays blocks training layers conformance inference end_to_end"
    assert sorted(first, key=first.__getitem__) == order.split()


def test_without_a_gpu_it_says_so():
    root = Path(__file__).parent.parent
    import minires

    if minires.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu_report"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_report: device cuda:0 needs ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
def test_layers_are_right_on_the_stand_in(direction, dtype, monkeypatch):
    """The inputs of a layer, made small, through our kernels and back: shapes, layouts and parameters fit."""
    from benchmarks import gpu_layers

    nvrtc()
    install(monkeypatch)
    monkeypatch.setitem(gpu_layers.RESNET50, "same56", (8, 5, 16, 3, 2))
    monkeypatch.setitem(gpu_layers.BATCH, "same56", 2)
    monkeypatch.setattr(gpu_layers, "on_gpu", lambda xp, calls, seconds: {n: gpu_layers.timing([1.0]) for n in calls})
    monkeypatch.setattr(gpu_layers, "cudnn_conv", lambda *a: ({}, "not here"))
    rows = list(gpu_layers.layers(f"same56:{direction}:{dtype}"))
    assert {row["kernel"] for row in rows} == (
        {f"{direction}_{name}" for name in ("implicit", "vectorised", "tf32", "3xtf32")}
        if dtype == "float32"
        else {f"{direction}_implicit", f"{direction}_tensor", *(["fprop_wgmma"] if direction == "fprop" else [])}
    )
    for row in rows:
        assert "wrong_by" not in row and row["tflop_per_s"] == 0
        assert row["relative_difference"] < (1e-2 if row["kernel"].endswith("_tf32") or dtype == "bfloat16" else 1e-5)


OWN = """
from minires.kernels.registry import kernel, problem

@kernel(problem("conv2d_fprop"), device="cuda", step=2, note="wrong", dtypes=("float32",))
def all_zeros(x, w, *, stride, padding, dilation, groups):
    from minires.kernels.registry import kernels
    right = next(k for k in kernels("conv2d_fprop", "cuda") if k.step == 3)
    return 0 * right(x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)

@kernel(problem("conv2d_fprop"), device="cuda", step=2, note="right", dtypes=("float32",))
def handed_on(x, w, **params):
    from minires.kernels.registry import kernels
    return next(k for k in kernels("conv2d_fprop", "cuda") if k.step == 3)(x, w, **params)
"""


def test_a_kernel_of_ones_own_is_ranked_in_the_ladder_on_the_stand_in(tmp_path, monkeypatch, capsys):
    """`python -m benchmarks conv2d --device cuda --kernels FILE`: rows, file, plot, and the README's table."""
    from minires.kernels import registry

    from benchmarks import gpu_layers, kernels, readme
    from benchmarks.provenance import read

    nvrtc()
    install(monkeypatch)
    monkeypatch.setitem(gpu_layers.RESNET50, "same56", (8, 5, 16, 3, 2))
    monkeypatch.setitem(gpu_layers.BATCH, "same56", 2)
    monkeypatch.setattr(gpu_layers, "gpu_name", lambda: "Stand-In 1")
    monkeypatch.setattr(gpu_layers, "driver", lambda: "13.0")

    def cudnn(xp, direction, dtype, arrays, params):
        right = next(k for k in registry.kernels(f"conv2d_{direction}", "cuda") if k.step == 3)
        return {"cudnn:0": lambda: right(*arrays, **params)}, "cuDNN 9"

    monkeypatch.setattr(gpu_layers, "cudnn_conv", cudnn)
    monkeypatch.setattr(gpu_layers, "on_gpu", lambda xp, calls, seconds: {n: gpu_layers.timing([2.0]) for n in calls})
    (tmp_path / "own.py").write_text(OWN)
    output = tmp_path / "conv2d-stand-in-1.csv"
    options = dict(device="cuda", case="same56", kernels=[tmp_path / "own.py"], output=output)
    try:
        kernels.kernels("conv2d", **options)
    finally:
        for name in ("all_zeros", "handed_on"):
            registry.forget("conv2d_fprop", name)
    said = capsys.readouterr().out
    rows = {(row["kernel"], row["dtype"]): row for row in read(output)}
    assert (
        rows["handed_on", "float32"]["step"] == "own" and rows["handed_on", "float32"]["cudnn_best_over_this"] == "1.0"
    )
    assert rows["all_zeros", "float32"]["wrong_by"] and not rows["all_zeros", "float32"]["median_us"]
    assert rows["fprop_implicit", "float32"]["step"] == "3" and rows["cudnn:0", "float32"]["step"] == ""
    assert {row["gpu"] for row in rows.values()} == {"Stand-In 1"}
    assert "all_zeros" in said and "not timed: differs by" in said
    assert output.with_suffix(".png").stat().st_size > 5_000
    table = readme.tables(tmp_path)
    assert "Stand-In 1, driver 13.0; cuDNN 9" in table and "| 3 | implicit | 1.00 |" in table
    with pytest.raises(ValueError, match="nothing to time on 'cuda' for 'relu'"):
        kernels.kernels("relu", device="cuda")


def test_blocks_agree_on_the_stand_in(monkeypatch):
    """A block made small, ours fused and not: the same up to rounding."""
    from benchmarks import gpu_blocks, gpu_layers

    nvrtc()
    install(monkeypatch)
    monkeypatch.setitem(gpu_blocks.BLOCKS, "block7", (8, 5))
    monkeypatch.setattr(gpu_blocks, "BATCH", 2)
    monkeypatch.setattr(gpu_blocks, "_torch", lambda *a: {})
    monkeypatch.setattr(gpu_blocks, "cudnn_block", lambda *a: (None, "not here"))
    monkeypatch.setattr(gpu_layers, "on_gpu", lambda xp, calls, seconds: {n: gpu_layers.timing([1.0]) for n in calls})
    rows = list(gpu_blocks.blocks("block7"))
    assert not any("wrong_by" in row for row in rows), rows
    sides = {row["side"]: row for row in rows}
    assert sides["line"]["over_one_op"] == 1 and sides["cudnn"]["note"] == sides["cudnn_fused"]["note"] == "not here"


@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
def test_cudnn_graphs_validate(direction):
    """Where cuDNN is installed; it needs no GPU for that."""
    cudnn = pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    from benchmarks.cudnn_peer import build_graph

    shapes = {"x": (32, 64, 56, 56), "w": (64, 64, 3, 3), "y": (32, 64, 56, 56)}
    geometry = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    graph, tensors = build_graph(cudnn, direction, "bfloat16", shapes, geometry, None)
    assert graph is not None and set(tensors) == {"x", "w", "y"}


@pytest.mark.parametrize("fused", [False, True])
def test_cudnn_graphs_of_a_block_validate(fused):
    cudnn = pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    from benchmarks.gpu_blocks import build, steps

    made = [(kind, set(build(cudnn, kind, None, **about)[1])) for kind, about in steps(64, 56, fused)]
    assert [kind for kind, _ in made].count("fprop") == 3 and made[-1] == ("dgrad", {"x", "w", "y"})
    assert ("fprop", {"x", "scale", "bias", "w", "y", "sum", "square"}) in made or not fused
    assert not hasattr(cudnn.pygraph, "dbn_weight"), "dgrad-dReLU-dBN can be built now: see the head of gpu_blocks.py"


class _Device:
    """cudnn, a graph and CuPy, as far as `plans` asks them: plans 1 and 3 are refused."""

    class cudnnGraphNotSupportedError(Exception):
        pass

    heur_mode = type("heur_mode", (), {"A": 0, "FALLBACK": 1})
    uint8 = np.uint8
    empty = staticmethod(lambda n, dtype: type("space", (), {"data": type("data", (), {"ptr": 0})}))

    def __init__(self, broken=False, supported=True):
        self.broken, self.supported, self.ran = broken, supported, []
        self.cuda = type("cuda", (), {"Device": lambda: type("d", (), {"synchronize": self.synchronize})})

    def synchronize(self):
        if self.broken:
            raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")

    def create_execution_plans(self, modes):
        if not self.supported:
            raise self.cudnnGraphNotSupportedError("No valid engine configs\nmore")

    check_support = staticmethod(lambda: None)
    get_execution_plan_count = staticmethod(lambda: 5)
    get_workspace_size_plan_at_index = staticmethod(lambda index: 1 << 40 if index == 4 else 0)

    def build_plan_at_index(self, index):
        if index == 1:
            raise self.cudnnGraphNotSupportedError("engine 1 wants another GPU")

    def execute_plan_at_index(self, pointers, space, index, handle):
        if index == 3:
            raise RuntimeError("CUDNN_STATUS_EXECUTION_FAILED")
        self.ran.append(index)


def test_refused_plans_are_told_and_errors_of_the_device_propagate():
    from benchmarks.cudnn_peer import plans

    one = _Device()
    calls, refused = plans(one, one, one, {}, None)
    assert list(calls) == [0, 2] and refused == "3 of 5 plans refused, the first: engine 1 wants another GPU"
    calls[2]()
    assert one.ran == [0, 2, 2]
    none = _Device(supported=False)
    assert plans(none, none, none, {}, None) == ({}, "no plan for this graph: No valid engine configs")
    broken = _Device(broken=True)
    with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
        plans(broken, broken, broken, {}, None)


@pytest.fixture
def stand_in(monkeypatch):
    """CuPy's place is taken; networks are small, and measured for no time."""
    import minires
    from benchmarks import gpu_steps
    from minires import nn

    nvrtc()
    install(monkeypatch)

    def network(model, one_op=False):
        minires.manual_seed(0)
        conv, bn = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        return nn.Sequential(conv, bn, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).to("cuda")

    monkeypatch.setattr(gpu_steps, "network", network)
    monkeypatch.setattr(gpu_steps, "_SECONDS", 0.0)
    monkeypatch.setattr(gpu_steps, "_SAMPLES", 1)
    monkeypatch.setattr(gpu_steps, "STEPS", 3)
    monkeypatch.setitem(gpu_steps.SETUPS, "resnet20:128", 6)
    real = gpu_steps._batch
    monkeypatch.setattr(gpu_steps, "_batch", lambda n, size, seed=0: real(4, 6, seed))
    monkeypatch.setattr(nn, "fuse_for_inference", lambda net: net)  # of ResNets
    return gpu_steps


def test_training_and_inference_run_on_the_stand_in(stand_in):
    firsts = {}
    for run, libraries in ((stand_in.training, stand_in.TRAINERS), (stand_in.inference, stand_in.PREDICTORS)):
        for library in (library for library in libraries if library.startswith("minires")):
            (row,) = run(f"{library}:resnet20:128:0")  # seconds of measuring, as `networks --device cuda` has it
            assert row["images_per_s"] > 0 and row["n"] >= 1
            firsts[run.__name__, library] = row["first"], row["last"]
    for name in ("training", "inference"):
        plain = firsts[name, "minires"]
        assert firsts[name, "minires_graph" if name == "training" else "minires_fused_graph"] == plain
        np.testing.assert_allclose(firsts[name, "minires_amp"][0], plain[0], atol=0.05)
    assert firsts["training", "minires_amp_graph"] == firsts["training", "minires_amp"]


def test_a_figure_without_its_graph_is_no_figure(stand_in, monkeypatch):
    from minires import optim

    monkeypatch.setattr(stand_in, "_LEARNING", dict(lr=0.1, trust=1e-3))
    monkeypatch.setattr(optim, "SGD", lambda p, capturable, **s: optim.LARS(p, **s))
    with pytest.raises(RuntimeError, match="CUDA graphs: this step cannot be captured"):
        list(stand_in.training("minires_graph:resnet20:128"))


@pytest.mark.parametrize("setup", ["fp32", "amp", "loop_fp16"])
def test_replays_are_compared_on_the_stand_in(stand_in, setup):
    (row,) = stand_in.replays(setup)
    assert row["captured"] and row["weights_equal"] and row["first_different"] is None


def test_replays_that_differ_fail_the_unit(stand_in, monkeypatch):
    """The planted fault: the learning rate stays what it was at the capture."""
    from minires.optim import sgd

    monkeypatch.setattr(sgd, "fed", lambda value, shape, dtype, like: type(like)(np.full(shape, value(), dtype)))
    with pytest.raises(RuntimeError, match="replays are not what steps without a graph are"):
        list(stand_in.replays("fp32"))


def test_the_unit_asks_for_both_sides(monkeypatch, tmp_path):
    from benchmarks import gpu_end_to_end
    from minires.train import images, loop

    assert "torch_compiled:cifar10-short:0:bf16" in gpu_end_to_end.end_to_end_names()
    asked = []

    def run(recipe, on_epoch, on_note):
        asked.append(recipe)
        on_note("CUDA graphs: a note")
        for seconds, accuracy in ((1.0, 0.5), (2.0, None), (3.0, 0.9), (4.0, 0.88)):
            on_epoch(types.SimpleNamespace(seconds=seconds, test_accuracy=accuracy))
        about = dict(test_accuracy=0.88, seconds=5.0, first_step_seconds=0.5, images_per_second=2.0, steps=3)
        return types.SimpleNamespace(**about)

    monkeypatch.setattr(loop, "train", run)
    monkeypatch.setattr(images, "open_images", lambda recipe: None)
    monkeypatch.setattr(gpu_end_to_end, "torch_run", lambda recipe, wanted, library: {"side": (recipe, library)})
    monkeypatch.setenv("MINIRES_DATA", str(tmp_path))
    assert "skipped" in next(gpu_end_to_end.end_to_end("minires:cifar10-short:0:bf16"))
    (tmp_path / "cifar10-jpg.tar.xz").touch()
    (row,) = gpu_end_to_end.end_to_end("minires:cifar10-short:1:bf16")
    assert row["notes"] == ["CUDA graphs: a note"] and row["precision"] == "bf16" and row["wanted"] == 0.8534
    assert row["seconds_to_wanted"] == 3.0 and row["test_accuracy"] == 0.88 and row["library"] == "minires"
    assert asked[0].cuda_graphs and asked[0].seed == 1 and asked[0].dataset == "folder"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # PyTorch is installed, or as good as
    (row,) = gpu_end_to_end.end_to_end("torch_compiled:cifar10-short:1:bf16")
    theirs, library = row["side"]
    assert library == "torch_compiled" and dataclasses.replace(theirs, out="") == dataclasses.replace(asked[0], out="")
    monkeypatch.setattr(gpu_end_to_end.importlib.util, "find_spec", lambda name: None)
    assert next(gpu_end_to_end.end_to_end("torch:cifar10-short:1:bf16"))["skipped"] == "PyTorch is not installed"


def test_the_accuracy_that_is_wanted_is_the_recipe_s():
    from benchmarks import gpu_end_to_end

    assert gpu_end_to_end.worst_expected("85.48 % (median; 85.34 to 85.63 %): minires train") == 0.8534
    with pytest.raises(ValueError, match="names no range of accuracies"):
        gpu_end_to_end.worst_expected("about 85 %")


def test_every_kernel_is_checked_on_the_stand_in(stand_in, monkeypatch):
    """A case of each in its dtypes, moved to arrays as strict as CuPy's and back."""
    from minires.kernels import checking

    from benchmarks import gpu_units

    monkeypatch.setattr(checking, "LAYOUTS", ("strided",))

    cases = gpu_units._test_cases
    monkeypatch.setattr(gpu_units, "_test_cases", lambda kernel: cases(kernel)[:1])
    checked = 0
    for name in gpu_units._kernel_names():
        (row,) = gpu_units.check(name)
        checked += row["checks"]
    assert checked > 50


def test_conformance_on_the_stand_in(stand_in, monkeypatch):
    from device_double import _unwrap
    from minires.kernels.cuda import launch as launches
    from minires.kernels.interpreter import interpret

    from benchmarks import gpu_units

    def anywhere(launch):
        interpret(dataclasses.replace(launch, args=tuple(_unwrap(a, host_too=True) for a in launch.args)))

    monkeypatch.setattr(launches, "_executor", anywhere)
    rows = list(gpu_units.conformance("relu_bwd:relu_bwd_cuda"))
    assert all(row["bitwise_equal"] == row["cases"] for row in rows) and len(rows) >= 2


def test_the_whole_script_runs_on_the_stand_in(stand_in, monkeypatch, tmp_path, capsys):
    """From the command line to the file, a unit of each of some sections, in this process."""
    from benchmarks import gpu_primitives, gpu_report

    chosen = ["primitives/copies", "replays/fp32", "training/minires_graph:resnet20:128", "inference/minires:no:1"]
    monkeypatch.setattr(gpu_primitives, "on_device", gpu_primitives.interpreted)
    monkeypatch.setattr(gpu_report, "units", lambda: [Unit(*name.split("/", 1), 60) for name in chosen])

    def here(unit, seconds):
        try:
            return True, list(gpu_report.run_unit(unit.name)), ""
        except KeyError as error:
            return False, [], repr(error)

    monkeypatch.setattr(gpu_report, "in_process", here)
    path = tmp_path / "report.jsonl"
    assert main(["--budget", "5", "--output", str(path)]) == 1
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["unit"] for line in lines if line["ok"]] == chosen[:3] and lines[0]["gpu"] == "stand-in"
    assert lines[0]["driver"] == "13.0" and "clocks" in lines[0]
    assert "3 of 4 units done, 1 failed now" in capsys.readouterr().out
