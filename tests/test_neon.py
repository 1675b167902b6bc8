"""What is emitted for NEON computes the same on an emulated ARM processor; tests/scripts/neon_kernels.py tells how."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "scripts" / "neon_kernels.py"


def test_tiles_and_transforms_compute_the_same_on_an_emulated_arm_processor():
    pytest.importorskip("unicorn", reason="the emulator is not installed: pip install unicorn")
    command = [sys.executable, "-W", "error", str(SCRIPT)]
    done = subprocess.run(
        command, env=os.environ | {"MINIRES_SIMD": "neon"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    errors, products = {}, {}
    for name, error, count in map(str.split, done.stdout.splitlines()):
        errors[name], products[name] = float(error), int(count)
    assert len(errors) == 10 and all(error <= 1 for error in errors.values()), errors  # a NaN is none
    assert products["tile0"] == 24, "12 rows by 2 vectors of sums, in registers"
    assert min(count for name, count in products.items() if "tile" in name or "pairs" in name) >= 24, products
