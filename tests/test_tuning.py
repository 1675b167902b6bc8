"""What autotune found stays on disk, keyed by all that the answer depends on, and a damaged file does no harm."""

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from minires.kernels import registry
from minires.kernels.cpu import jit

from minires import dispatch, tuning

X = np.ones((2, 3), np.float32)
KEY = ("relu_fprop", "cpu", (((2, 3), "<f4"),), ())
PATH = tuning.path  # the fixture of conftest.py replaces it


def _kernel(name, seconds, module="minires.kernels.somewhere"):
    """A kernel whose runs take so many seconds by the clock that `clock` fakes."""
    problem = registry.problem("relu_fprop")

    def fn(x):
        _now[0] += seconds
        _runs.append(name)
        return x

    fn.__module__ = module
    return registry.Kernel(problem, name, "cpu", 1, "for a test", fn)


_now, _runs = [0.0], []


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    _now[0] = 0.0
    _runs.clear()
    monkeypatch.setattr(tuning, "time", types.SimpleNamespace(perf_counter=lambda: _now[0]))


def _fastest(*rivals):
    return tuning.fastest(KEY, list(rivals), (X,), {}).name


def test_the_fastest_is_measured_once_and_found_again():
    slow, quick = _kernel("slow", 2.0), _kernel("quick", 1.5)
    assert _fastest(slow, quick) == "quick"
    runs = len(_runs)
    assert runs >= 4
    assert _fastest(slow, quick) == "quick" and len(_runs) == runs, "read, not measured"
    (entry,) = json.loads(tuning.path().read_text())
    assert json.loads(entry)[:2] == ["relu_fprop", "cpu"] and json.loads(entry)[-1] == ["quick", "slow"]


def test_a_new_rival_is_measured():
    assert _fastest(_kernel("a", 2.0), _kernel("b", 1.0)) == "b"
    assert _fastest(_kernel("a", 2.0), _kernel("b", 1.0), _kernel("c", 0.5)) == "c"
    assert len(tuning.read(tuning.path())) == 2


def test_a_hopeless_rival_runs_twice():
    assert _fastest(_kernel("quick", 1.0), _kernel("slow", 100.0)) == "quick"
    assert _runs.count("slow") == 2 and _runs.count("quick") > 2


def test_a_kernel_from_outside_the_tree_is_not_remembered():
    mine = _kernel("mine", 1.0, module="minires_kernels_from_mine")
    assert _fastest(mine, _kernel("theirs", 2.0)) == "mine"
    assert not tuning.path().exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', "\xff"])
def test_a_damaged_file_is_told_ignored_and_replaced(content):
    tuning.path().write_bytes(content.encode("latin-1"))
    with pytest.warns(RuntimeWarning, match=r"autotune.json is damaged and ignored, autotune measures anew"):
        assert _fastest(_kernel("a", 2.0), _kernel("b", 1.0)) == "b"
    assert list(tuning.read(tuning.path()).values()) == ["b"]


def test_entries_of_other_processes_stay_and_no_temporary_file_does(tmp_path):
    _fastest(_kernel("a", 1.0))
    other = json.loads(tuning.path().read_text()) | {"of another process": "x"}
    tuning.path().write_text(json.dumps(other))
    os.utime(tuning.path(), ns=(1, 1))
    _fastest(_kernel("a", 1.0), _kernel("b", 2.0))
    assert "of another process" in tuning.read(tuning.path()) and len(tuning.read(tuning.path())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["autotune.json"]


def test_where_nothing_can_be_written_it_is_measured_every_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tuning, "path", lambda: tmp_path / "file" / "autotune.json")
    assert _fastest(_kernel("a", 2.0), _kernel("b", 1.0)) == "b"
    assert _fastest(_kernel("a", 2.0), _kernel("b", 3.0)) == "a"


def test_the_file_is_named_after_threads_cpu_versions_and_source(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIRES_CACHE", str(tmp_path))
    one = PATH()
    assert one.parent == tmp_path / "autotune" and one.name.startswith(jit.source_hash())
    monkeypatch.setattr(tuning, "get_num_threads", lambda: 77)
    assert PATH() != one and PATH().name.endswith("-77t.json")
    monkeypatch.setattr(tuning, "_machine", tuning._machine.__wrapped__)
    same = PATH()
    monkeypatch.setattr(tuning.importlib.metadata, "version", lambda name: "0.0")
    assert PATH() != same
    monkeypatch.undo()


def test_another_process_chooses_what_the_first_one_measured(tmp_path):
    """The real clock and files: the choices of a process are those that the file of the first one says."""
    code = (
        "import numpy as np\nfrom minires import dispatch, tuning\nx = np.ones((4, 8, 8, 8), np.float32)\n"
        "if {fake}: tuning.measure = lambda *a: 1 / 0\n"
        "with dispatch.autotune(): print(dispatch.select('relu_fprop', x).name)\n"
    )
    environment = os.environ | {"MINIRES_CACHE": str(tmp_path)}
    names = set()
    for fake in (False, True):
        command = [sys.executable, "-c", code.format(fake=fake)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        names.add(done.stdout.strip())
    assert len(names) == 1 and len([*(tmp_path / "autotune").iterdir()]) == 1


def test_dispatch_asks_it_once_per_shape(monkeypatch):
    asked = []
    monkeypatch.setattr(dispatch, "_measured", {})
    monkeypatch.setattr(tuning, "fastest", lambda key, rivals, arrays, params: asked.append(key) or rivals[0])
    with dispatch.autotune():
        for _ in range(2):
            dispatch.select("relu_fprop", X)
    assert asked == [KEY]
