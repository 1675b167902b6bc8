"""The table of kernels, the choice among them, and how one is added: in the tree or from a file outside it."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import minires.kernels
import numpy as np
import pytest
from minires.kernels import registry
from minires.kernels.cpu import jit

from minires import cli, dispatch

KERNELS = Path(minires.kernels.__file__).parent
RELU = registry.problem("relu_fprop")
X = np.array([[-1.0, 2.0]], np.float32)


@pytest.fixture(autouse=True)
def same_table_afterwards():
    before = registry.kernels()
    measured = dict(dispatch._measured)
    yield
    for k in set(registry.kernels()) - set(before):
        registry.forget(k.problem.name, k.name)
    dispatch._measured.clear()
    dispatch._measured.update(measured)
    assert registry.kernels() == before


def _register(name, fn=RELU.reference, **settings):
    registry.kernel(RELU, **dict(device="cpu", step=1, note="for a test", dtypes=("any",)) | settings, name=name)(fn)
    return next(k for k in registry.kernels("relu_fprop") if k.name == name)


# The table


def test_kernels_stand_in_the_order_of_the_ladder():
    assert registry.kernels("relu_fprop", "cpu")[0].fn is RELU.reference
    steps = [k.step for k in registry.kernels("conv2d_fprop", "cpu")]
    assert steps == sorted(steps) and len(steps) >= 3
    assert registry.kernels("conv2d_fprop", "abacus") == ()
    assert {case.name for k, case in registry.pairs("bench") if k.problem is RELU} == {
        case.name for case in RELU.cases if "bench" in case.tags
    }


def test_two_kernels_of_one_name_are_refused():
    _register("twin")
    with pytest.raises(ValueError, match="relu_fprop has a kernel named 'twin' already"):
        _register("twin")
    registry.forget("relu_fprop", "twin")
    _register("twin")


def test_two_problems_of_one_name_are_refused():
    other = registry.Problem(RELU.name, *(getattr(RELU, f) for f in ("reference", "inputs", "cases")), None, None, None)
    with pytest.raises(ValueError, match="two different problems are named 'relu_fprop'"):
        registry.kernel(other, device="cpu", step=0, note="")(RELU.reference)


def test_unknown_problem_names_the_known_ones():
    with pytest.raises(KeyError, match=r"no problem is named 'conv9d'; known: accumulate, .*add_fprop, .*conv2d_fprop"):
        registry.problem("conv9d")


# The choice


def test_later_step_is_preferred_unless_rank_says_otherwise():
    late = _register("late", step=90)
    assert dispatch.select("relu_fprop", X) is late
    _register("low", step=99, rank=lambda x: -1)
    picky = _register("picky", step=99, supports=lambda x: x.shape[0] > 1)
    single = _register("single", step=99, dtypes=("float64",))
    assert dispatch.select("relu_fprop", X) is late
    assert dispatch.select("relu_fprop", np.vstack([X, X])) is picky
    assert dispatch.select("relu_fprop", X.astype(np.float64)) is single


def test_use_kernels_chooses_by_hand_and_goes_back():
    chosen = []
    with dispatch.observe(lambda k: chosen.append(k.name)):
        with dispatch.use_kernels(relu_fprop="relu_fprop_reference"):
            dispatch.run("relu_fprop", X)
            with dispatch.use_kernels(relu_fprop="relu_fprop_numba"):
                dispatch.run("relu_fprop", X)
            dispatch.run("relu_fprop", X)
    dispatch.run("relu_fprop", X)  # not observed any more
    assert chosen == ["relu_fprop_reference", "relu_fprop_numba", "relu_fprop_reference"]
    assert not dispatch._state.chosen


def test_a_choice_is_the_thread_s_own():
    entered, leave, seen = threading.Event(), threading.Event(), []

    def other():
        with dispatch.use_kernels(relu_fprop="relu_fprop_reference"), dispatch.observe(seen.append):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with dispatch.use_kernels(relu_fprop="relu_fprop_numba"):
        thread.start()
        entered.wait(10)
        assert dispatch.select("relu_fprop", X).name == "relu_fprop_numba"
        dispatch.run("relu_fprop", X)
    leave.set()
    thread.join()
    assert not seen and not dispatch._state.chosen


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"relu_fprop": "nothing"}, "relu_fprop has no kernel 'nothing'; known: relu_fprop_reference"),
        ({"conv9d": "nothing"}, "conv9d has no kernel 'nothing'; known: no such problem"),
    ],
)
def test_use_kernels_refuses_unknown_names_at_once(choice, message):
    with pytest.raises(ValueError, match=message), dispatch.use_kernels(**choice):
        pytest.fail("entered")


def test_chosen_kernel_that_does_not_take_the_inputs():
    with (
        dispatch.use_kernels(relu_fprop="relu_fprop_numba"),
        pytest.raises(NotImplementedError, match="'relu_fprop_numba', chosen for relu_fprop, does not take"),
    ):
        dispatch.run("relu_fprop", X.astype(np.complex64))


def test_no_kernel_takes_the_inputs():
    with pytest.raises(NotImplementedError, match=r"no cpu kernel of conv9d takes \(float32, int32\) with {'a': 1}"):
        dispatch.run("conv9d", X, None, X.astype(np.int32), a=1)


def test_autotune_measures_once_per_shape_and_remembers():
    calls = []

    def slow(x):
        calls.append(x.shape)
        time.sleep(0.05)
        return RELU.reference(x)

    slow_kernel = _register("slow", slow, step=99)
    assert dispatch.select("relu_fprop", X) is slow_kernel
    with dispatch.autotune():
        fast = dispatch.select("relu_fprop", X)
        measured = len(calls)
        assert fast is not slow_kernel and measured >= 2
        assert dispatch.select("relu_fprop", X) is fast and len(calls) == measured
        dispatch.select("relu_fprop", np.vstack([X, X]))
        assert len(calls) > measured
    assert dispatch.select("relu_fprop", X) is fast
    assert dispatch.select("relu_fprop", X.T) is slow_kernel, "a shape that was not measured"


def test_autotune_leaves_the_arguments_alone():
    p, g = np.ones(3, np.float32), np.ones(3, np.float32)
    step = dict(momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, first=False)
    with dispatch.autotune():
        dispatch.run("sgd_step", np.full(1, 0.1, np.float32), None, p, g, **step)
    np.testing.assert_allclose(p, 0.9, rtol=1e-6)


# Threads, vectors, the cache of compiled code


def test_number_of_threads_is_checked():
    for n in (0, 10**6):
        with pytest.raises(ValueError, match=rf"set_num_threads\({n}\): this process can use 1 to"):
            jit.set_num_threads(n)


def _python(code, *, cwd, **environment):
    """Run Python code in a process of its own; returns what it prints."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CHECK = """
from minires import dispatch
from minires.kernels import registry
from minires.kernels.checking import Trial, check
results = [check(k, case, dtype) for name in {problems} for k in registry.kernels(name, "cpu") if {chosen}
           for case in k.problem.cases if case.name in {cases} for dtype in ("float32", "bfloat16")
           if dtype in k.dtypes and Trial(k.problem, case, dtype).suits(k)]
print(" ".join(sorted({{r.kernel.name for r in results}})), *[r for r in results if not r.ok], sep="\\n")
"""


@pytest.mark.parametrize(
    "simd, problems",
    [
        ("avx2", ("conv2d_fprop", "conv2d_dgrad", "conv2d_wgrad")),
        ("avx2", ("conv2d_bias_act",)),
        ("generic", ("conv2d_fprop",)),
    ],
)
def test_other_vector_units_compute_the_same(simd, problems, tmp_path):
    code = CHECK.format(
        problems=problems,
        chosen="k.name.endswith(('_tile', '_winograd', '_2x2', '_pointwise', '_winograd_bfloat16', '_2x2_bfloat16'))",
        cases=("3x3_same", "wide", "vectors", "vectors_1x1"),
    )
    names, *wrong = _python(code, cwd=tmp_path, MINIRES_SIMD=simd).splitlines()
    hows = ("winograd", "winograd_2x2", "winograd_bfloat16", "pointwise")
    expected = {f"{problem.removeprefix('conv2d_')}_{how}" for problem in problems for how in hows}
    assert expected <= set(names.split()) and not wrong, "\n".join(wrong)


def test_unknown_vector_unit_is_named(tmp_path):
    code = "import minires.kernels.cpu.features as f\ntry: f.simd()\nexcept ValueError as e: print(e)"
    with pytest.raises(AssertionError, match="MINIRES_SIMD='mmx' is unknown: use one of avx512, avx2, neon, generic"):
        _python(code, cwd=tmp_path, MINIRES_SIMD="mmx")


def test_kernels_work_where_nothing_can_be_cached(tmp_path):
    (tmp_path / "file").touch()
    code = "import numpy as np; from minires import dispatch; print(dispatch.run('relu_fprop', np.float32([-1, 2])))"
    assert _python(code, cwd=tmp_path, MINIRES_CACHE=str(tmp_path / "file")) == "[0. 2.]"


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources that can be edited; `kernels/` where installation puts it."""
    source = Path(minires.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(source, tmp_path / "minires", ignore=ignore)
    shutil.copytree(KERNELS, tmp_path / "minires" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def _append(path, text):
    path.write_text(path.read_text() + text)


def test_adding_a_kernel_to_the_tree_takes_two_edits(tree):
    page = tree / "minires" / "kernels" / "elementwise" / "numba_kernels.py"
    the_kernel = """

@parallel()
def _relu_backwards(i, x, y):
    y[-1 - i] = x.dtype.type(0) if x[-1 - i] <= 0 else x[-1 - i]
"""
    its_launcher = """

@kernel(RELU_FPROP, device="cpu", step=50, note="from the last element to the first")
def relu_backwards(x):
    y = empty(x.shape, x.dtype)
    _relu_backwards(x.size, np.ascontiguousarray(x).reshape(-1), y.reshape(-1))
    return y
"""
    _append(page, the_kernel + its_launcher)
    code = CHECK.format(
        problems=("relu_fprop",),
        chosen="k.name == 'relu_backwards'",
        cases=[case.name for case in RELU.cases if "test" in case.tags],
    )
    code += "print(dispatch.select('relu_fprop', __import__('numpy').ones(3)).name)"
    environment = dict(PYTHONPATH=str(tree), MINIRES_CACHE=str(tree / "cache"))
    checked, chosen = _python(code, cwd=tree, **environment).splitlines()
    assert checked == chosen == "relu_backwards"


def test_an_edit_in_a_callees_file_is_compiled(tree):
    kernels = tree / "minires" / "kernels"
    (kernels / "callee.py").write_text("from .cpu.jit import njit\n@njit()\ndef f(x):\n    return x + 1\n")
    (kernels / "caller.py").write_text(
        "from .cpu.jit import njit\nfrom .callee import f\n@njit()\ndef g(x):\n    return f(x) * 10\n"
    )
    code = (
        "from minires.kernels.caller import g\nfrom minires.kernels.cpu.jit import source_hash\n"
        "print(g(1), sum(g.stats.cache_hits.values()), source_hash())"
    )
    environment = dict(PYTHONPATH=str(tree), MINIRES_CACHE=str(tree / "cache"))
    first, again = (_python(code, cwd=tree, **environment).split() for _ in range(2))
    assert first[:2] == ["20", "0"] and again[:2] == ["20", "1"] and first[2] == again[2]
    (kernels / "callee.py").write_text("from .cpu.jit import njit\n@njit()\ndef f(x):\n    return x + 2\n")
    edited = _python(code, cwd=tree, **environment).split()
    assert edited[:2] == ["30", "0"] and edited[2] != first[2]


def test_a_function_from_disk_is_called_by_one_that_is_compiled(tmp_path):
    """Its intermediate code, which that needs, is not kept once it is loaded."""
    (tmp_path / "two.py").write_text(
        "from minires.kernels.cpu.jit import njit\n"
        "@njit()\ndef f(x):\n    return x + 1\n"
        "def g(x):\n    return f(x) * 10\n"
    )
    code = (
        "import two\nloaded = two.f(1)\nlibrary = next(iter(two.f.overloads.values())).library\n"
        "print(loaded, library._shared_module, two.njit()(two.g)(1), sum(two.f.stats.cache_hits.values()))"
    )
    environment = dict(MINIRES_CACHE=str(tmp_path / "cache"))
    _python("import two; two.f(1)", cwd=tmp_path, **environment)
    assert _python(code, cwd=tmp_path, **environment) == "2 None 20 1"


def test_processes_that_compile_at_once_get_no_others_code(tmp_path):
    """Two processes read an empty index, and one writes while the other does: an entry is lost, none is wrong."""
    code = """
from minires.kernels.cpu.jit import njit
def f(x):
    return x + 1
one, other = (njit()(f)._cache._cache_file for _ in range(2))
read, write = one._load_index, one._save_index
one._load_index = other._load_index = dict
one._save_index = lambda index: (write(index), other.save("float64", "code for float64"))
one.save("float32", "code for float32")
one._load_index = other._load_index = read
print([(key, one.load(key)) for key in ("float32", "float64")])
"""
    (tmp_path / "both.py").write_text(code)
    found = _python("import both", cwd=tmp_path, MINIRES_CACHE=str(tmp_path / "cache"))
    assert found == "[('float32', None), ('float64', 'code for float64')]"


# minires kernels

MINE = """
import numpy as np
from minires.kernels.registry import kernel, problem


@kernel(problem("relu_fprop"), device="cpu", step=1, note="a file of one's own", dtypes=("any",))
def my_relu(x):
    return np.maximum(x, 0)
"""
WRONG = MINE.replace("my_relu", "my_wrong_relu").replace("np.maximum(x, 0)", "np.abs(x)")


def _file(tmp_path, text, name="mine.py"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_kernels_list(capsys):
    assert cli.main(["kernels", "list"]) == 0
    table = capsys.readouterr().out
    for k in registry.kernels():
        assert k.name in table and k.note in table
    assert cli.main(["kernels", "list", "relu_fprop", "--device", "cpu"]) == 0
    assert "conv2d" not in capsys.readouterr().out


def test_kernels_check_of_ones_own_file(tmp_path, capsys):
    assert cli.main(["kernels", "check", _file(tmp_path, MINE), "--time"]) == 0
    out = capsys.readouterr().out
    assert "right" in out and "GFLOP/s" in out and "relu_fprop_numba" in out
    assert cli.main(["kernels", "check", _file(tmp_path, WRONG, "wrong.py")]) == 1
    out = capsys.readouterr().out
    assert "wrong value" in out and "my_relu" not in out


def test_kernels_check_of_a_problem(capsys):
    assert cli.main(["kernels", "check", "--problem", "relu_fprop"]) == 0
    assert "relu_fprop_numba" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "say what to check: a FILE.py that registers kernels, or --problem NAME"),
        (["--problem", "conv9d"], "no problem is named 'conv9d'; known: accumulate, "),
        (["nowhere.py"], "there is no file 'nowhere.py'"),
        (["{}", "--problem", "add_fprop"], "has no CPU kernel of add_fprop"),
    ],
)
def test_kernels_check_of_bad_input(tmp_path, capsys, arguments, message):
    mine = _file(tmp_path, MINE)
    assert cli.main(["kernels", "check", *(a.format(mine) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1\n", "registers no kernel"),
        ("import numpy\n1 / 0\n", "ZeroDivisionError: division by zero"),
        ("def f(:\n", "SyntaxError"),
        (MINE + "\n1 / 0\n", "ZeroDivisionError"),
        (MINE.replace("my_relu", "relu_fprop_numba"), "has a kernel named 'relu_fprop_numba' already"),
    ],
)
def test_kernels_check_of_a_bad_file(tmp_path, capsys, text, message):
    assert cli.main(["kernels", "check", _file(tmp_path, text)]) == 2
    error = capsys.readouterr().err
    assert message in error and "mine.py" in error and error.count("\n") == 1
    assert all(k.name != "my_relu" for k in registry.kernels())
