"""The launcher of tasks (kernels/cpu/parallel.py) and helpers (kernels/cpu/jit.py)."""

import os
import subprocess
import sys

import numpy as np
import pytest
from minires.kernels.cpu import jit
from minires.kernels.cpu.parallel import parallel
from numba import types
from numba.core.runtime import _nrt_python


@jit.helper()
def _shifted(row, by):
    return row.sum() + by[0] * by[1]


@parallel()
def _sums(i, x, y, by, double):
    """Task i: one row."""
    y[i] += _shifted(x[i], by) * (2 if double else 1)


@parallel()
def _fails(i, y):
    if i == 3:
        raise ValueError("task three")
    y[i] = 1


@parallel()
def _task(task, launch):
    launch[task] += task


@jit.helper()
def _copied(x, y):
    flat = x.reshape(-1)
    for j in range(len(flat)):
        y[j] = flat[j : j + 1].view(y.dtype)[0]


@parallel()
def _views(i, x, y):
    _copied(x[i], y[i])


@jit.helper()
def _scratch(x):
    z = np.zeros(x.size, x.dtype)
    z[:] = x
    return z


@parallel()
def _makes(i, x, y):
    y[i] = _scratch(x[i]) * 2
    y[i, 0] += x[i][x[i] > 0].sum()


@parallel()
def _takes(i, x, at, y):
    y[i] += x[at][0]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 100])
@pytest.mark.parametrize("threads", [1, jit.config.NUMBA_NUM_THREADS])
def test_every_index_runs_once(n, threads):
    before = jit.get_num_threads()
    jit.set_num_threads(threads)
    try:
        x, y = np.random.default_rng(0).standard_normal((n, 5)), np.zeros(n)
        _sums(n, x, y, (2, 3), True)
        _sums(n, np.asfortranarray(x), y, (2, 3), False)  # another layout is another signature
    finally:
        jit.set_num_threads(before)
    np.testing.assert_allclose(y, 3 * (x.sum(1) + 6), rtol=1e-12, atol=1e-12)


def test_parameters_may_be_named_like_the_launchers_own():
    a = np.ones(4, np.int64)
    _task(4, a)
    assert a.tolist() == [1, 2, 3, 4]


def test_it_looks_like_the_function_it_was():
    assert _sums.py_func.__name__ == "_sums" and _sums.py_func.__module__ == __name__
    assert _sums.py_func.__doc__ == "Task i: one row."


def test_what_a_task_raises_is_raised_after_the_others():
    y = np.zeros(9)
    with pytest.raises(ValueError, match="task three"):
        _fails(9, y)
    assert y.tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 1]
    _fails(3, y)


def test_a_helper_has_no_code_for_python():
    _shifted.compile((types.float64[::1], types.UniTuple(types.int64, 2)))
    for compiled in _shifted.overloads.values():
        assert not compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cpython_wrapper_name)


MODULE = """
import numpy as np
from minires.kernels.cpu.jit import helper
from minires.kernels.cpu.parallel import parallel

@helper()
def square(v):
    return v * v

@parallel()
def squares(i, x, y):
    y[i] = square(x[i])
"""
CODE = """
import numba, numpy as np
from of_the_test import squares
x, y = np.arange(50.0), np.zeros(50)
squares(50, x, y)
assert (y == x * x).all()
print(numba.threading_layer(), sum(squares.stats.cache_hits.values()))
"""


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_a_second_process_takes_it_from_the_cache(tmp_path, layer):
    (tmp_path / "of_the_test.py").write_text(MODULE)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = dict(PYTHONPATH=path, MINIRES_CACHE=str(tmp_path / "cache"), NUMBA_THREADING_LAYER=layer)
    for hits in (0, 1):
        command = [sys.executable, "-W", "error", "-c", CODE]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [layer, str(hits)]


@pytest.fixture
def arrays_made():
    """What counts the arrays that compiled code made, or was handed to count references to, and those it let go."""
    _nrt_python.memsys_enable_stats()
    yield lambda: (_nrt_python.memsys_get_stats_mi_alloc(), _nrt_python.memsys_get_stats_mi_free())
    _nrt_python.memsys_disable_stats()


def test_references_are_counted_only_where_an_array_is_made(arrays_made):
    x, y = np.random.default_rng(0).standard_normal((20, 5)), np.zeros((20, 5))
    _views(20, x, y)
    assert np.array_equal(x, y)
    _makes(20, x, y)
    expected = 2 * x
    expected[:, 0] += np.where(x > 0, x, 0).sum(1)
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    made, freed = arrays_made()
    _views(20, x, y)
    assert arrays_made() == (made, freed)
    _makes(20, x, y)
    made, freed = (after - before for after, before in zip(arrays_made(), (made, freed), strict=True))
    assert made == freed > 20  # in each task, and none is lost


def test_an_array_as_an_index_makes_one():
    y = np.zeros(1)
    _takes(1, np.arange(5.0), np.array([0]), y)
    _takes(1, np.arange(5.0) + 1, np.array([0]), y)
    assert y.tolist() == [1]
