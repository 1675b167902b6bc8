"""Winograd: its matrices, what its transforms share, when it is left out, and how much it rounds."""

from fractions import Fraction

import numpy as np
import pytest
from minires.kernels import registry
from minires.kernels.conv2d import amx_kernels, amx_wgrad, winograd_kernels, winograd_wgrad
from minires.kernels.conv2d.winograd import F2, F4, FORMS
from minires.kernels.cpu.jit import njit
from minires.kernels.cpu.transforms import combine, copy

import minires
from minires import dispatch, tuning
from minires.hooks import AnomalyError, AnomalyHook, TraceHook, find_anomaly

CONV = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
MATRICES = ("input", "filter", "output", "upstream", "gradient")


def _numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _kernel(problem, name):
    return next(k for k in registry.kernels(problem, "cpu") if k.name == name)


@pytest.mark.parametrize("form", FORMS.values())
def test_matrices_compute_a_correlation_exactly(form):
    rng = np.random.default_rng(0)
    inputs, filters, outputs = (
        [[Fraction(a).limit_denominator(100) for a in row] for row in m] for m in (form.input, form.filter, form.output)
    )
    x, w = ([Fraction(int(a)) for a in rng.integers(-9, 10, n)] for n in (form.patch, 3))

    def times(matrix, vector):
        return [sum((a * b for a, b in zip(row, vector, strict=True)), Fraction()) for row in matrix]

    products = [a * b for a, b in zip(times(inputs, x), times(filters, w), strict=True)]
    assert times(outputs, products) == [sum(x[i + j] * w[j] for j in range(3)) for i in range(form.tile)]


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("form", FORMS.values())
def test_combine_is_a_matrix_product(form, name):
    matrix = np.array(getattr(form, name), np.float64)
    values = _numbers(matrix.shape[1], 5)
    np.testing.assert_allclose(combine(matrix.tolist(), list(values)), matrix @ values, rtol=1e-13, atol=1e-14)


def test_combine_shares_what_mirrored_rows_and_columns_have_in_common():
    class Counted(float):
        operations = 0

        def _count(self, value):
            Counted.operations += 1
            return Counted(value)

        def __add__(self, other):
            return self._count(float(self) + other)

        def __sub__(self, other):
            return self._count(float(self) - other)

        def __rmul__(self, number):
            return Counted(number * float(self))  # fused with the addition that follows

    combine(F4.input, [Counted(a) for a in range(6)])
    assert Counted.operations == 12  # 16 without sharing
    Counted.operations = 0
    combine(F2.output, [Counted(a) for a in range(4)])
    assert Counted.operations == 4


def test_dispatch_prefers_it_and_exact_leaves_it_out():
    x, w = (_numbers(2, 16, 8, 8).astype(np.float32), _numbers(16, 16, 3, 3).astype(np.float32))
    assert not dispatch.select("conv2d_fprop", x, w, **CONV).exact
    with minires.exact():
        assert dispatch.select("conv2d_fprop", x, w, **CONV).exact
        with minires.use_kernels(conv2d_fprop="fprop_winograd"):
            assert dispatch.select("conv2d_fprop", x, w, **CONV).exact
        with minires.use_kernels(conv2d_fprop="fprop_im2col_tile"):
            assert dispatch.select("conv2d_fprop", x, w, **CONV).name == "fprop_im2col_tile"
    with minires.use_kernels(conv2d_fprop="fprop_winograd"):
        assert dispatch.select("conv2d_fprop", x, w, **CONV).name == "fprop_winograd"


def test_autotune_measures_exact_kernels_apart(monkeypatch):
    monkeypatch.setattr(dispatch, "_measured", {})
    monkeypatch.setattr(tuning, "fastest", lambda key, rivals, *_: min(rivals, key=lambda k: k.exact))
    x, w = (_numbers(1, 16, 5, 5).astype(np.float32), _numbers(16, 16, 3, 3).astype(np.float32))
    with minires.autotune():
        assert not dispatch.select("conv2d_fprop", x, w, **CONV).exact
        with minires.exact():
            assert dispatch.select("conv2d_fprop", x, w, **CONV).exact
        assert not dispatch.select("conv2d_fprop", x, w, **CONV).exact
    assert len(dispatch.plan()) == 2


def test_one_inf_spreads_over_a_tile_but_not_in_an_anomaly_hook():
    x = minires.zeros(1, 16, 12, 12)
    x.array[0, 3, 5, 5] = np.inf
    w = minires.tensor(np.abs(_numbers(16, 16, 3, 3)).astype(np.float32) + 1)

    def bad():
        return int((~np.isfinite(minires.conv2d(x, w, padding=1).array[0, 0])).sum())

    with np.errstate(all="ignore"):
        assert bad() > 9
        with minires.exact():
            assert bad() == 9
        with TraceHook() as trace, pytest.raises(AnomalyError, match=f"{9 * 16} Inf of"), AnomalyHook():
            minires.conv2d(x, w, padding=1)
        with pytest.raises(AnomalyError, match=f"{9 * 16} Inf of"):
            find_anomaly(lambda: minires.conv2d(x, w, padding=1))
    assert "winograd" not in str(trace)


@pytest.mark.parametrize("name", ["wgrad_winograd", "wgrad_winograd_2x2"])
def test_weight_gradient_in_parts(monkeypatch, name):
    """Where V and D do not fit into memory at once."""
    x, dy = _numbers(5, 208, 9, 6).astype(np.float32), _numbers(5, 192, 9, 6).astype(np.float32)
    wgrad = _kernel("conv2d_wgrad", name)
    whole = wgrad(x, dy, **CONV, kernel_hw=(3, 3))
    monkeypatch.setattr(winograd_wgrad, "_AT_ONCE", 1)
    parts = wgrad(x, dy, **CONV, kernel_hw=(3, 3))
    assert not np.array_equal(parts, whole), "it was in one part"
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-4 * np.abs(whole).max())


@pytest.mark.parametrize("c, size", [(16, 32), (64, 8)])
def test_rounding_error_of_all_three_directions(c, size):
    """Against float64: at most 1e-5 of the output's norm, where direct sums lose a few 1e-7, and F(2x2) loses less."""
    x, dy, w = _numbers(8, c, size, size), _numbers(8, c, size, size, seed=1), _numbers(c, c, 3, 3, seed=2)
    for problem, arrays, more in (
        ("conv2d_fprop", (x, w), {}),
        ("conv2d_dgrad", (dy, w), dict(input_hw=(size, size))),
        ("conv2d_wgrad", (x, dy), dict(kernel_hw=(3, 3))),
    ):
        singles = [a.astype(np.float32) for a in arrays]
        with minires.exact():
            wanted = dispatch.run(problem, *(a.astype(np.float64) for a in singles), **CONV, **more)
        large, small = (
            np.linalg.norm(_kernel(problem, f"{problem[-5:]}_winograd{form}")(*singles, **CONV, **more) - wanted)
            for form in ("", "_2x2")
        )
        assert small < large <= 1e-5 * np.linalg.norm(wanted), problem


@pytest.fixture
def without_tiles(monkeypatch):
    """A host that has no AMX."""
    for module in (amx_kernels, amx_wgrad):
        monkeypatch.setattr(module, "amx", lambda: "")
    monkeypatch.setattr(dispatch, "_takers", {})


@pytest.mark.parametrize(
    "c, k, size, taps, stride, name",
    [
        (3, 16, 32, 3, 1, "fprop_direct_tile"),  # a stem: most of its channels would be zeros
        (16, 16, 32, 3, 1, "fprop_winograd"),
        (16, 16, 7, 3, 1, "fprop_winograd"),
        (16, 16, 6, 3, 1, "fprop_winograd_2x2"),  # as many products, less rounding
        (16, 16, 2, 3, 1, "fprop_winograd_2x2"),
        (20, 20, 32, 3, 1, "fprop_winograd"),  # no direct kernel takes 20 filters
        (100, 20, 9, 3, 1, "fprop_winograd"),
        (16, 32, 32, 3, 2, "fprop_direct_tile"),
        (64, 256, 14, 1, 1, "fprop_pointwise"),
        (64, 101, 14, 1, 1, "fprop_im2col_tile"),
    ],
)
def test_static_rule(without_tiles, c, k, size, taps, stride, name):
    x, w = (np.zeros(shape, np.float32) for shape in ((2, c, size, size), (k, c, taps, taps)))
    params = CONV | dict(stride=(stride, stride), padding=(taps // 2, taps // 2))
    assert dispatch.select("conv2d_fprop", x, w, **params).name == name


@pytest.mark.parametrize(
    "c, size, with_pairs, without",
    [
        (16, 32, "fprop_direct_bfloat16", "fprop_winograd_bfloat16"),
        (64, 56, "fprop_winograd_bfloat16", "fprop_winograd_bfloat16"),
        (64, 6, "fprop_direct_bfloat16", "fprop_winograd_2x2_bfloat16"),
        (256, 14, "fprop_direct_bfloat16", "fprop_winograd_bfloat16"),
    ],
)
def test_static_rule_of_bfloat16(monkeypatch, without_tiles, c, size, with_pairs, without):
    """Where the host multiplies pairs of bfloat16, twice as fast, not with few channels, nor with many."""
    x, w = (np.zeros(shape, minires.bfloat16) for shape in ((2, c, size, size), (c, c, 3, 3)))
    for pairs, name in ((True, with_pairs), (False, without)):
        monkeypatch.setattr(winograd_kernels, "has_bfloat16_products", lambda pairs=pairs: pairs)
        monkeypatch.setattr(dispatch, "_takers", {})
        assert dispatch.select("conv2d_fprop", x, w, **CONV).name == name


@pytest.mark.parametrize("form", ["", "_2x2"])
@pytest.mark.parametrize("problem", ["conv2d_fprop", "conv2d_dgrad", "conv2d_wgrad", "conv2d_bias_act"])
def test_bfloat16_is_the_float32_result_rounded_once(problem, form):
    x, w, dy = (
        _numbers(*shape, seed=seed).astype(minires.bfloat16)
        for seed, shape in enumerate([(2, 64, 9, 11), (64, 64, 3, 3), (2, 64, 9, 11)])
    )
    arrays, more = {
        "conv2d_fprop": ((x, w), {}),
        "conv2d_dgrad": ((dy, w), dict(input_hw=(9, 11))),
        "conv2d_wgrad": ((x, dy), dict(kernel_hw=(3, 3))),
        "conv2d_bias_act": ((x, w, w[:, 0, 0, 0], dy), dict(relu=True)),
    }[problem]
    name = f"{problem.removeprefix('conv2d_')}_winograd{form}"
    narrow = _kernel(problem, f"{name}_bfloat16")(*arrays, **CONV, **more)
    wide = _kernel(problem, name)(*(a.astype(np.float32) for a in arrays), **CONV, **more)
    assert narrow.dtype == minires.bfloat16
    np.testing.assert_array_equal(narrow, wide.astype(minires.bfloat16))


@pytest.mark.parametrize("form", [F4, F2])
@pytest.mark.parametrize("c, k, hw", [(32, 96, (9, 11)), (208, 256, (5, 7))])  # by tiles, and by filters
def test_an_epilogue_over_several_panels_and_tiles_that_hang_over(form, c, k, hw):
    x, w, b, z = _numbers(2, c, *hw), _numbers(k, c, 3, 3, seed=1), _numbers(k, seed=2), _numbers(2, k, *hw, seed=3)
    arrays = [a.astype(np.float32) for a in (x, w, b, z)]
    plain = _kernel("conv2d_fprop", f"fprop_winograd{'_2x2' if form is F2 else ''}")(*arrays[:2], **CONV)
    got = _kernel("conv2d_bias_act", f"bias_act_winograd{'_2x2' if form is F2 else ''}")(*arrays, **CONV, relu=True)
    np.testing.assert_array_equal(got, np.maximum(plain + arrays[2][:, None, None] + arrays[3], 0))


@pytest.mark.parametrize("c, size, batch", [(64, 8, 32), (128, 4, 64), (32, 16, 16)])
def test_weight_gradients_have_work_for_some_threads(monkeypatch, c, size, batch):
    shares = []
    run = winograd_wgrad._by_tiles
    monkeypatch.setattr(winograd_wgrad, "_by_tiles", lambda n, *more: (shares.append(n), run(n, *more)))
    x = np.zeros((batch, c, size, size), np.float32)
    _kernel("conv2d_wgrad", "wgrad_winograd")(x, x, **CONV, kernel_hw=(3, 3))
    assert shares[0] >= 4


def test_a_copy_keeps_every_bit():
    """bfloat16 is not rounded on its way: some hosts would make zeros of the smallest numbers."""
    numbers = np.arange(1 << 16, dtype=np.uint16)
    out = np.zeros_like(numbers)
    copied(numbers, out)
    np.testing.assert_array_equal(out, numbers)


@njit()
def copied(a, out):
    copy(a.ctypes.data, out.ctypes.data, a.size, a.dtype)


@pytest.mark.parametrize(
    "c, k, size, taps, name",
    [
        (512, 512, 7, 3, "wgrad_winograd"),
        (512, 512, 2, 3, "wgrad_winograd_2x2"),
        (512, 2048, 7, 1, "wgrad_pointwise"),
        (64, 256, 56, 1, "wgrad_pointwise"),
        (512, 512, 7, 5, "wgrad_parts_tile"),
        (64, 64, 56, 5, "wgrad_direct_tile"),
    ],
)
def test_static_rule_of_weight_gradients(without_tiles, c, k, size, taps, name):
    x, dy = (np.zeros((1, n, size, size), np.float32) for n in (c, k))
    params = CONV | dict(padding=(taps // 2, taps // 2), kernel_hw=(taps, taps))
    assert dispatch.select("conv2d_wgrad", x, dy, **params).name == name
