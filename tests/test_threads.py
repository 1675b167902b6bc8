"""A training step gives the same bits on any number of threads, with every threading layer, without BLAS."""

import os
import subprocess
import sys

import pytest

STEP = """
import sys
import numba
import numpy as np
import minires
from minires.dispatch import observe
from minires.kernels.cpu.jit import set_num_threads

def step(threads):
    set_num_threads(threads)
    minires.manual_seed(0)
    model = minires.models.create_model("resnet20", num_classes=10)
    optimizer = minires.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    rng = np.random.default_rng(0)
    x = minires.from_numpy(rng.standard_normal((32, 3, 16, 16)).astype(np.float32))
    for _ in range(2):
        loss = minires.nn.functional.cross_entropy(model(x), minires.from_numpy(rng.integers(0, 10, 32)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = [t.array for t in model.state_dict().values()] + [p.grad.array for p in model.parameters()]
    with minires.no_grad():
        found.append(minires.nn.fuse_for_inference(model)(x).array)
    return found

used = set()
with observe(used.add):
    one, two = step(1), step(2)
assert numba.threading_layer() == sys.argv[1], numba.threading_layer()
assert all(np.isfinite(a).all() for a in one)
assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True)), "other bits on two threads"
plain = sorted(k.name for k in used if k.dtypes == ("any",))
assert not plain, f"plain array code, which may be BLAS: {plain}"
"""


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_same_bits_with_every_threading_layer(layer):
    environment = {**os.environ, "NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", STEP, layer], env=environment, capture_output=True, text=True)
    if "No threading layer could be loaded" in run.stderr:
        pytest.skip(f"Numba has no {layer} here")
    assert run.returncode == 0, run.stderr
