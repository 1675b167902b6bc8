"""Threads of a launch keep apart (kernels/cpu/placement.py), and the thread that launches stays free to go anywhere."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from minires.kernels.cpu import jit
from minires.kernels.cpu.parallel import parallel
from numba import types

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2 or jit.config.NUMBA_NUM_THREADS < 2,
    reason="needs Linux, two processors and two threads",
)
_place = types.ExternalFunction("sched_getcpu", types.int32())
_thread = types.ExternalFunction("pthread_self", types.uint64())


@jit.helper()
def _stay(places, threads, steps):
    """Where a thread is now and then."""
    x = 1.0
    for i in range(places.size):
        for _ in range(steps):
            x = x * 0.999999 + places[i]
        places[i] = _place() + (0 if x < 1e300 else 1)
    threads[0] = _thread()


@parallel()
def _look(task, places, threads, steps):
    _stay(places[task], threads[task : task + 1], steps)


@parallel()
def _fail(task, y):
    if y[task] == 0:
        raise ValueError("a task that fails")


def looked(tasks=2, steps=1000):
    places, threads = np.zeros((tasks, 8)), np.zeros(tasks, np.uint64)
    _look(tasks, places, threads, steps)
    return places, threads


@pytest.fixture(autouse=True)
def two_threads():
    before = jit.get_num_threads()
    jit.set_num_threads(2)
    yield
    jit.set_num_threads(before)


def test_two_threads_run_on_two_processors_and_stay_there():
    together = 0
    for launch in range(60):
        places, threads = looked(steps=200_000 if launch % 20 == 19 else 1000)
        if threads[0] != threads[1]:  # else one was done with both before the other woke
            together += 1
            assert (places == places[:, :1]).all() and places[0, 0] != places[1, 0]
        if launch % 10 == 9:
            time.sleep(0.02)  # after it the system chooses a place anew
    assert together


def test_the_caller_may_go_where_it_could_before():
    before = os.sched_getaffinity(0)
    looked()
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ValueError, match="a task that fails"):
        _fail(2, np.zeros(2))
    assert os.sched_getaffinity(0) == before
    found = []
    thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    assert found == [before]


def test_launches_of_several_threads_do_not_hinder_each_other():
    """Each has a pool of its own in OpenMP; more threads than processors."""
    wrong = []

    def work():
        jit.set_num_threads(2)
        before = os.sched_getaffinity(0)
        for _ in range(30):
            looked()
        if os.sched_getaffinity(0) != before:
            wrong.append(before)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


RESTRICTED = """
import os
from test_placement import looked
from minires.kernels.cpu import jit

everywhere = os.sched_getaffinity(0)
first = min(everywhere)
os.sched_setaffinity(0, {first})
jit.set_num_threads(2)
for _ in range(5):
    places, _ = looked()
    assert (places == first).all(), places
assert os.sched_getaffinity(0) == {first}
os.sched_setaffinity(0, everywhere)
for _ in range(5):
    looked()
assert os.sched_getaffinity(0) == everywhere
"""


def test_a_process_stays_where_it_was_put():
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2", "PYTHONPATH": os.path.dirname(__file__)}
    environment["NUMBA_THREADING_LAYER"] = "workqueue"  # OpenMP lowers the number of threads by itself
    run = subprocess.run([sys.executable, "-c", RESTRICTED], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
