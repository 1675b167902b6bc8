"""True averages of the statistics of batch normalisation."""

import numpy as np
import pytest

from minires import nn
from minires.engine import Tensor
from minires.models import create_model
from minires.train.recalibrate import recalibrate


def batches(count=4, n=8, channels=3, size=6):
    rng = np.random.default_rng(0)
    return [
        Tensor((rng.standard_normal((n, channels, size, size)) * (i + 1) + i).astype(np.float32)) for i in range(count)
    ]


def values(model):
    return {name: b.array.copy() for name, b in model.named_buffers()}


def test_means_and_unbiased_variances_over_all_batches():
    norm = nn.BatchNorm2d(3, momentum=0.7)
    norm.running_mean.copy_(np.full(3, 1e6))  # leaves no trace
    data = batches()
    assert recalibrate(norm, ((x, None) for x in data)) == 4
    means = [x.array.astype(np.float64).mean((0, 2, 3)) for x in data]
    variances = [x.array.astype(np.float64).var((0, 2, 3), ddof=1) for x in data]
    np.testing.assert_allclose(norm.running_mean.array, np.mean(means, 0), rtol=1e-5)
    np.testing.assert_allclose(norm.running_var.array, np.mean(variances, 0), rtol=1e-5)
    assert norm.momentum == 0.7 and norm.training and norm.num_batches_tracked.item() == 4


@pytest.mark.parametrize("training", [True, False])
def test_a_network_with_its_modes_put_back(training):
    model = create_model("resnet20").train(training)
    model.fc.train(not training)
    modes = [m.training for m in model.modules()]
    weights = {name: p.array.copy() for name, p in model.named_parameters()}
    data = batches(3, 4, 3, 16)
    recalibrate(model, data)
    assert modes == [m.training for m in model.modules()]
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    assert all(np.array_equal(p.array, weights[name]) and p.grad is None for name, p in model.named_parameters())
    # bn1 sees the same whatever comes behind it; the order of batches changes nothing but rounding
    x = [model.conv1(x).array for x in data]
    np.testing.assert_allclose(model.bn1.running_mean.array, np.mean([a.mean((0, 2, 3)) for a in x], 0), atol=1e-5)
    first = values(model)
    recalibrate(model, data[::-1])
    for name, array in values(model).items():
        np.testing.assert_allclose(array, first[name], rtol=1e-3, atol=1e-4)


def test_with_one_batch_evaluation_is_training():
    """Normalising by that batch's own statistics, up to m / (m - 1) in the variance."""
    model, x = create_model("resnet20"), batches(1, 16, 3, 16)[0]
    trained = model(x).array
    recalibrate(model, [x])
    np.testing.assert_allclose(model.eval()(x).array, trained, rtol=0.02, atol=0.02 * np.abs(trained).max())


def test_dropout_is_off_and_frozen_norms_stay():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[2].eval()
    before, x = values(model[2]), batches(1)[0]
    recalibrate(model, [x])
    np.testing.assert_allclose(model[1].running_mean.array, x.array.mean((0, 2, 3)), atol=1e-5)
    assert all(np.array_equal(before[name], b) for name, b in values(model[2]).items())
    assert [m.training for m in model] == [True, True, False]


def test_nothing_changes_where_it_fails():
    model = nn.Sequential(nn.BatchNorm2d(3))
    before = values(model)

    def broken():
        yield batches(1)[0]
        raise OSError("the disk is gone")

    for bad, error in (([], ValueError), (broken(), OSError), ([Tensor(np.zeros((2, 5, 4, 4), "f4"))], ValueError)):
        with pytest.raises(error):
            recalibrate(model, bad)
        assert all(np.array_equal(before[name], b) for name, b in values(model).items())
        assert model[0].momentum == 0.1 and model.training
    assert recalibrate(nn.Linear(2, 2), [Tensor(np.zeros((1, 2), "f4"))]) == 1  # nothing to do
