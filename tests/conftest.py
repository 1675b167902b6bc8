"""Settings of the whole test run."""

import os

import pytest
from hypothesis import HealthCheck, settings

from minires import tuning

# Compiling a kernel takes seconds, so no example has a deadline; under CI the drawn examples are the same every time.
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def _own_memory_of_autotune(tmp_path, monkeypatch):
    """What tests measure, or pretend to, is not remembered for the user."""
    monkeypatch.setattr(tuning, "path", lambda: tmp_path / "autotune.json")
