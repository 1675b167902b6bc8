"""Learning-rate schedules: pure functions of the step, by hand and against PyTorch (peers)."""

import math

import numpy as np
import pytest

from minires.nn import Parameter
from minires.optim import SGD, AdamW
from minires.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LinearWarmup,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)


def _sgd(*lrs, **settings):
    return SGD([{"params": [Parameter(np.zeros(2))], "lr": lr} for lr in lrs or (0.1,)], lr=0.1, **settings)


MAKERS = {
    "step": lambda o: StepLR(o, 7, gamma=0.5),
    "multi_step": lambda o: MultiStepLR(o, [30, 5, 5, 20], gamma=0.3),
    "cosine": lambda o: CosineAnnealingLR(o, 20, eta_min=0.01),
    "linear": lambda o: LinearLR(o, 0.25, 0.75, total_iters=9),
    "lambda": lambda o: LambdaLR(o, [lambda step: 1 / (1 + step), lambda step: 0.9**step]),
    "sequential": lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1.0, 5), CosineAnnealingLR(o, 30)], [5]),
    "warmup": lambda o: LinearWarmup(o, 5, CosineAnnealingLR(o, 30)),
    "one_cycle": lambda o: OneCycleLR(o, [0.5, 0.05], 50),
    "one_cycle_linear": lambda o: OneCycleLR(o, 0.5, 50, pct_start=0.4, anneal_strategy="linear", div_factor=5.0),
    "one_cycle_three": lambda o: OneCycleLR(o, 0.5, epochs=5, steps_per_epoch=10, three_phase=True),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_object_is_its_pure_function(name):
    optimizer = _sgd(0.1, 0.02)
    schedule = MAKERS[name](optimizer)
    expected = [schedule.lrs_at(step) for step in range(50)]
    for step in range(50):
        assert schedule.get_last_lr() == [g["lr"] for g in optimizer.param_groups] == expected[step]
        schedule.step()


@pytest.mark.parametrize("name", MAKERS)
def test_going_on_from_a_state_dict(name):
    optimizer = _sgd(0.1, 0.02)
    schedule = MAKERS[name](optimizer)
    for _ in range(17):
        schedule.step()
    assert schedule.state_dict() == {"last_epoch": 17}
    other_optimizer = _sgd(0.1, 0.02)
    other = MAKERS[name](other_optimizer)
    other.load_state_dict(schedule.state_dict())
    for _ in range(20):
        for ours, theirs in zip(other_optimizer.param_groups, optimizer.param_groups, strict=True):
            assert (ours["lr"], ours["momentum"]) == (theirs["lr"], theirs["momentum"])
        schedule.step()
        other.step()


def test_by_hand():
    assert StepLR.lr_at(14, 1.0, step_size=7, gamma=0.5) == 0.25
    assert MultiStepLR.lr_at(20, 1.0, milestones=(5, 20), gamma=0.5) == 0.25
    assert MultiStepLR.lr_at(19, 1.0, milestones=(5, 20), gamma=0.5) == 0.5
    assert CosineAnnealingLR.lr_at(0, 1.0, T_max=10) == 1.0
    assert CosineAnnealingLR.lr_at(5, 1.0, T_max=10, eta_min=0.2) == pytest.approx(0.6, rel=1e-15)
    assert CosineAnnealingLR.lr_at(10, 1.0, T_max=10, eta_min=0.2) == pytest.approx(0.2, rel=1e-15)
    assert LinearLR.lr_at(3, 1.0, start_factor=0.25, end_factor=1.0, total_iters=6) == 0.625
    assert LinearLR.lr_at(60, 1.0, start_factor=0.25, end_factor=1.0, total_iters=6) == 1.0
    assert LambdaLR.lr_at(3, 2.0, lr_lambda=lambda step: step + 1) == 8.0
    assert OneCycleLR.lr_at(0, 1.0, total_steps=100) == pytest.approx(1 / 25, rel=1e-15)
    assert OneCycleLR.lr_at(29, 1.0, total_steps=100) == pytest.approx(1.0, rel=1e-15)
    assert OneCycleLR.lr_at(99, 1.0, total_steps=100) == pytest.approx(1 / 25 / 1e4, rel=1e-12)


def test_warmup_then_schedule():
    optimizer = _sgd(1.0)
    schedule = LinearWarmup(optimizer, 4, MultiStepLR(optimizer, [3]), start_factor=0.2)
    lrs = [schedule.lrs_at(step)[0] for step in range(9)]
    assert lrs == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 0.1, 0.1], rel=1e-15)
    alone = LinearWarmup(_sgd(1.0), 2, start_factor=0.5)
    assert [alone.lrs_at(step)[0] for step in range(4)] == pytest.approx([0.5, 0.75, 1.0, 1.0])


def test_a_milestone_belongs_to_what_comes_after():
    optimizer = _sgd(1.0)
    schedules = [LambdaLR(optimizer, lambda step, level=level: level + step) for level in (10, 20, 30)]
    schedule = SequentialLR(optimizer, schedules, [2, 3])
    assert [schedule.lrs_at(step)[0] for step in range(5)] == [10, 11, 20, 30, 31]


def test_one_cycle_moves_momentum_against_lr():
    optimizer = _sgd(0.1, momentum=0.5)
    schedule = OneCycleLR(optimizer, 1.0, 40)
    assert optimizer.param_groups[0]["momentum"] == 0.95
    for _ in range(11):
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.0)
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.85)
    adam = AdamW([Parameter(np.zeros(2))], betas=(0.5, 0.99))
    OneCycleLR(adam, 1.0, 40)
    assert adam.param_groups[0]["betas"] == (0.95, 0.99)
    still = _sgd(0.1, momentum=0.5)
    OneCycleLR(still, 1.0, 40, cycle_momentum=False)
    assert still.param_groups[0]["momentum"] == 0.5


def test_one_cycle_in_a_sequence_moves_momentum_too():
    optimizer = _sgd(0.1, momentum=0.5)
    cycle = OneCycleLR(optimizer, 1.0, 40)
    schedule = SequentialLR(optimizer, [LinearLR(optimizer), cycle], [3])
    for _ in range(3 + 11):
        schedule.step()
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.85)


def test_one_cycle_of_one_step_and_without_rise():
    assert math.isfinite(OneCycleLR.lr_at(0, 1.0, total_steps=1))
    assert OneCycleLR.lr_at(0, 1.0, total_steps=1, pct_start=1.0) == 1.0
    assert OneCycleLR.lr_at(0, 1.0, total_steps=10, pct_start=0.0) < 1.0


def test_groups_keep_their_proportion():
    optimizer = _sgd(1.0, 0.5)
    schedule = StepLR(optimizer, 1, gamma=0.1)
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.1, 0.05])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda o: StepLR(o, 0), ValueError, "step_size=0"),
        (lambda o: CosineAnnealingLR(o, -3), ValueError, "T_max=-3"),
        (lambda o: LinearLR(o, start_factor=0.0), ValueError, "start_factor=0.0"),
        (lambda o: LinearWarmup(o, 0), ValueError, "steps=0"),
        (lambda o: LambdaLR(o, [abs, abs]), ValueError, "2 functions for 1 parameter groups"),
        (lambda o: SequentialLR(o, [StepLR(o, 1)], [3]), ValueError, "one ascending milestone less"),
        (lambda o: SequentialLR(o, [StepLR(_sgd(), 1)], []), ValueError, "must have its optimizer"),
        (lambda o: OneCycleLR(o, 0.1), ValueError, "needs total_steps"),
        (lambda o: OneCycleLR(o, 0.1, 10, pct_start=1.5), ValueError, "pct_start=1.5"),
        (lambda o: OneCycleLR(o, 0.1, 10, anneal_strategy="exp"), ValueError, "anneal_strategy='exp'"),
        (lambda o: OneCycleLR(o, [0.1, 0.2], 10), ValueError, "2 values of max_lr for 1"),
        (lambda o: OneCycleLR(o, 0.1, 10).lrs_at(11), ValueError, "made for 10 steps; this is step 11"),
        (lambda o: StepLR(0.1, 3), TypeError, "needs an Optimizer, not float"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make(_sgd())


def test_a_group_added_later_is_an_error():
    optimizer = _sgd()
    schedule = StepLR(optimizer, 3)
    optimizer.add_param_group({"params": [Parameter(np.zeros(1))]})
    with pytest.raises(ValueError, match="made for 1 groups, the optimizer has 2"):
        schedule.step()


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # of PyTorch's own
@pytest.mark.parametrize("name", [name for name in MAKERS if name != "warmup"])
def test_equal_to_pytorch(name, monkeypatch):
    import torch

    peers = torch.optim.lr_scheduler
    optimizer = _sgd(0.1, 0.02, momentum=0.5)
    peer = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr} for lr in (0.1, 0.02)], lr=0.1, momentum=0.5
    )
    ours = MAKERS[name](optimizer)
    for cls in ("StepLR", "MultiStepLR", "CosineAnnealingLR", "LinearLR", "LambdaLR", "SequentialLR", "OneCycleLR"):
        monkeypatch.setitem(globals(), cls, getattr(peers, cls))
    theirs = MAKERS[name](peer)
    for _ in range(50):
        for mine, want in zip(optimizer.param_groups, peer.param_groups, strict=True):
            # cosine, linear: PyTorch multiplies step by step and gathers rounding errors, largest near 0
            assert mine["lr"] == pytest.approx(want["lr"], rel=1e-12, abs=1e-15)
            assert mine["momentum"] == pytest.approx(want["momentum"], rel=1e-12)
        ours.step()
        theirs.step()
