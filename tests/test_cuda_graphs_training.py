"""The training loop's step in a CUDA graph, without a GPU: captured by capture_double.py, then interpreted."""

import dataclasses
import itertools

import numpy as np
import pytest
from device_double import install
from needs import nvrtc
from PIL import Image

import minires
from minires import nn, optim
from minires.engine import Function
from minires.train.loop import train
from minires.train.optimizers import make_optimizer
from minires.train.penalties import Penalty
from minires.train.recipe import Recipe
from minires.train.schedule import make_schedule
from minires.train.step import Diverged, TrainStep

nvrtc()


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    return install(monkeypatch)


class Runner:
    """The training loop's step on a small network, with or without graphs."""

    def __init__(self, graphs, model, **changes):
        minires.manual_seed(1)
        self.notes = []
        changes = dict(device="cuda", lr=0.1, clip=0.5, batch_size=4, cuda_graphs=graphs, **changes)
        self.recipe, self.model = Recipe(**changes), model().to("cuda")
        optimizer = make_optimizer(self.recipe, self.model)
        penalty = Penalty(self.model, {}, self.recipe.l1)
        self.step = TrainStep(self.recipe, self.model, optimizer, penalty, self.notes.append)
        self.schedule = make_schedule(self.recipe, optimizer, 12)

    def run(self, shape, scales=(1,) * 7):
        rng, seen = np.random.default_rng(0), []
        for number, scale in enumerate(scales):
            x = minires.tensor(scale * rng.standard_normal(shape, np.float32), device="cuda")
            with np.errstate(all="ignore"):
                loss, right = self.step(number, x, minires.tensor(rng.integers(0, 3, shape[0]), device="cuda"))
            self.schedule.step()
            seen.append((repr(loss), right, self.step.scaler.get_scale()))
        return seen, self.state()

    def state(self):
        """Weights, statistics and what the optimizer remembers, as bytes and numbers."""
        kept = [v for s in self.step.optimizer.state.values() for v in s.values()]
        state = [v if isinstance(v, int) else v.cpu().numpy().tobytes() for v in kept]
        return [t.cpu().numpy().tobytes() for t in self.model.state_dict().values()], state


def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 3))


STEPS = {
    "fp32, clipped, L1, in two parts": (dict(accumulate=2, l1=1e-3), (1,) * 6),
    "fp16, its scale halved on the way": (dict(precision="fp16"), (1, 1, 1, 1, 1e9, 1, 1)),
    "bf16, adamw": (dict(precision="bf16", optimizer="adamw"), (1,) * 6),
    "fp16, adamw, its scale halved": (dict(precision="fp16", optimizer="adamw"), (1, 1, 1, 1, 1e9, 1, 1)),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_training_loop_s_step_is_the_same_in_graphs(name):
    changes, scales = STEPS[name]
    graphed = Runner(True, dense, **changes)
    ended = graphed.run((4, 6), scales)
    eager = Runner(False, dense, **changes)
    assert ended == eager.run((4, 6), scales)
    assert graphed.step.graph.captured and graphed.step.graph.replayed and not graphed.notes
    assert ("fp16" in name) == (eager.step.scaler.get_scale() not in (1, 2.0**16))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_divergence_in_a_graph_is_named_and_changes_no_weight(optimizer):
    """Nor what the optimizer remembers: its update is in the graph, and its own number on the GPU stops it."""
    runner = Runner(True, dense, optimizer=optimizer)
    runner.run((4, 6))
    before = runner.state()
    with pytest.raises(Diverged, match=r"the loss is nan in step 0: forward: .*Reshape in 0"):
        runner.run((4, 6), scales=(np.nan,))
    assert runner.step.graph.replayed and before == runner.state()


def test_a_gradient_that_is_not_finite_in_a_graph_changes_no_weight():
    """The loss is finite: what decides in the graph is the norm of the gradient."""
    factor = minires.ones(1, device="cuda").array

    class Times(Function):
        """The identity, whose gradient is multiplied by a number on the GPU."""

        forward = staticmethod(lambda ctx, x: x * 1)
        backward = staticmethod(lambda ctx, dy: dy * factor)

    class Multiplied(nn.Module):
        def forward(self, x):
            return Times.apply(x)

    runner = Runner(True, lambda: nn.Sequential(dense(), Multiplied()))
    runner.run((4, 6))
    before = runner.state()
    factor.fill(np.inf)
    with np.errstate(all="ignore"), pytest.raises(Diverged, match=r"norm of the gradient is (nan|inf) in step 0"):
        runner.run((4, 6), scales=(1,))
    assert runner.step.graph.replayed and before == runner.state()


def test_an_update_without_its_gate_is_seen(monkeypatch):
    """The planted fault: the captured update does not look at the number that stops it."""
    real = optim.SGD.update_group
    monkeypatch.setattr(optim.SGD, "update_group", lambda self, params, group, found=None: real(self, params, group))
    with pytest.raises(AssertionError):
        test_divergence_in_a_graph_is_named_and_changes_no_weight("sgd")


def test_a_step_in_float16_that_is_left_out_before_any_other_is_not_captured():
    """Where all first steps overflow, the optimizer remembers nothing yet, and a capture would begin anew each time."""
    scales = (1e9,) * 5 + (1,) * 6
    graphed = Runner(True, dense, precision="fp16")
    ended = graphed.run((4, 6), scales)
    assert ended == Runner(False, dense, precision="fp16").run((4, 6), scales)
    assert graphed.step.graph.captured and graphed.step.graph.captures == 1


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="cuda_graphs=True needs a GPU: device='cuda', not 'cpu'"):
        Recipe(cuda_graphs=True)


def test_a_run_with_graphs_ends_with_the_same_weights(tmp_path, monkeypatch):
    """Over epochs, with their evaluation in between; on few and small images, as every kernel is interpreted."""
    monkeypatch.setattr("minires.train.start.create_model", lambda *_, **__: nn.Sequential(nn.Flatten(), _few()))
    rng = np.random.default_rng(0)
    for split, label, i in itertools.product(("train", "test"), ("a", "b"), range(8)):
        file = tmp_path / "images" / split / label / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(file)
    ends, notes = [], []
    for graphs in (True, False):
        out = tmp_path / str(graphs)
        recipe = Recipe(dataset=str(tmp_path / "images"), image_size=4, batch_size=8, steps=12, out=str(out), flip=True)
        train(dataclasses.replace(recipe, device="cuda", cuda_graphs=graphs), on_note=notes.append)
        ends.append((out / "model.safetensors").read_bytes())
    assert ends[0] == ends[1] and not [text for text in notes if "CUDA graphs" in text]


def _few():
    return nn.Linear(48, 2)
