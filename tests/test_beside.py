"""Convolutions that do more in the same pass: the statistics of what they write, for the BatchNorm after them
(kernels/conv2d/genstats.py), and the sum of gradients at a skip connection (kernels/conv2d/dgrad_add.py)."""

import contextlib

import ml_dtypes
import numpy as np
import pytest
from minires.kernels import registry

import minires
from minires import dispatch, nn
from minires.nn import functional as F
from minires.state import unfused

WINDOW = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
SIZES = {"3x3": ((3, 16, 9, 11), (48, 16, 3, 3), (1, 1)), "1x1": ((3, 32, 9, 11), (48, 32, 1, 1), (0, 0))}


def names_of(compute):
    """The problems that a computation runs."""
    names = []
    with dispatch.observe(lambda kernel: names.append(kernel.problem.name)):
        compute()
    return names


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_a_variance_small_beside_the_mean(size, dtype):
    """y is 300 and more, its deviation some 1: a plain float32 sum of y² would be off by a tenth."""
    (shape, filters, padding), rng = SIZES[size], np.random.default_rng(0)
    x = (20 + 0.1 * rng.standard_normal(shape)).astype(dtype)
    w = (1 + 0.1 * rng.standard_normal(filters)).astype(dtype)
    x[:, :, [0, -1]] = x[:, :, :, [0, -1]] = 0  # no smaller sums at the border
    kernels, window = registry.kernels("conv2d_genstats", "cpu"), WINDOW | dict(padding=padding)
    ran = [k for k in kernels if k.step > 0 and k.takes(x, w, **window)]
    assert ran
    for k in ran:
        y, mean, var = k(x, w, **window)
        y = y.astype(np.float64)
        np.testing.assert_allclose(mean, y.mean((0, 2, 3)), rtol=1e-6, err_msg=k.name)
        np.testing.assert_allclose(var, y.var((0, 2, 3)), rtol=1e-5, err_msg=k.name)


def _layers():
    minires.manual_seed(0)
    return nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), minires.randn(2, 8, 7, 6)


def test_batch_norm_takes_what_the_convolution_summed():
    results = []
    for fused in (True, False):
        conv, bn, x = _layers()
        x.requires_grad_()

        def forward(conv=conv, bn=bn, x=x):
            results.append([bn(conv(x), relu=True), x, conv, bn])

        if fused:
            names = names_of(forward)
            assert "conv2d_genstats" in names and "batchnorm2d_fprop_train" not in names
        else:
            with unfused():
                names = names_of(forward)
            assert "conv2d_genstats" not in names and "batchnorm2d_fprop_train" in names
        y = results[-1][0]
        (y * minires.cos(minires.arange(y.numel()).reshape(*y.shape).float())).sum().backward()
    (y, x, conv, bn), (plain, *rest) = results
    np.testing.assert_allclose(y.numpy(), plain.numpy(), atol=1e-5)
    for a, b in zip((x, conv, bn), rest, strict=True):
        for t, u in [(a, b)] if a is x else zip(a.parameters(), b.parameters(), strict=True):
            np.testing.assert_allclose(t.grad.numpy(), u.grad.numpy(), atol=1e-4)
    for t, u in zip(bn.buffers(), rest[-1].buffers(), strict=True):
        np.testing.assert_allclose(t.numpy(), u.numpy(), atol=1e-6)


def test_what_was_written_into_since_is_summed_again():
    for change in (lambda y: y.mul_(3), lambda y: y[...].mul_(3)):
        conv, bn, x = _layers()
        y = conv(x)
        with minires.no_grad():
            change(y)
        assert "batchnorm2d_fprop_train" in names_of(lambda bn=bn, y=y: bn(y))
    conv, bn, x = _layers()
    y = conv(x)
    y += 1  # in the graph: another node
    assert "batchnorm2d_fprop_train" in names_of(lambda: bn(y))


def test_only_where_a_batch_norm_may_follow():
    conv, bn, x = _layers()
    assert "conv2d_genstats" in names_of(lambda: conv(x))
    with minires.no_grad():
        assert "conv2d_genstats" in names_of(lambda: bn(conv(x)))  # recalibration, checkpoints
    assert "conv2d_genstats" not in names_of(lambda: nn.Conv2d(8, 16, 3)(x))
    assert "conv2d_genstats" not in names_of(lambda: minires.nn.functional.conv2d(x, conv.weight))
    assert names_of(lambda: bn.eval()(conv(x)))[-1] == "batchnorm2d_fprop_infer"
    assert "conv2d_genstats" not in names_of(lambda: conv.eval()(x))


def test_exact_and_chosen_kernels_stay_what_they_are():
    conv, _, x = _layers()
    with dispatch.exact():
        used = []
        with dispatch.observe(lambda kernel: used.append(kernel)):
            conv(x)
        assert all(k.exact for k in used)
    with dispatch.use_kernels(conv2d_fprop="fprop_reference"):
        assert names_of(lambda: conv(x)) == ["conv2d_fprop"]


def _skip():
    """x -> relu(x) = a -> conv(a) + a."""
    minires.manual_seed(0)
    x, conv = minires.randn(2, 16, 7, 6).requires_grad_(), nn.Conv2d(16, 16, 3, padding=1, bias=False)
    a = F.relu(x)
    y = a + conv(a)
    return x, conv, a, (y * minires.cos(minires.arange(y.numel()).reshape(*y.shape).float())).sum()


def test_gradients_meet_in_the_data_gradient():
    x, conv, _, loss = _skip()
    names = names_of(loss.backward)
    assert "conv2d_dgrad_add" in names and not {"accumulate", "conv2d_dgrad"} & set(names)
    plain, plain_conv, _, loss = _skip()
    with unfused():
        names = names_of(loss.backward)
    assert "conv2d_dgrad" in names and "conv2d_dgrad_add" not in names
    np.testing.assert_allclose(x.grad.numpy(), plain.grad.numpy(), atol=1e-5)
    np.testing.assert_array_equal(conv.weight.grad.numpy(), plain_conv.weight.grad.numpy())


def test_hooks_and_retained_gradients_see_what_they_saw():
    x, _, a, loss = _skip()
    seen = []
    a.retain_grad()
    a.register_hook(lambda grad: seen.append(grad.numpy().copy()))
    loss.backward(retain_graph=True)
    first, kept = x.grad.numpy().copy(), a.grad.numpy().copy()
    np.testing.assert_array_equal(seen[0], kept)
    np.testing.assert_array_equal(first, np.where(a.numpy() > 0, kept, 0))
    loss.backward()
    np.testing.assert_allclose(x.grad.numpy(), 2 * first, rtol=1e-6)


def test_a_leaf_of_several_paths():
    for paths in (1, 2, 3):  # and one without a convolution, whose share comes last
        grads = []
        for fused in (True, False):
            minires.manual_seed(0)
            x, conv = minires.randn(1, 16, 5, 5).requires_grad_(), nn.Conv2d(16, 16, 3, padding=1)
            with contextlib.nullcontext() if fused else unfused():
                y = x * 2
                for _ in range(paths):
                    y = y + conv(x)
                names = names_of(lambda y=y: (y * minires.cos(y)).sum().backward())
            assert names.count("conv2d_dgrad_add") == (paths - 1 if fused else 0)
            grads.append(x.grad.numpy())
        np.testing.assert_allclose(*grads, rtol=1e-4, atol=1e-4)


def test_of_one_tap_gradients_are_added_apart():
    x, conv = minires.randn(1, 16, 5, 5).requires_grad_(), nn.Conv2d(16, 16, 1)
    names = names_of(lambda: (x + conv(x)).sum().backward())
    assert "conv2d_dgrad" in names and "conv2d_dgrad_add" not in names
