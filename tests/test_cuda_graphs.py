"""CUDA graphs without a GPU: captured by capture_double.py, replayed by the interpreter and NumPy.

What this shows: that a step can be captured, that its replays depend on nothing that only the capture knew, and that
what cannot be captured is noticed. What it cannot show: CuPy's capture itself, and how fast a replay is.
"""

import gc

import device_double
import numpy as np
import pytest
from device_double import CUDARuntimeError, install
from needs import nvrtc

import minires
from minires import cuda, nn, optim
from minires.hooks import TraceHook
from minires.nn import functional as F
from minires.nn.checkpoint import checkpoint
from minires.nn.utils import clip_grad_norm_

nvrtc()


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    return install(monkeypatch)


class Block(nn.Module):
    """A basic block that changes its shape, as of ResNet-8."""

    def __init__(self, c, k):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, k, 3, 2, 1, bias=False), nn.BatchNorm2d(k)
        self.conv2, self.bn2 = nn.Conv2d(k, k, 3, 1, 1, bias=False), nn.BatchNorm2d(k)
        self.downsample = nn.Conv2d(c, k, 1, 2, bias=False)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x), relu=True)), add=self.downsample(x), relu=True)


class Net(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.conv, self.bn, self.block = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), Block(4, 8)
        self.dropout, self.fc = nn.Dropout(p), nn.Linear(8, 5)

    def forward(self, x):
        x = self.block(F.relu(self.bn(self.conv(x))))
        return self.fc(self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1)))


def sgd(parameters, **settings):
    return optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True, capturable=True, **settings)


def adamw(parameters):
    return optim.AdamW(parameters, lr=1e-2, eps=1e-2, amsgrad=True, capturable=True)


def small(p):
    return nn.Sequential(nn.Flatten(), nn.Dropout(p), nn.Linear(90, 5))


class Training:
    """A model, its optimizer and schedule on the stand-in, and its step, as it is or graphed."""

    def __init__(
        self, make_optimizer=sgd, p=0.0, clip=np.inf, smoothing=0.0, notes=None, graphed=True, body=None, net=Net
    ):
        minires.manual_seed(3)
        self.model = net(p).to("cuda")
        self.optimizer = make_optimizer(self.model.parameters())
        self.schedule = optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)
        self.clip, self.smoothing = clip, smoothing
        self.step = body or self.body
        if graphed:
            self.step = cuda.make_graphed_step(self.step, warmup=1, note=(notes if notes is not None else []).append)
        self.losses = []

    def body(self, images, labels):
        loss = F.cross_entropy(self.model(images), labels, label_smoothing=self.smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss, norm

    def run(self, sizes):
        """Steps on batches of these sizes; what the training is after them, as bytes."""
        rng = np.random.default_rng(0)
        for n in sizes:
            images = np.ascontiguousarray(rng.standard_normal((n, 6, 5, 3), np.float32)).transpose(0, 3, 1, 2)
            labels = rng.integers(0, 5, n)
            results = self.step(*(minires.tensor(v, device="cuda") for v in (images, labels)))
            self.losses.append([r.item() for r in results])
            self.schedule.step()
        kept = [v.cpu().numpy() for s in self.optimizer.state.values() for v in s.values() if hasattr(v, "cpu")]
        counts = [s["step"] for s in self.optimizer.state.values() if "step" in s]
        state = [t.cpu().numpy() for t in self.model.state_dict().values()]
        return [a.tobytes() for a in (*state, *kept)], counts, self.losses


@pytest.mark.parametrize(
    "settings",
    [dict(p=0.4), dict(make_optimizer=adamw, clip=0.5, smoothing=0.1)],
    ids=["sgd with dropout", "adamw, clipped, smoothed labels"],
)
def test_replays_are_equal_to_eager_steps_bit_for_bit(settings):
    """With a learning rate and dropout's numbers that change at every step, and batches of another size in between."""
    sizes, notes = [3, 3, 2, 3], []
    graphed = Training(**settings, notes=notes)
    assert graphed.run(sizes) == Training(**settings, graphed=False).run(sizes)
    assert graphed.step.captured and not graphed.step.refused
    assert notes == ["CUDA graphs: a batch has another shape than the captured one; such a step runs without its graph"]


def test_a_capturable_optimizer_computes_what_a_plain_one_does():
    for make in (sgd, adamw):

        def plain(parameters, make=make):
            optimizer = make(parameters)
            for group in optimizer.param_groups:
                group["capturable"] = False
            return optimizer

        assert Training(make, graphed=False).run([3] * 2) == Training(plain, graphed=False).run([3] * 2)


def test_a_capture_does_nothing_and_a_replay_everything():
    x = minires.tensor(np.arange(3, dtype=np.float32), device="cuda")
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        assert cuda.is_current_stream_capturing()
        x += 1
        y = F.relu(x) * 2
    assert not cuda.is_current_stream_capturing()
    assert x.tolist() == [0, 1, 2]
    for k in (1, 2):
        graph.replay()
        assert x.tolist() == [k, k + 1, k + 2] and y.tolist() == [2 * k, 2 * k + 2, 2 * k + 4]
    assert graph.pool().used_bytes() >= 12
    with pytest.raises(RuntimeError, match="captured already"):
        graph.capture_begin()
    graph.reset()
    with pytest.raises(RuntimeError, match="was not captured"):
        graph.replay()


def test_what_is_fed_is_asked_again():
    values = iter((10.0, 20.0, 30.0))
    x = minires.zeros(2, device="cuda")
    assert cuda.fed(lambda: next(values), (1,), "float32", x.array).tolist() == [10]
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        x += minires.Tensor(cuda.fed(lambda: next(values), (1,), "float32", x.array))
    for wanted in (20, 50):
        graph.replay()
        assert x.tolist() == [wanted] * 2
    assert cuda.fed(lambda: 3, (1,), "int64", np.zeros(1)).tolist() == [3]


REFUSED = {
    "a number of the GPU's": (lambda x: x.sum().item(), "memcpy to the host"),
    "a condition": (lambda x: x if (x > 0).all() else -x, "memcpy to the host"),
    "a copy from the host": (lambda x: x + minires.tensor(np.ones(3, np.float32), device="cuda"), "from the host"),
    "a mask": (lambda x: x[x > 0], "nonzero"),
    "cuBLAS": (lambda x: minires.Tensor(x.array @ x.array), "cuBLAS"),
    "waiting": (lambda x: device_double.module().cuda.Device().synchronize(), "deviceSynchronize"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_cannot_hold_runs_without(name):
    step, reason = REFUSED[name]
    notes, x = [], minires.tensor(np.arange(1, 4, dtype=np.float32), device="cuda")
    graphed = cuda.make_graphed_step(step, warmup=1, note=notes.append)
    for _ in range(4):
        y = graphed(x)
        assert y is None or np.all(np.asarray(getattr(y, "array", y).tolist() if hasattr(y, "array") else y) > 0)
    assert reason in graphed.refused and not graphed.captured
    assert len(notes) == 1 and "\n" not in notes[0] and notes[0].startswith("CUDA graphs: this step cannot be captured")
    assert not cuda.is_current_stream_capturing() and device_double.streams.recorder is None


def test_a_refused_step_has_changed_nothing():
    def body(images, labels):
        results = Training.body(training, images, labels)
        results[0].item()
        return results

    training = Training(p=0.4, body=body)
    assert training.run([3] * 3) == Training(p=0.4, graphed=False).run([3] * 3)
    assert training.step.refused


@pytest.mark.parametrize("make", [lambda p: optim.SGD(p, lr=0.1), lambda p: optim.LARS(p, lr=0.1)], ids=["sgd", "lars"])
def test_an_optimizer_with_numbers_of_the_host_is_refused(make):
    notes = []
    training = Training(make, notes=notes)
    training.run([3] * 2)
    assert "has numbers of the host, which a CUDA graph cannot ask" in training.step.refused and len(notes) == 1


def test_a_learning_rate_that_is_baked_in_is_seen():
    """The planted fault: an update with lr as a Python float. Its replays are not what the steps are."""

    def body(images, labels):
        loss = F.cross_entropy(training.model(images), labels)
        training.optimizer.zero_grad()
        loss.backward()
        lr = training.optimizer.param_groups[0]["lr"]
        for p in training.model.parameters():
            p.array[...] -= lr * p.grad.array
        return (loss,)

    ends = []
    for graphed in (True, False):
        training = Training(graphed=graphed, body=body)
        ends.append(training.run([3] * 3))
    assert ends[0][0] != ends[1][0], "the planted fault went unnoticed"
    assert ends[0][2][:2] == ends[1][2][:2] != ends[0][2][1:], "only what follows the first replay differs"


def test_a_replay_that_allocates_is_refused():
    """The planted fault: what is fed makes an array on the GPU."""
    x = minires.zeros(2, device="cuda")
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        x += minires.Tensor(cuda.fed(lambda: minires.ones(1, device="cuda").array.get(), (1,), "float32", x.array))
    with pytest.raises(RuntimeError, match=r"a replay of a CUDA graph allocates \d+ bytes"):
        graph.replay()


def test_a_replay_allocates_nothing():
    training = Training()
    training.run([3] * 2)
    used = device_double.streams.default.used_bytes(), training.step._graph.pool().used_bytes()
    training.step._graph.replay()
    assert used == (device_double.streams.default.used_bytes(), training.step._graph.pool().used_bytes())


def test_memory_that_is_gone_is_seen(launched):
    """The planted fault: an input that nobody keeps."""
    x = minires.tensor(np.ones(3, np.float32), device="cuda")
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        y = F.relu(x)
    graph.replay()
    assert y.tolist() == [1, 1, 1]
    del x
    launched.clear()
    gc.collect()  # the interpreter's
    with pytest.raises(CUDARuntimeError, match="freed since"):
        graph.replay()


def test_hooks_see_every_step():
    notes = []
    training = Training(notes=notes)
    training.run([3] * 2)
    with TraceHook() as trace:
        training.run([3])
    assert len(str(trace)) > 100 and notes == [
        "CUDA graphs: hooks are entered, which watch ops as they run; such a step runs without its graph"
    ]


def test_another_stage_is_captured_anew():
    training = Training(graphed=False)
    frozen = training.model.conv.weight
    training.step = cuda.make_graphed_step(training.body, warmup=1, depends=lambda: frozen.requires_grad)
    training.run([3] * 2)
    first = training.step._graph
    frozen.requires_grad = False
    before = frozen.cpu().detach().numpy().copy()
    training.run([3] * 3)
    assert training.step.captured and training.step._graph is not first
    assert np.array_equal(frozen.cpu().detach().numpy(), before)


def test_targets_that_are_ignored_or_no_class():
    x = minires.tensor(np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32), device="cuda")
    step = cuda.make_graphed_step(lambda x, t: F.cross_entropy(x, t, ignore_index=4), warmup=1)
    for labels in ([0, 1, 2, 3], [0, 1, 2, 3], [4, 1, 4, 3], [4, 4, 4, 4], [0, 1, 2, 7]):
        t = minires.tensor(np.array(labels), device="cuda")
        got = step(x, t).item()
        if labels[-1] == 7:
            assert np.isnan(got)
        else:
            assert np.array_equal(got, F.cross_entropy(x, t, ignore_index=4).item(), equal_nan=True)
    assert step.captured


def test_mistakes():
    with pytest.raises(ValueError, match="warmup=0 must be at least 1"):
        cuda.make_graphed_step(lambda x: x, warmup=0)
    graph = cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="do not nest"), cuda.graph(graph), cuda.graph(cuda.CUDAGraph()):
        pass
    with pytest.raises(RuntimeError, match="without capture_begin"):
        graph.capture_end()
    with pytest.warns(UserWarning, match="it needs inputs, and all of them on the GPU"):
        on_cpu = cuda.make_graphed_step(lambda x: x * 2, warmup=1)
        assert [on_cpu(minires.ones(1)).item() for _ in range(3)] == [2, 2, 2]


def test_an_optimizer_that_remembers_nothing_yet_is_not_captured():
    model, x = small(0.2).to("cuda"), minires.ones(4, 90).to("cuda")
    for make in (sgd, adamw):
        optimizer = make(model.parameters())
        model(x).sum().backward()
        with (
            pytest.raises(RuntimeError, match="has not made a step with every parameter yet"),
            cuda.graph(cuda.CUDAGraph()),
        ):
            optimizer.step()


CHANGES = {
    "sgd's momentum and decay": (sgd, dict(momentum=0.5), dict(weight_decay=0.2)),
    "adamw's betas": (adamw, dict(betas=(0.5, 0.9)), dict(eps=1.0)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_settings_that_are_held_are_captured_anew(name):
    """And those that are fed (AdamW's decay) are not: both come out as without graphs."""
    make, *changes = CHANGES[name]
    ends, notes = [], []
    for graphed in (True, False):
        training = Training(make, notes=notes, graphed=graphed, net=small)
        for change in ({}, *changes):
            training.optimizer.param_groups[0].update(change)
            end = training.run([3] * 3)
        if graphed:
            assert training.step.captures == 3 and training.step.captured
        ends.append(end)
    assert ends[0] == ends[1]
    first = next(iter(changes[0])).replace("betas", "beta1")
    assert notes[0].startswith(f"CUDA graphs: {first} is 0.5, and was 0.9 at the capture; it is captured anew")


def test_adamw_s_decay_is_fed():
    ends = []
    for graphed in (True, False):
        training = Training(adamw, graphed=graphed, net=small)
        training.run([3] * 2)
        training.optimizer.param_groups[0]["weight_decay"] = 0.5
        ends.append(training.run([3] * 2))
    assert ends[0] == ends[1]


def test_a_replay_with_a_momentum_that_it_does_not_hold_is_refused():
    training = Training(net=small)
    training.run([3] * 2)
    training.optimizer.param_groups[0]["momentum"] = 0.5
    with pytest.raises(RuntimeError, match=r"momentum is 0\.5, and was 0\.9 at the capture; capture it anew"):
        training.step._graph.replay()


def test_a_checkpointed_part_drops_the_same_in_a_graph():
    def training(graphed):
        minires.manual_seed(0)
        model, x = small(0.2).to("cuda"), minires.ones(2, 90).to("cuda")

        def step(x):
            for p in model.parameters():
                p.grad = None
            checkpoint(model, x).sum().backward()
            return [p.grad.array.get() if not graphed else p.grad.array for p in model.parameters()]

        step = cuda.make_graphed_step(step, warmup=1) if graphed else step
        return [[np.asarray(getattr(g, "_host", g)).copy() for g in step(x)] for _ in range(4)]

    for a, b in zip(training(True), training(False), strict=True):
        assert all(map(np.array_equal, a, b))
