"""What some tests need and not every machine has; where it is missing they are skipped, with the reason."""

import importlib.util
import os

import pytest
from minires.kernels.cuda import compile as compiler


def nvrtc():
    """Skip this test, or this file, where CUDA kernels cannot be compiled.

    Under CI with CuPy installed that is an error: there these tests are meant to run, and would be missed by nobody.
    """
    try:
        compiler.supported_archs()
    except RuntimeError as error:
        if os.environ.get("CI") and importlib.util.find_spec("cupy"):
            raise
        pytest.skip(str(error), allow_module_level=True)
