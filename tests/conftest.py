"""Settings of the whole test run."""

import os

import pytest
from hypothesis import HealthCheck, settings
from minires.kernels.cpu.jit import set_num_threads

from minires import dispatch, tuning

# Compiling a kernel takes seconds, so no example has a deadline; under CI the drawn examples are the same every time.
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:
    set_num_threads(1)  # a process per core; a test that is about threads asks for two


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """For the whole suite a process per core; where files are named this one alone, with its debugger."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    unsaid = config.getoption("numprocesses", 0) is None and not config.option.usepdb
    if unsaid and not named and not WORKER:  # a worker has workers of its own otherwise
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        config.option.numprocesses, config.option.dist = os.cpu_count(), "worksteal"


@pytest.fixture(autouse=True)
def _own_memory_of_autotune(tmp_path, monkeypatch):
    """What tests measure, or pretend to, is not remembered for the user, nor for the next test."""
    monkeypatch.setattr(dispatch, "_measured", {})
    monkeypatch.setattr(tuning, "path", lambda: tmp_path / "autotune.json")
