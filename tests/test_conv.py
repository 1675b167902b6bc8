"""Convolution as an op: padding in words, shapes, which gradients are computed, and errors that name the remedy."""

import numpy as np
import pytest
from minires.kernels import memory

import minires
from minires import Tensor, dispatch, ops

rng = np.random.default_rng(0)


def _tensor(*shape, dtype=np.float32, requires_grad=False):
    return Tensor(rng.standard_normal(shape).astype(dtype), requires_grad)


def _kernels_of(run):
    used = []
    with dispatch.observe(lambda k: used.append(k.problem.name)):
        run()
    return used


@pytest.mark.parametrize("taps, dilation", [((3, 3), 1), ((2, 4), 1), ((1, 2), (1, 3)), ((4, 3), (2, 1))])
def test_same_keeps_the_size_and_pads_more_after(taps, dilation):
    x, w = _tensor(1, 1, 9, 8, dtype=np.float64), _tensor(1, 1, *taps, dtype=np.float64)
    y = ops.conv2d(x, w, padding="same", dilation=dilation)
    assert y.shape == (1, 1, 9, 8)
    total = [d * (t - 1) for d, t in zip(ops.conv.pair(dilation, ""), taps, strict=True)]
    wider = np.pad(x.array, ((0, 0), (0, 0), *((t // 2, t - t // 2) for t in total)))
    np.testing.assert_allclose(y.array, ops.conv2d(Tensor(wider), w, dilation=dilation).array, rtol=1e-12)


def test_valid_is_no_padding():
    x, w = _tensor(2, 3, 7, 6), _tensor(4, 3, 3, 2)
    np.testing.assert_array_equal(ops.conv2d(x, w, padding="valid", stride=2).array, ops.conv2d(x, w, stride=2).array)


def test_unbatched_input():
    x, w, b = _tensor(3, 7, 6, requires_grad=True), _tensor(4, 3, 3, 3), _tensor(4)
    y = ops.conv2d(x, w, b, padding=1)
    assert y.shape == (4, 7, 6)
    np.testing.assert_array_equal(y.array, ops.conv2d(x[None], w, b, padding=1)[0].array)
    y.backward(_tensor(4, 7, 6))
    assert x.grad is not None and x.grad.shape == (3, 7, 6)


def test_batch_of_none():
    x, w = _tensor(0, 3, 5, 5, requires_grad=True), _tensor(2, 3, 3, 3, requires_grad=True)
    y = ops.conv2d(x, w)
    assert y.shape == (0, 2, 3, 3)
    y.backward(_tensor(0, 2, 3, 3))
    assert x.grad.shape == x.shape and not w.grad.array.any()


@pytest.mark.parametrize("wanted, kernels", [("x", ["conv2d_dgrad"]), ("w", ["conv2d_wgrad"]), ("b", [])])
def test_only_the_gradients_that_are_needed_are_computed(wanted, kernels):
    inputs = {"x": _tensor(1, 2, 5, 5), "w": _tensor(3, 2, 3, 3), "b": _tensor(3)}
    inputs[wanted].requires_grad_()
    y = ops.conv2d(*inputs.values())
    assert _kernels_of(lambda: y.backward(_tensor(*y.shape))) == kernels
    assert {name for name, t in inputs.items() if t.grad is not None} == {wanted}


def test_bias_gradient_is_the_sum_over_images_and_pixels():
    x, w, b = _tensor(2, 2, 5, 5), _tensor(3, 2, 3, 3), _tensor(3, dtype=np.float32, requires_grad=True)
    dy = _tensor(2, 3, 3, 3)
    ops.conv2d(x, w, b).backward(dy)
    np.testing.assert_allclose(b.grad.array, dy.array.sum((0, 2, 3)), rtol=1e-5)


def test_result_lies_channels_last_and_feeds_the_next_layer_without_a_copy():
    x, w, v = _tensor(2, 3, 8, 8, requires_grad=True), _tensor(4, 3, 3, 3), _tensor(5, 4, 3, 3)
    y = ops.conv2d(x, w, padding=1)
    assert y.array.transpose(0, 2, 3, 1).flags.c_contiguous
    before = memory.copies
    z = ops.conv2d(y, v)
    dz = np.ascontiguousarray(rng.standard_normal((2, 6, 6, 5)).astype(np.float32)).transpose(0, 3, 1, 2)
    z.backward(Tensor(dz))
    assert memory.copies == before


def test_complex_numbers_pass_through():
    x, w = (_tensor(*shape).array.astype(np.complex128) for shape in ((1, 2, 5, 5), (3, 2, 3, 3)))
    y = ops.conv2d(Tensor(x + 1j), Tensor(w)).array
    np.testing.assert_allclose(y.real, ops.conv2d(Tensor(x.real.copy()), Tensor(w.real.copy())).array, rtol=1e-10)
    assert np.allclose(y.imag, w.real.sum((1, 2, 3))[:, None, None])


@pytest.mark.parametrize(
    "x, w, options, error, message",
    [
        ((1, 3, 5, 5), (4, 2, 3, 3), {}, ValueError, "input of 3 channels does not fit weight"),
        ((1, 4, 5, 5), (3, 2, 3, 3), dict(groups=2), ValueError, "divisible by groups"),
        ((1, 4, 5, 5), (3, 4, 3, 3), dict(groups=0), ValueError, "groups=0"),
        ((3, 5), (4, 3, 3, 3), {}, ValueError, r"input must be \(N, C, H, W\) or \(C, H, W\)"),
        ((1, 3, 5, 5), (4, 3, 3), {}, ValueError, r"weight \(K, C/groups, R, S\)"),
        ((1, 3, 5, 2), (4, 3, 3, 3), {}, ValueError, "a filter of 3 taps with dilation 1 does not fit into 2 pixels"),
        ((1, 3, 5, 5), (4, 3, 3, 3), dict(dilation=3), ValueError, "dilation 3 does not fit into 5 pixels padded by 0"),
        ((1, 3, 5, 5), (4, 3, 3, 3), dict(stride=0), ValueError, "stride=0 must be an int or a pair of ints"),
        ((1, 3, 5, 5), (4, 3, 3, 3), dict(stride=(1, 2, 3)), ValueError, r"stride=\(1, 2, 3\)"),
        ((1, 3, 5, 5), (4, 3, 3, 3), dict(padding=-1), ValueError, "padding=-1"),
        ((1, 3, 5, 5), (4, 3, 3, 3), dict(stride=True), ValueError, "stride=True"),
        ((1, 3, 5, 5), (4, 3, 0, 3), {}, ValueError, r"weight \(4, 3, 0, 3\) is empty"),
        ((1, 0, 5, 5), (4, 0, 3, 3), {}, ValueError, r"weight \(4, 0, 3, 3\) is empty"),
        ((1, 3, 5, 5), (4, 3, 3, 3), dict(padding=1.5), ValueError, "padding=1.5"),
        ((1, 3, 5, 5), (4, 3, 3, 3), dict(padding="full"), ValueError, "padding='full' must be 'same', 'valid'"),
        ((1, 3, 5, 5), (4, 3, 3, 3), dict(padding="same", stride=2), ValueError, "padding='same' needs stride 1"),
    ],
)
def test_errors_name_the_value(x, w, options, error, message):
    with pytest.raises(error, match=message) as raised:
        ops.conv2d(_tensor(*x), _tensor(*w), **options)
    assert "\n" not in str(raised.value)


def test_numpy_integers_are_integers():
    x, w = _tensor(1, 3, 5, 5), _tensor(4, 3, 3, 3)
    assert ops.conv2d(x, w, stride=np.int64(2), padding=(np.int32(1), 0)).shape == (1, 4, 3, 2)


def test_bias_and_dtypes_must_fit():
    x, w = _tensor(1, 3, 5, 5), _tensor(4, 3, 3, 3)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), weight \(4, 3, 3, 3\) needs \(4,\)"):
        ops.conv2d(x, w, _tensor(3))
    with pytest.raises(TypeError, match=r"input is float32 and weight float64; convert one with \.to\(dtype\)"):
        ops.conv2d(x, _tensor(4, 3, 3, 3, dtype=np.float64))
    with pytest.raises(TypeError, match="input is float32 and bias float64"):
        ops.conv2d(x, w, _tensor(4, dtype=np.float64))


def test_gradcheck():
    inputs = [_tensor(*s, dtype=np.float64, requires_grad=True) for s in ((2, 4, 6, 5), (6, 2, 3, 2), (6,))]
    assert minires.gradcheck(lambda x, w, b: ops.conv2d(x, w, b, (2, 1), (1, 2), (1, 2), 2), inputs)
