"""AMX (kernels/cpu/amx.py): its emulation against the manual, the kernels above it by emulation, its machine code."""

import os
import platform
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from minires.kernels.conv2d import amx_kernels, amx_wgrad
from minires.kernels.cpu import features
from minires.kernels.cpu.amx_emulated import configure, release, tile_dot, tile_load, tile_store, tile_zero
from minires.kernels.cpu.bfloat16 import bits
from minires.kernels.cpu.microkernel import lanes
from minires.kernels.cpu.parallel import parallel

import minires
from minires import dispatch

wide_vectors = pytest.mark.skipif(lanes(np.float32) < 8, reason="the kernels want vectors of 8 numbers at least")
STATE_BYTES = 64 + 8 * 1024 + 64
SHAPES = {0: (5, 36), 1: (5, 28), 2: (7, 36)}  # rows and bytes of a row: C (5, 9), A (5, 14), B (7, 9, 2)


def _state(shapes=SHAPES, palette=1):
    state = np.zeros(STATE_BYTES, np.uint8)
    state[0], state[48:56], state[16:32].view(np.uint16)[:] = palette, 16, 64
    for tile, (rows, row_bytes) in shapes.items():
        state[48 + tile], state[16:32].view(np.uint16)[tile] = rows, row_bytes
    return state


@parallel()
def _product(i, state, a, b, c, zero):
    configure(state)
    tile_zero(state, 0)
    if not zero:
        tile_load(state, 0, c.ctypes.data, c.strides[0])
    tile_load(state, 1, a.ctypes.data, a.strides[0])
    tile_load(state, 2, b.ctypes.data, b.strides[0])
    tile_dot(state, 0, 1, 2)
    tile_store(state, 0, c.ctypes.data, c.strides[0])
    release(state)


@parallel()
def _after_release(i, state):
    configure(state)
    release(state)
    tile_zero(state, 0)


def _operands(rng, a=None):
    """A (5, 14), B (14, 9) in bfloat16, in memory with longer rows, and C (5, 9)."""
    a = rng.standard_normal((5, 14)) if a is None else a
    a, b = (v.astype(ml_dtypes.bfloat16) for v in (a, rng.standard_normal((14, 9))))
    wide_a, wide_b = np.full((5, 20), np.nan, a.dtype), np.full((7, 11, 2), np.nan, a.dtype)
    wide_a[:, :14], wide_b[:, :9] = a, b.reshape(7, 2, 9).swapaxes(1, 2)
    return a, b, bits(wide_a), bits(wide_b).reshape(7, 22), rng.standard_normal((5, 9)).astype(np.float32)


@pytest.mark.parametrize("zero", [False, True])
def test_emulated_product_is_the_sum_of_pairs(zero):
    a, b, in_a, in_b, c = _operands(np.random.default_rng(0))
    a, b, start = a.astype(np.float64), b.astype(np.float64), 0.0 if zero else c.astype(np.float64)
    state, out = _state(), np.full((5, 12), np.nan, np.float32)
    out[:, :9] = c
    _product(1, state, in_a, in_b, out, zero)
    error = np.abs(out[:, :9] - (start + a @ b))
    assert np.all(error <= 10 * 2.0**-24 * (np.abs(start) + np.abs(a) @ np.abs(b)))
    assert np.isnan(out[:, 9:]).all()  # nothing is stored beyond a row
    assert not state[64:].any()  # released


def test_emulated_product_knows_no_denormals_but_inf_and_nan():
    rng, a = np.random.default_rng(1), np.zeros((5, 14))
    a[0, 3], a[1, 4], a[2, 5], a[3, 0] = np.inf, np.nan, 2.0**-130, 2.0**-120
    _, _, in_a, in_b, out = _operands(rng, a)
    in_b[:] = bits(np.full(in_b.shape, 2.0**-20, ml_dtypes.bfloat16))
    out[:] = 0
    _product(1, _state(), in_a, in_b, out, False)
    assert np.all(out[0] == np.inf) and np.isnan(out[1]).all() and not out[2:].any()
    out[:] = 2.0**-127
    _product(1, _state(), in_a, in_b, out, False)
    assert not out[2:].any()


def test_what_hardware_answers_by_a_fault_is_an_error():
    _, _, a, b, c = _operands(np.random.default_rng(2))
    with pytest.raises(RuntimeError, match="before the configuration, or after its release"):
        _after_release(1, _state())
    for state in (_state({**SHAPES, 2: (8, 36)}), _state({**SHAPES, 1: (6, 28)}), _state({**SHAPES, 0: (5, 32)})):
        with pytest.raises(RuntimeError, match="the tiles of a product do not fit"):
            _product(1, state, a, b, c, True)
    for state in (_state({0: (17, 64)}), _state({3: (4, 66)}), _state({5: (0, 64)})):
        with pytest.raises(RuntimeError, match=r"1 to 16 rows of 4, 8, .* 64 bytes"):
            _product(1, state, a, b, c, True)
    with pytest.raises(RuntimeError, match="the palette is not 1"):
        _product(1, _state(palette=0), a, b, c, True)


def _python(code, **environment):
    """What a process of its own prints."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


EMULATED = """
import ml_dtypes, numpy as np
from minires import dispatch
from minires.kernels import registry
from minires.kernels.checking import Trial, check
from minires.kernels.conv2d import amx_pointwise
kernels = [k for k in registry.kernels(None, "cpu") if "_amx" in k.name]
def checked(names):
    return [check(k, case, k.dtypes[0]) for k in kernels for case in k.problem.cases
            if case.name.startswith(names) and Trial(k.problem, case, k.dtypes[0]).suits(k)]
results = checked("vectors")
amx_pointwise._LARGE_FILTERS = 0  # far
results += checked("vectors_1x1")
ways = [f"{d}_amx" for d in ("fprop", "dgrad", "wgrad", "bias_act")]
assert {r.kernel.name for r in results} == {*ways, *[f"{w}_bf16x3" for w in ways]}
x, w = np.zeros((1, 32, 8, 8), ml_dtypes.bfloat16), np.zeros((32, 32, 3, 3), ml_dtypes.bfloat16)
params = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
print(dispatch.select("conv2d_fprop", x, w, **params).name)
print(dispatch.select("conv2d_dgrad", x, w, **params, input_hw=(8, 8)).name)
x[0, 5, 3, 4], w[...] = np.inf, 1
y = dispatch.run("conv2d_fprop", x, w, **params)  # an Inf is seen by its own windows and by nobody else
print(np.isinf(y.astype(np.float32)).sum(), np.isnan(y.astype(np.float32)).sum())
print(len(results), *[r for r in results if not r.ok], sep="\\n")
"""


@wide_vectors
def test_kernels_are_right_by_emulation():
    fprop, dgrad, infinite, count, *wrong = _python(EMULATED, MINIRES_AMX="emulate")
    assert not wrong, "\n".join(wrong)
    assert (fprop, dgrad, infinite) == ("fprop_amx", "dgrad_amx", f"{9 * 32} 0") and int(count) >= 15


@wide_vectors
@pytest.mark.peers
@pytest.mark.parametrize("how", ["emulate", ""])
def test_beside_torch(how):
    """PyTorch's products of bfloat16 configure the tiles for themselves, in the same threads' registers."""
    pytest.importorskip("torch")
    if not how and features.amx() != "hardware":
        pytest.skip("no AMX tiles here")
    code = """
import torch
a = torch.randn(64, 64).bfloat16()
before = a @ a
{}
assert torch.equal(a @ a, before)
"""
    lines = _python(code.format(EMULATED), MINIRES_AMX=how)
    assert len(lines) == 4, lines


MACHINE_CODE = """
from numba import types
from minires.kernels.conv2d.amx_kernels import _multiply_images
images, pair, number = types.Array(types.uint16, 4, "C"), types.UniTuple(types.int64, 2), types.int64
bias, panels = types.Array(types.float32, 1, "C"), types.Array(types.uint32, 6, "C")
flag, sums = types.boolean, types.Array(types.float64, 3, "C")
after = bias, images, flag, types.float32, sums
arguments = number, images, panels, images, pair, pair, *[number] * 4, flag, number, *after, *[number] * 3
_multiply_images.compile(arguments)
print(_multiply_images.inspect_asm()[arguments])
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is of x86-64")
def test_machine_code_for_a_host_with_tiles(tmp_path):
    """Compiled for such a host, and not run."""
    lines = _python(
        MACHINE_CODE,
        MINIRES_AMX="off",
        MINIRES_CACHE=str(tmp_path),
        NUMBA_CPU_NAME="sapphirerapids",
        NUMBA_CPU_FEATURES="+avx2,+fma,+bmi2,+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512bf16,+amx-tile,+amx-bf16",
    )
    where = {name: [i for i, line in enumerate(lines) if name in line.split()] for name in NAMES}
    assert len(where["ldtilecfg"]) == len(where["tilerelease"]) == 1
    (first,), (last,) = where["ldtilecfg"], where["tilerelease"]
    for name in ("tilezero", "tileloadd", "tdpbf16ps", "tilestored"):
        assert len(where[name]) >= 4, name
    between = lines[first:last]  # of the function that asks for the tiles, and must not leave without their release
    assert between and not [line for line in between if "NRT" in line or line.split()[:1] in (["retq"], ["ret"])]


NAMES = ("ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease")


def test_without_tiles_nothing_chooses_them(monkeypatch):
    monkeypatch.setenv("MINIRES_AMX", "off")
    features.amx.cache_clear()
    try:
        x, w = np.zeros((1, 64, 9, 9), ml_dtypes.bfloat16), np.zeros((48, 64, 3, 3), ml_dtypes.bfloat16)
        params = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
        assert not dispatch.select("conv2d_fprop", x, w, **params).name.endswith("_amx")
        with (
            dispatch.use_kernels(conv2d_fprop="fprop_amx"),
            pytest.raises(
                NotImplementedError, match="'fprop_amx', chosen for conv2d_fprop, does not take these inputs"
            ),
        ):
            dispatch.run("conv2d_fprop", x, w, **params)
        monkeypatch.setenv("MINIRES_AMX", "on")
        features.amx.cache_clear()
        with pytest.raises(ValueError, match="MINIRES_AMX='on' is unknown: use off or emulate"):
            features.amx()
    finally:
        monkeypatch.undo()
        features.amx.cache_clear()


@wide_vectors
@pytest.mark.parametrize(
    "c, k, taps, stride, fprop, dgrad, wgrad",
    [  # of float32: Winograd's layers stay Winograd's, and so do those whose filters are few, or more than pixels
        (64, 64, 3, 1, False, False, False),
        (64, 128, 3, 2, True, True, True),
        (64, 256, 1, 1, True, True, True),
        (64, 64, 1, 1, True, True, False),
        (256, 512, 1, 2, True, False, True),
        (512, 2048, 1, 1, True, True, True),
        (512, 512, 3, 2, False, False, True),
        (16, 32, 3, 2, False, False, False),
    ],
)
def test_what_float32_takes_tiles_for(monkeypatch, c, k, taps, stride, fprop, dgrad, wgrad):
    for module in (amx_kernels, amx_wgrad):
        monkeypatch.setattr(module, "amx", lambda: "hardware")
    monkeypatch.setattr(dispatch, "_takers", {})
    size, params = 14, dict(stride=(stride,) * 2, padding=(taps // 2,) * 2, dilation=(1, 1), groups=1)
    x, dy, w = (
        np.zeros(shape, np.float32)
        for shape in ((2, c, size, size), (2, k, size // stride, size // stride), (k, c, taps, taps))
    )
    for problem, arrays, more, tiles in (
        ("conv2d_fprop", (x, w), {}, fprop),
        ("conv2d_dgrad", (dy, w), dict(input_hw=(size, size)), dgrad),
        ("conv2d_wgrad", (x, dy), dict(kernel_hw=(taps, taps)), wgrad),
    ):
        chosen = dispatch.select(problem, *arrays, **params, **more).name
        assert chosen.endswith("_amx_bf16x3") == tiles, chosen
        with minires.exact():
            assert "_amx" not in dispatch.select(problem, *arrays, **params, **more).name


@wide_vectors
def test_exact_weight_gradients_do_without_tiles(monkeypatch):
    """An Inf in a row that no window sees: on tiles it meets a zero."""
    monkeypatch.setattr(amx_wgrad, "amx", lambda: "hardware")
    monkeypatch.setattr(dispatch, "_takers", {})
    x, dy = np.ones((1, 16, 8, 8), ml_dtypes.bfloat16), np.ones((1, 16, 3, 3), ml_dtypes.bfloat16)
    x[0, 3, 7, 7] = np.inf
    params = dict(stride=(2, 2), padding=(0, 0), dilation=(1, 1), groups=1, kernel_hw=(3, 3))
    assert dispatch.select("conv2d_wgrad", x, dy, **params).name == "wgrad_amx"
    with minires.exact():
        assert np.all(dispatch.run("conv2d_wgrad", x, dy, **params).astype(np.float32) == 9)


def test_permission_is_asked_for_only_where_there_are_tiles(monkeypatch):
    asked = []
    monkeypatch.delenv("MINIRES_AMX", raising=False)
    monkeypatch.setattr(features, "_may_use_tiles", lambda: bool(asked.append(1)) or len(asked) == 1)
    monkeypatch.setattr(sys, "platform", "linux")
    for host, answer in (
        ({}, ""),
        ({"amx-tile": True}, ""),
        (dict.fromkeys(["amx-tile", "amx-bf16"], True), "hardware"),
    ):
        monkeypatch.setattr(features.llvm, "get_host_cpu_features", lambda host=host: host)
        features.amx.cache_clear()
        assert features.amx() == answer and len(asked) == bool(answer)
    features.amx.cache_clear()
    assert features.amx() == ""  # Linux refuses the second time
    features.amx.cache_clear()
