"""The moving average of the weights."""

import numpy as np
import pytest

import minires
from minires import nn
from minires.engine import Tensor
from minires.models import create_model
from minires.train.ema import EMA
from minires.train.recalibrate import recalibrate


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def move(model, seed):
    """As a training step would: other weights, other statistics."""
    for i, tensor in enumerate([*model.parameters(), *model.buffers()]):
        tensor.data.copy_((numbers(*tensor.shape, seed=(seed, i)) * 10).astype(tensor.dtype))


def values(model):
    return {name: tensor.array.copy() for name, tensor in model.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys() and not [name for name in a if not np.array_equal(a[name], b[name])]


@pytest.mark.parametrize("warmup", [True, False])
def test_formula(warmup):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).double()
    ema = EMA(model, decay=0.3, warmup=warmup)
    expected = {name: p.array.copy() for name, p in model.named_parameters()}
    for t in range(5):
        move(model, t)
        ema.update()
        d = min(0.3, (1 + t) / (10 + t)) if warmup else 0.3
        expected = {name: d * expected[name] + (1 - d) * p.array for name, p in model.named_parameters()}
    own = values(model)
    with ema.applied():
        for name, p in model.named_parameters():
            np.testing.assert_allclose(p.array, expected[name], rtol=1e-13)
        assert all(np.array_equal(b.array, own[name]) for name, b in model.named_buffers())  # copied
    assert ema.updates == 5


def test_the_warm_up_ends_at_the_decay():
    model = nn.Linear(1, 1, bias=False)
    ema, rates = EMA(model, decay=0.5), []
    for _ in range(12):
        model.weight.data.copy_(np.ones((1, 1)))
        ema.load_state_dict({**ema.state_dict(), "weight": np.zeros((1, 1))})
        ema.update()
        rates.append(1 - ema.state_dict()["weight"].item())
    np.testing.assert_allclose(rates, [min(0.5, (1 + t) / (10 + t)) for t in range(12)], rtol=1e-6)
    assert rates[-1] == 0.5 and rates[0] == pytest.approx(0.1)


def test_applied_puts_the_weights_back_whatever_happens():
    model = create_model("resnet20")
    x = Tensor(numbers(2, 3, 32, 32))
    model.eval()
    ema = EMA(model)
    first = model(x).array
    move(model, 1)
    own, aliases = values(model), model.state_dict()
    for error in (None, ValueError, KeyboardInterrupt):
        try:
            with ema.applied():
                np.testing.assert_array_equal(model(x).array, first)  # no update yet: the average is the first weights
                if error is not None:
                    raise error
        except (ValueError, KeyboardInterrupt) as caught:
            assert type(caught) is error
        same(values(model), own)
        same({name: t.array for name, t in aliases.items()}, own)  # those who hold the tensors see them too


def test_recalibration_within_it_is_the_averages_own():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    ema = EMA(model)
    own = values(model)
    with ema.applied():
        recalibrate(model, [Tensor(numbers(4, 1, 5, 5))])
    same(values(model), own)
    assert ema.state_dict()["1.num_batches_tracked"].item() == 1
    assert not np.array_equal(ema.state_dict()["1.running_mean"].array, own["1.running_mean"])


def test_goes_on_bit_for_bit(tmp_path):
    whole, resumed = create_model("resnet20"), create_model("resnet20")
    resumed.load_state_dict(whole.state_dict())
    a = EMA(whole, 0.9)
    for t in range(3):
        move(whole, t)
        a.update()
    minires.save(a.state_dict(), tmp_path / "ema.safetensors")
    b = EMA(resumed, 0.9)
    b.load_state_dict(minires.load(tmp_path / "ema.safetensors"))
    for t in range(3, 6):
        for model, ema in ((whole, a), (resumed, b)):
            move(model, t)
            ema.update()
    same(*({name: t.array for name, t in ema.state_dict().items()} for ema in (a, b)))
    assert a.updates == b.updates == 6


def test_keeps_the_layout_of_the_weights():
    model = nn.Conv2d(3, 4, 3)
    model.weight.array = model.weight.array.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)  # channels last
    assert EMA(model).state_dict()["weight"].array.strides == model.weight.array.strides


def test_errors():
    model = nn.Linear(2, 2)
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"EMA: decay={decay} must be from 0 to below 1"):
            EMA(model, decay)
    ema = EMA(model)
    before = {name: t.array.copy() for name, t in ema.state_dict().items()}
    with pytest.raises(ValueError, match="another model: 'bias' is in only one"):
        ema.load_state_dict({k: v for k, v in ema.state_dict().items() if k != "bias"})
    with pytest.raises(ValueError, match=r"'weight' has shape \(3, 2\) in the state, \(2, 2\) in the model"):
        ema.load_state_dict({**ema.state_dict(), "weight": numbers(3, 2)})
    same(before, {name: t.array for name, t in ema.state_dict().items()})
    with ema.applied():
        for forbidden in (ema.update, ema.state_dict, lambda: ema.load_state_dict({}), ema.applied().__enter__):
            with pytest.raises(RuntimeError, match=r"within applied\(\)"):
                forbidden()
    same({"weight": model.weight.array, "bias": model.bias.array}, values(model))
