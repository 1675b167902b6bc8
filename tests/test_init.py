"""Initial values: bounds, moments, fans, seeds and errors."""

import math

import numpy as np
import pytest

from minires import random
from minires.engine import Tensor
from minires.nn import BatchNorm2d, Conv2d, Linear, Parameter, init

SHAPE = (40, 30, 3, 5)  # fan_in 450, fan_out 600, 18000 numbers


def _tensor(shape=SHAPE, dtype=np.float64):
    return Parameter(np.full(shape, np.nan, dtype))


def _check_moments(values, mean, std):
    """Mean and standard deviation within five standard errors (a normal's; a uniform's are smaller)."""
    n = values.size
    assert abs(values.mean() - mean) < 5 * std / math.sqrt(n)
    assert abs(values.std() - std) < 5 * std / math.sqrt(2 * n)


@pytest.mark.parametrize(
    ("fill", "std", "uniform"),
    [
        (lambda t: init.kaiming_normal_(t), math.sqrt(2 / 450), False),
        (lambda t: init.kaiming_normal_(t, mode="fan_out", nonlinearity="relu"), math.sqrt(2 / 600), False),
        (lambda t: init.kaiming_normal_(t, a=math.sqrt(5)), math.sqrt(1 / 3 / 450), False),
        (lambda t: init.kaiming_uniform_(t, mode="fan_out"), math.sqrt(2 / 600), True),
        (lambda t: init.kaiming_uniform_(t, nonlinearity="tanh"), 5 / 3 / math.sqrt(450), True),
        (lambda t: init.xavier_normal_(t, gain=2.0), 2 * math.sqrt(2 / 1050), False),
        (lambda t: init.xavier_uniform_(t), math.sqrt(2 / 1050), True),
        (lambda t: init.normal_(t, 0.0, 0.3), 0.3, False),
        (lambda t: init.uniform_(t, -1.0, 1.0), 1 / math.sqrt(3), True),
    ],
)
def test_moments(fill, std, uniform):
    random.manual_seed(7)
    tensor = _tensor()
    assert fill(tensor) is tensor
    _check_moments(tensor.array, 0.0, std)
    bound = math.sqrt(3) * std
    if uniform:
        assert 0.99 * bound < abs(tensor.array).max() <= bound
    else:
        assert abs(tensor.array).max() > 1.5 * bound


def test_mean_and_interval():
    random.manual_seed(7)
    _check_moments(init.normal_(_tensor(), 2.0, 0.5).array, 2.0, 0.5)
    values = init.uniform_(_tensor(), 3.0, 5.0).array
    assert 3.0 <= values.min() < 3.01 and 4.99 < values.max() < 5.0


def test_trunc_normal():
    random.manual_seed(7)
    values = init.trunc_normal_(_tensor(), 0.0, 1.0, -1.0, 0.5).array
    assert -1.0 <= values.min() < -0.99 and 0.49 < values.max() <= 0.5
    density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (-1.0, 0.5)]
    mass = (math.erf(0.5 / math.sqrt(2)) - math.erf(-1.0 / math.sqrt(2))) / 2
    _check_moments(values, (density[0] - density[1]) / mass, values.std())
    with pytest.raises(ValueError, match="must reach to within two std"):
        init.trunc_normal_(_tensor(), 9.0)
    with pytest.raises(ValueError, match="must reach to within two std"):
        init.trunc_normal_(_tensor(), a=1.0, b=1.0)


def test_constants():
    assert (init.constant_(_tensor(), 0.25).array == 0.25).all()
    assert (init.ones_(_tensor()).array == 1).all()
    assert (init.zeros_(_tensor()).array == 0).all()


def test_fills_in_place_outside_the_graph():
    tensor = _tensor()
    array, version = tensor.array, tensor.version[0]
    for fill in (init.zeros_, init.kaiming_normal_):
        fill(tensor)
    assert tensor.array is array and tensor.is_leaf and tensor.requires_grad
    assert tensor.version[0] == version + 2  # a graph that saved it notices


def test_the_seed_decides():
    random.manual_seed(3)
    first = Conv2d(3, 4, 3).weight.array
    random.manual_seed(3)
    assert np.array_equal(Conv2d(3, 4, 3).weight.array, first)
    assert not np.array_equal(Conv2d(3, 4, 3).weight.array, first)
    own = [init.normal_(_tensor(), generator=np.random.default_rng(5)).array for _ in range(2)]
    assert np.array_equal(*own)


def test_every_dtype_and_memory_order_gets_the_same_numbers():
    random.manual_seed(3)
    double = init.normal_(_tensor())
    random.manual_seed(3)
    single = init.normal_(_tensor(dtype=np.float32))
    random.manual_seed(3)
    n, c, h, w = SHAPE
    channels_last = init.normal_(Tensor(np.empty((n, h, w, c)).transpose(0, 3, 1, 2)))
    assert np.array_equal(single.array, double.array.astype(np.float32))
    assert np.array_equal(channels_last.array, double.array)


def test_default_initialisation_of_layers():
    random.manual_seed(5)
    for layer, fan_in in ((Conv2d(16, 32, 3), 144), (Conv2d(16, 32, 3, groups=4), 36), (Linear(200, 100), 200)):
        for tensor in (layer.weight, layer.bias):
            assert abs(tensor.array).max() <= 1 / math.sqrt(fan_in)
        assert abs(layer.weight.array).max() > 0.99 / math.sqrt(fan_in)
        assert layer.bias.array.std() > 0.3 / math.sqrt(fan_in)
    bn = BatchNorm2d(3)
    assert bn.weight.array.tolist() == [1, 1, 1] and bn.bias.array.tolist() == [0, 0, 0]
    assert bn.running_mean.array.tolist() == [0, 0, 0] and bn.running_var.array.tolist() == [1, 1, 1]


def test_fans_and_gains():
    assert init.fans(_tensor()) == (450, 600)
    assert init.fans(_tensor((5, 7))) == (7, 5)
    assert init.calculate_gain("relu") == math.sqrt(2)
    assert init.calculate_gain("tanh") == 5 / 3
    assert init.calculate_gain("leaky_relu", 0.0) == math.sqrt(2)
    assert init.calculate_gain("linear") == init.calculate_gain("conv2d") == init.calculate_gain("sigmoid") == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init.kaiming_normal_(_tensor((3,))), r"need weights \(O, I, ...\), not shape \(3,\)"),
        (lambda: init.xavier_uniform_(_tensor((3,))), "need weights"),
        (lambda: init.kaiming_normal_(_tensor(), mode="fan_avg"), "mode='fan_avg' must be"),
        (lambda: init.kaiming_normal_(_tensor(), nonlinearity="swish"), "unknown nonlinearity 'swish'; known: linear"),
        (lambda: init.normal_(_tensor(), std=-1.0), "scale < 0|std=-1.0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.peers
@pytest.mark.parametrize("name", ["relu", "tanh", "sigmoid", "linear", "conv2d", "selu", "leaky_relu"])
def test_gains_equal_pytorch(name):
    import torch

    assert init.calculate_gain(name) == torch.nn.init.calculate_gain(name)
    if name == "leaky_relu":
        assert init.calculate_gain(name, 0.3) == torch.nn.init.calculate_gain(name, 0.3)
