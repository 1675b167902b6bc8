"""The walk of a training step, the pages of the ops, results as files, and the command line."""

import importlib
import inspect
import json
import pkgutil
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from minires.kernels import registry

import minires.ops
from minires import nn, study
from minires.cli import main
from minires.engine import Function
from minires.study.op_pages import OpPage, backward_formulas, op_page
from minires.study.result import Finding, Result, Table, number, plain

ROOT = Path(__file__).parent.parent
OPS = sorted(
    (
        value
        for module in pkgutil.iter_modules(minires.ops.__path__)
        for value in vars(importlib.import_module(f"minires.ops.{module.name}")).values()
        if inspect.isclass(value) and issubclass(value, Function) and value.__module__.endswith(module.name)
    ),
    key=lambda op: op.__name__,
)


# --- pages of the ops -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_every_op_says_on_its_page_what_its_backward_is(op):
    page = op_page(op)
    assert page.op == op.__name__ and page.formulas and all(re.match(r"d[a-z]", f) for f in page.formulas)
    source = (ROOT / page.file).read_text(encoding="utf-8").splitlines()
    assert source[page.line - 1].startswith(f"class {op.__name__}(")
    assert page.where == f"{page.file}:{page.line}"


def test_formulas_of_the_op_that_is_asked_for():
    page = """Two ops.

    sin    y = sin x        dx = dy * cos x
    max_pool    y = max     dx[k] = dy      at the first
                            dw = 0
                               = more

    dz = shared
    div    y = a / b        da = dy / b

In prose dx = nothing.
"""
    assert backward_formulas(page, "Sin") == ("dx = dy * cos x",)
    assert backward_formulas(page, "MaxPool") == ("dx[k] = dy    at the first", "dw = 0 = more")
    assert backward_formulas(page, "Div") == ("da = dy / b",)
    assert backward_formulas(page, "Other") == ("dz = shared",)
    assert backward_formulas("", "Other") == ()


def test_an_op_of_ones_own_says_it_in_its_class():
    class Twice(Function):
        """y = 2 x; dx = 2 dy."""

    assert op_page(Twice).formulas == ("dx = 2 dy.",)
    assert op_page(Twice).file == Path(__file__).relative_to(ROOT).as_posix()
    typed = type("Typed", (Function,), {"__module__": "nowhere", "__doc__": "dx = dy"})
    assert op_page(typed) == OpPage("Typed", ("dx = dy",), "nowhere", 0)


# --- trace ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def walked():
    return study.trace("resnet20", image_size=8, batch=2)


def test_every_op_has_its_way_back(walked):
    assert [s.number for s in walked.steps] == list(range(1, len(walked.steps) + 1))
    assert walked.steps[0].module == "conv1" and walked.steps[-1].op == "CrossEntropy"
    assert all(s.backward is not None for s in walked.steps)
    for s in walked.steps:
        assert s.forward.op == s.backward.op == s.op and s.forward.module == s.backward.module
        assert s.backward.inputs == s.forward.outputs  # the gradient has the output's shape
        gradients = zip(s.backward.outputs, s.forward.inputs, strict=True)
        assert all(g in (None, x) for g, x in gradients)
    known = {k.name for k in registry.kernels()}
    ran = {name for s in walked.steps for name in (*s.forward.kernels, *s.backward.kernels)}
    assert ran and ran <= known
    convolutions = [s for s in walked.steps if s.op == "Conv2d"]
    assert len(convolutions) == 19 and all(s.forward.kernels for s in convolutions)
    assert len(convolutions[0].backward.kernels) == 1 and len(convolutions[1].backward.kernels) == 2
    assert walked.parameter_bytes == 4 * 269_722


def test_what_is_kept_grows_through_forward_and_is_given_back(walked):
    n, held = len(walked.steps), walked.held_bytes
    assert len(held) == 2 * n and (np.diff(held[:n]) >= 0).all() and (np.diff(held[n - 1 :]) <= 0).all()
    assert held[n - 1] == held.max() == sum(s.forward.saved_bytes for s in walked.steps) > 0
    assert held[-1] == 0
    describes = minires.models.describe("resnet20", image_size=8, batch=2)
    at_most = held.max() - walked.steps[-1].forward.saved_bytes  # `describe` leaves out the loss
    assert at_most <= describes.saved_bytes + 2 * 4 * sum(64 for _ in walked.steps) and held.max() > at_most


def test_unfused_shows_each_op(walked):
    apart = study.trace("resnet20", image_size=8, batch=2, unfused=True)
    assert {"ReLU", "Add"} <= set(apart.pages) and not {"ReLU", "Add"} & set(walked.pages)
    assert len(apart.steps) == len(walked.steps) + 19 + 9
    assert apart.loss == pytest.approx(walked.loss, rel=1e-5)
    assert apart.held_bytes.max() == walked.held_bytes.max()  # fusing saves passes over memory, not what is kept


def test_an_op_without_gradient_has_no_way_back():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x * 2)

    found = study.walk(Net(), np.ones((2, 4), np.float32), np.array([0, 2]))
    assert [(s.op, s.backward is None) for s in found.steps] == [
        ("Mul", True),
        ("Linear", False),
        ("CrossEntropy", False),
    ]
    assert "no gradient" in str(found) and found.model == "Net"


def test_it_can_be_read_in_a_terminal_and_in_a_browser(walked, tmp_path):
    from rich.console import Console

    for width in (80, 100, 120):
        with (console := Console(width=width, record=True, file=(tmp_path / "out").open("w"))).file:
            console.print(walked)
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        assert "layer3.2.bn2" in text.replace("\n", "") and "minires/ops/conv.py:" in text
    assert max(map(len, str(walked).splitlines())) <= 140
    page = walked.to_html()
    assert page.count("<tr>") == len(walked.steps) + 1 and "minires/ops/batch_norm.py:" in page
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page) and "dgamma = sum g * x_hat" in page


# --- results --------------------------------------------------------------------------------------------------------


def test_results_as_files_and_in_notebooks(walked, tmp_path):
    files = walked.save(tmp_path / "new" / "folder")
    assert [f.name for f in files] == ["result.json", "trace.png", "trace.html"]
    found = json.loads(files[0].read_text(encoding="utf-8"))
    assert found["experiment"] == "trace" and len(found["steps"]) == len(walked.steps)
    assert found["held_bytes"] == walked.held_bytes.tolist() and found["versions"]["minires"]
    assert files[1].read_bytes().startswith(b"\x89PNG") and walked._repr_png_().startswith(b"\x89PNG")
    topo = study.toposort(blocks=(1, 2))
    assert len(repr(topo)) < 80 and "Toposort" in repr(topo)
    assert "5.25" in topo._repr_html_() and "data:image/png;base64," in topo._repr_html_()


def test_without_matplotlib_there_is_text(tmp_path, monkeypatch):
    found = study.toposort(blocks=(1, 2))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match=r"minires\[demo\]"):
        found.plot()
    assert found._repr_png_() is None and "<img" not in found._repr_html_()
    assert [f.name for f in found.save(tmp_path)] == ["result.json"]


def test_a_finding_says_whether_the_two_agree():
    text = str(Finding("Somebody 2020", "x is 1. " * 20, "x is 2", False, "because"))
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"published +x is 1", text) and re.search(r"differs +because", text)
    assert "agrees" in str(Finding("", "", "", True)) and "not comparable" in str(Finding("", "", "", None))


def test_numbers_for_people_and_for_json():
    assert [number(x) for x in (0.01234, 4.44, 36.2, 7654.0, float("nan"))] == [
        "0.012",
        "4.4",
        "36",
        "7.7e+03",
        "not finite",
    ]
    assert plain({"a": np.array([1.5, np.nan]), 2: (np.float32(1), np.int64(3))}) == {"a": [1.5, None], "2": [1.0, 3]}
    assert "title" in str(Table("title", ("a",), [("1",)]))


# --- command line ---------------------------------------------------------------------------------------------------


def test_every_experiment_is_listed_with_its_question(capsys):
    assert main(["study", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*study.EXPERIMENTS, "trace", "exercise"]
    assert all(len(line) <= 120 and line.endswith((".", "?")) for line in lines)


@pytest.mark.parametrize("name", [*study.EXPERIMENTS, "trace"])
def test_help_explains_every_flag(name, capsys):
    assert main(["study", name, "--help"]) == 0
    text = capsys.readouterr().out
    parameters = [p for p in inspect.signature(getattr(study, name)).parameters if p not in ("on_note", "model")]
    assert all(f"--{p.replace('_', '-')} " in text for p in (*parameters, "out", "json")) and "--on-note" not in text


def test_toposort_as_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "toposort", "--blocks", "1", "2"]) == 0
    out = capsys.readouterr().out
    assert "5.25" in out and out.splitlines()[-1].startswith("written: runs/study/toposort/result.json")
    assert main(["study", "toposort", "--blocks", "2", "--json", "--out", "elsewhere"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["naive"] == [5.25] and Path(found["files"][0]).read_bytes()


def test_trace_as_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "trace", "resnet20", "--image-size", "8", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "dgamma = sum g * x_hat" in out and (tmp_path / "runs/study/trace-resnet20/trace.html").is_file()


def test_all_runs_every_experiment(tmp_path, monkeypatch, capsys):
    class Small(Result):
        name = "small"

        def save(self, folder):
            return [folder / "small.png"]

        def __str__(self):
            return "found it"

    def small(on_note=None):
        on_note("half done")
        return Small()

    small.__module__ = study.toposort.__module__
    monkeypatch.setattr(study, "EXPERIMENTS", {"one": small, "two": small})
    assert main(["study", "all", "--out", str(tmp_path)]) == 0
    out, error = capsys.readouterr()
    assert out.count("found it") == 2 and f"written: {tmp_path / 'two' / 'small.png'}" in out
    assert error == "minires: half done\n" * 2


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nope"], "nope"),
        (["toposort", "--blocks", "2.5"], "2.5"),
        (["toposort", "--blocks", "0"], "blocks=(0,)"),
        (["gradients", "--depths", "21", "--steps", "0"], "plain21"),
        (["trace"], "MODEL"),
        (["trace", "resnet21"], "resnet21"),
        (["trace", "resnet20", "--image-size", "3.5"], "3.5"),
        (["lesion", "--models", "resnet21"], "resnet21"),
    ],
    ids=" ".join,
)
def test_errors_are_one_line(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["study", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"minires: error: [^\n]+\n", error) and says in error and not list(tmp_path.iterdir())
