"""Dynamic loss scaling: the scale, the steps that are left out, and its place in a training run."""

import dataclasses

import numpy as np
import pytest

import minires
from minires import Tensor
from minires.amp import GradScaler
from minires.optim import SGD
from minires.train import load_recipe, resume, train
from minires.train.step import Diverged, TrainStep
from tests.test_resume import QUICK, finish, records

INF = float("inf")


def leaf(*values):
    return Tensor(np.array(values, np.float32), requires_grad=True)


def one_step(scaler, p, optimizer, slope):
    """Minimise slope * p."""
    optimizer.zero_grad()
    scaler.scale((p * slope).sum()).backward()
    scaler.step(optimizer)
    scaler.update()


def test_the_step_is_that_of_the_unscaled_gradient():
    p, q = leaf(1, 2), leaf(1, 2)
    one_step(GradScaler(init_scale=1024), p, SGD([p], lr=0.1), 3.0)
    one_step(GradScaler(enabled=False), q, SGD([q], lr=0.1), 3.0)
    np.testing.assert_array_equal(p.array, q.array)


@pytest.mark.parametrize("bad", [INF, -INF, float("nan")])
def test_a_step_that_is_not_finite_is_left_out_and_the_scale_falls(bad):
    p = leaf(1, 2)
    scaler, optimizer = GradScaler(init_scale=8, growth_interval=2), SGD([p], lr=0.1, momentum=0.9)
    one_step(scaler, p, optimizer, bad)
    assert p.tolist() == [1, 2] and scaler.get_scale() == 4 and not optimizer.state
    one_step(scaler, p, optimizer, 1.0)
    assert scaler.get_scale() == 4
    one_step(scaler, p, optimizer, 1.0)
    assert scaler.get_scale() == 8, "it grows after growth_interval clean steps"


def test_gradients_can_be_looked_at_between():
    p = leaf(1, 2)
    scaler, optimizer = GradScaler(init_scale=16), SGD([p], lr=0.1)
    scaler.scale((p * 3.0).sum()).backward()
    assert p.grad.tolist() == [48, 48]
    scaler.unscale_(optimizer)
    assert p.grad.tolist() == [3, 3] and not scaler.overflowed(optimizer)
    with pytest.raises(RuntimeError, match="was called already, or step"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="was called already since"):
        scaler.step(optimizer)
    scaler.update()
    with pytest.raises(RuntimeError, match="needs a step"):
        scaler.update()
    np.testing.assert_allclose(p.array, [0.7, 1.7], rtol=1e-6)


def test_float16_gradients_that_would_be_zero():
    """1e-9 is 0 in float16; times 65536 it is not."""
    w, x = Tensor(np.ones((1, 4), np.float32), requires_grad=True), Tensor(np.ones((1, 4), np.float32))
    for scaler, wanted in ((GradScaler(), 1e-9), (GradScaler(enabled=False), 0.0)):
        w.grad = None
        with minires.autocast("cpu", dtype=minires.float16):
            y = minires.ops.linear(x, w)
        scaler.scale(y.float().sum() * 1e-9).backward()
        scaler.unscale_(SGD([w], lr=1.0))
        np.testing.assert_allclose(w.grad.array, wanted, rtol=2**-7)


def test_lists_states_and_refusals():
    scaler, other = GradScaler(init_scale=4.0), GradScaler()
    assert [t.item() for t in scaler.scale([leaf(1.0).sum(), leaf(2.0).sum()])] == [4, 8]
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == scaler.state_dict() and other.get_scale() == 4
    assert GradScaler(enabled=False).state_dict() == {} and GradScaler(enabled=False).get_scale() == 1
    with pytest.raises(ValueError, match="the state dict is empty"):
        scaler.load_state_dict({})
    with pytest.raises(ValueError, match="growth_factor=1 must be above 1"):
        GradScaler(growth_factor=1)
    narrow = Tensor(np.ones(2, np.float16), requires_grad=True)
    (narrow * 2).sum().backward()
    with pytest.raises(ValueError, match="gradients of float16"):
        scaler.step(SGD([narrow], lr=1.0))
    scaler = GradScaler()
    scaler.update(32.0)
    assert scaler.get_scale() == 32


@pytest.mark.peers
def test_the_scale_goes_where_torchs_goes():
    torch = pytest.importorskip("torch")
    slopes = [1.0, INF, 1.0, 1.0, 1.0, INF, INF, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    settings = dict(init_scale=64.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=3)
    mine, theirs = GradScaler(**settings), torch.amp.GradScaler("cpu", **settings)
    p, q = leaf(1.0), torch.ones(1, requires_grad=True)
    ours, others = SGD([p], lr=0.1, momentum=0.9), torch.optim.SGD([q], lr=0.1, momentum=0.9)
    for slope in slopes:
        one_step(mine, p, ours, slope)
        one_step(theirs, q, others, slope)
        assert mine.get_scale() == theirs.get_scale() and mine.state_dict() == theirs.state_dict()
        np.testing.assert_allclose(p.array, q.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_that_was_stopped_is_the_run_that_never_was(tmp_path, precision):
    recipe = dataclasses.replace(QUICK, precision=precision, epochs=1, steps=7, accumulate=2, ema=0.9, clip=1.0)
    finish(tmp_path / "whole", recipe, [])
    finish(tmp_path / "parts", recipe, [2, 5])
    whole, parts = (minires.load(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, value in whole.items():
        assert value.dtype != minires.bfloat16
        np.testing.assert_array_equal(value.array, parts[name].array)
    assert records(tmp_path / "whole") == records(tmp_path / "parts")
    with pytest.raises(ValueError, match="precision='fp32' differs from the run's"):
        resume(tmp_path / "whole", {"precision": "fp32"})


def test_the_scale_is_taken_up_again(tmp_path, monkeypatch):
    """With a growth interval of 2 the scale and the count of clean steps are other ones at every step."""
    monkeypatch.setattr("minires.train.precision.GradScaler", lambda *a, **k: GradScaler(*a, **k, growth_interval=2))
    recipe, real = dataclasses.replace(QUICK, precision="fp16", epochs=1, steps=6), GradScaler.update
    scales: list[float] = []
    monkeypatch.setattr(GradScaler, "update", lambda self: (real(self), scales.append(self.get_scale()))[0])
    finish(tmp_path / "whole", recipe, [])
    finish(tmp_path / "parts", recipe, [3])
    assert scales[:6] == scales[6:] and len(set(scales)) > 1


def runner(precision, **changes):
    recipe = load_recipe("digits", {"precision": precision, **changes})
    model = minires.nn.Sequential(minires.nn.Flatten(), minires.nn.Linear(4, 3))
    return TrainStep(recipe, model, SGD(model.parameters(), lr=0.1)), model


def test_a_loss_that_is_nan_is_no_stop_in_float16():
    step, model = runner("fp16")
    bad, good, labels = Tensor(np.full((2, 4), np.nan, np.float32)), minires.ones(2, 4), minires.tensor([0, 1])
    before = [p.array.copy() for p in model.parameters()]
    loss, right = step(1, bad, labels)
    assert np.isnan(loss) and right in (0, 1, 2) and step.scaler.get_scale() == 2.0**15
    for p, was in zip(model.parameters(), before, strict=True):
        np.testing.assert_array_equal(p.array, was)
    assert np.isfinite(step(2, good, labels)[0])
    assert not np.array_equal(next(model.parameters()).array, before[0])
    with pytest.raises(Diverged, match="the loss is nan in step"):
        for number in range(3, 40):  # for ever would be too long
            step(number, bad, labels)


def test_a_loss_that_is_nan_is_a_stop_in_bfloat16():
    step, _ = runner("bf16")
    with pytest.raises(Diverged, match="the loss is nan in step 1"):
        step(1, Tensor(np.full((2, 4), np.nan, np.float32)), minires.tensor([0, 1]))


def test_the_command_line_names_a_precision_that_is_none(capsys):
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(minires.cli.main(["train", "--precision", "int8"]))
    assert stop.value.code == 2 and "fp16" in capsys.readouterr().err


def test_what_a_run_says_of_its_precision(tmp_path):
    recipe = dataclasses.replace(QUICK, precision="bf16", epochs=1, steps=1, out=str(tmp_path / "run"))
    assert train(recipe).recipe["precision"] == "bf16"
    assert 'precision = "bf16"' in (tmp_path / "run" / "recipe.toml").read_text()
