"""A trace computes what its module does, bit for bit, and never what the module did once."""

import contextlib
import threading
from typing import NamedTuple

import numpy as np
import pytest
from minires.kernels.cpu import pools

import minires
from minires import dispatch, nn, ops
from minires.engine import Function
from minires.hooks.base import Hook
from minires.jit import launched, parts
from minires.jit.recording import record
from minires.models import create_model


def fused(name="resnet20", **options):
    return nn.fuse_for_inference(create_model(name, num_classes=10, **options))


def images(n=2, size=16, seed=0):
    return minires.from_numpy(np.random.default_rng(seed).standard_normal((n, 3, size, size)).astype(np.float32))


def agree(module, traced, *inputs):
    with minires.no_grad():
        return module(*inputs).array.tobytes() == traced(*inputs).array.tobytes()


class Calls(nn.Module):
    """Counts how often its forward runs, without a trace taking note (a change of an attribute is one)."""

    def __init__(self, inner, n):
        super().__init__()
        self.inner, self.n = inner, n

    def forward(self, *inputs):
        self.n.append(1)
        return self.inner(*inputs)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet50", "preact_resnet20"])
@pytest.mark.parametrize("fuse", [True, False])
def test_a_trace_computes_what_the_module_does(name, fuse):
    model = create_model(name, num_classes=10).eval()
    model = nn.fuse_for_inference(model) if fuse else model
    traced = minires.jit.trace(model)
    for seed in range(4):
        assert agree(model, traced, images(2, 32, seed))
    assert len(traced.recordings) == 1


def test_only_the_first_two_calls_run_the_module():
    n = []
    traced = minires.jit.trace(Calls(fused(), n).eval())
    with minires.no_grad():
        for seed in range(5):
            traced(images(seed=seed))
    assert len(n) == 2


def test_without_a_check_only_the_first_call_runs_the_module():
    n = []
    traced = minires.jit.trace(Calls(fused(), n).eval(), check_trace=False)
    with minires.no_grad():
        for seed in range(5):
            traced(images(seed=seed))
    assert len(n) == 1


def test_every_shape_and_precision_is_recorded_for_itself():
    model = fused()
    traced = minires.jit.trace(model)
    for _ in range(3):
        for n in (1, 3):
            assert agree(model, traced, images(n))
        with minires.autocast("cpu", dtype=minires.bfloat16):
            assert agree(model, traced, images(3))
        with minires.unfused():
            assert agree(model, traced, images(3))
        assert agree(model, traced, images(3))
    assert len(traced.recordings) == 4


def test_old_recordings_make_place():
    traced = minires.jit.trace(nn.ReLU().eval())
    with minires.no_grad():
        for n in range(1, 40):
            traced(images(n))
    assert len(traced.recordings) == 16


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("change", ["in place", "data", "state dict", "another array", "another parameter"])
def test_a_change_of_a_weight_is_seen(change, bf16):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)).eval()
    traced = minires.jit.trace(model)
    with minires.autocast("cpu", dtype=minires.bfloat16, enabled=bf16):
        for _ in range(3):
            assert agree(model, traced, images())
        weight = model[2].weight
        with minires.no_grad():
            before = traced(images()).array
            if change == "in place":
                weight *= 2
            elif change == "data":
                weight.data = 2 * weight.data
            elif change == "state dict":
                model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()})
            elif change == "another array":
                weight.array = 2 * weight.array
            else:
                model[2].weight = nn.Parameter(2 * weight.detach())
            assert not np.array_equal(traced(images()).array, before)
        assert agree(model, traced, images())


def test_changes_of_modules_are_seen():
    model = fused()
    traced = minires.jit.trace(model)
    for _ in range(3):
        assert agree(model, traced, images())
    model.fc = nn.Linear(64, 3)
    assert agree(model, traced, images())
    model.layer1[0].bn1.stride = (2, 2)
    model.layer1[0].bn2.stride = (1, 1)
    model.layer1 = nn.Sequential(*list(model.layer1)[1:])
    assert agree(model, traced, images())
    with minires.ablate(model, "layer2.1", to="identity"):
        assert agree(model, traced, images())
    assert agree(model, traced, images())


def test_hooks_and_captures_see_every_call():
    model = fused()
    traced, shapes, ops = minires.jit.trace(model), [], []

    class Ops(Hook):
        def forward_post(self, node, arrays, y):
            ops.append(node.name)

    with minires.no_grad():
        for _ in range(3):
            traced(images())
        with model.layer1.register_forward_hook(lambda module, args, y: shapes.append(y.shape)):
            traced(images())
            traced(images())
        with Ops():
            traced(images())
        with minires.capture(model, "layer2") as seen:
            traced(images())
        traced(images())
    assert shapes == [(2, 16, 16, 16)] * 2 and len(ops) > 20 and seen["layer2"].output.shape == (2, 32, 8, 8)


def test_gradients_flow_and_training_is_training():
    model = create_model("resnet20", num_classes=10)
    traced = minires.jit.trace(model)
    traced.train()
    traced(images()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    before = model.bn1.running_mean.array.copy()
    with minires.no_grad():
        traced(images())
    assert not np.array_equal(before, model.bn1.running_mean.array) and not traced.recordings
    traced.eval()
    for _ in range(3):
        assert agree(model, traced, images())
    with minires.no_grad():
        old = traced(images()).array
        traced.train()
        assert not np.array_equal(traced(images()).array, old)


def test_kernels_may_be_chosen_after_the_recording():
    model = fused()
    traced = minires.jit.trace(model)
    for _ in range(3):
        assert agree(model, traced, images())
    with minires.exact():
        assert agree(model, traced, images())
    with minires.use_kernels(conv2d_bias_act="bias_act_im2col_tile"):
        assert agree(model, traced, images())


def _into_a_view(x):
    x[:, 0] += x[:, 1]
    x[0, 1] = 3
    return x.exp()


class Odd(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(x)


@pytest.mark.parametrize(
    "what",
    [
        lambda x: x if x.sum().item() > 0 else -2 * x,
        lambda x: x + minires.from_numpy(x.array * 2),
        lambda x: x * float(x.array.mean()),
        lambda x: (x * minires.tensor([[1.0, 2.0, 3.0]])).argmax(1),
    ],
    ids=["decides by values", "NumPy", "a number", "indices"],
)
def test_a_forward_that_ops_do_not_tell_is_found_out(what):
    traced = minires.jit.trace(Odd(what).eval())
    with minires.no_grad():
        traced(minires.ones(2, 3))
        with pytest.raises(RuntimeError, match="the recording of Odd does not compute what the module does"):
            traced(-minires.ones(2, 3))


@pytest.mark.parametrize(
    "what",
    [
        lambda x: x,
        lambda x: x.sum() * x,
        lambda x: x[0].T + x[1, :, :1],
        lambda x: minires.cat([x, x.amax(dim=1, keepdim=True)], dim=1),
        lambda x: x.add_(1) * 2,
        lambda x: (x * 2)[0].add_(x[1]) + 1,
        lambda x: _into_a_view(x * 2),
        lambda x: minires.ones(3) * 2,
    ],
    ids=["the input", "a number", "views", "several", "in place", "of a result", "of a view", "a constant"],
)
def test_forwards_of_all_kinds(what):
    module = Odd(what).eval()
    traced = minires.jit.trace(module)
    with minires.no_grad():
        for seed in range(4):
            a, b = (minires.from_numpy(np.random.default_rng(seed).standard_normal((2, 3, 3))) for _ in range(2))
            assert module(a).array.tobytes() == traced(b).array.tobytes() and a.array.tobytes() == b.array.tobytes()


def test_several_inputs_and_results():
    module = Odd(None).eval()
    module.forward = lambda x, y: (x + y, [x * y][0])
    traced = minires.jit.trace(module)
    with minires.no_grad():
        for k in range(1, 4):
            total, product = traced(k * minires.ones(2), minires.ones(2))
            assert total.tolist() == [k + 1] * 2 and product.tolist() == [k] * 2
        module.forward = lambda x, y: {"sum": x + y}
        with pytest.raises(TypeError, match="a Tensor, or a tuple or list of them, not dict"):
            traced(minires.ones(2), minires.ones(2))


class Pair(NamedTuple):
    first: minires.Tensor
    second: minires.Tensor


def test_a_named_tuple_comes_back_as_one_and_the_same_input_twice_is_another_call():
    module = Odd(None).eval()
    module.forward = lambda x, y: Pair(x - y, x + y)
    traced, one, two = minires.jit.trace(module), minires.ones(2), 2 * minires.ones(2)
    with minires.no_grad():
        for _ in range(3):
            assert traced(one, one).first.tolist() == [0, 0]
            assert traced(two, one).first.tolist() == [1, 1] and traced(two, one).second.tolist() == [3, 3]


def test_arguments_that_are_no_tensors_run_the_module():
    module = Odd(None).eval()
    module.forward = lambda x, k=1: k * x
    traced = minires.jit.trace(module)
    with minires.no_grad():
        for k in range(4):
            assert traced(minires.ones(1), k).item() == traced(minires.ones(1), k=k).item() == k
    assert not traced.recordings


def test_threads_share_a_trace():
    model, wrong = fused(), []
    traced = minires.jit.trace(model)

    def work(seed):
        for k in range(4):
            if not agree(model, traced, images(1 + k % 2, seed=seed)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_filters_are_packed_once():
    model = fused()
    traced = minires.jit.trace(model)
    with minires.no_grad():
        traced(images())
        (recording,) = traced.recordings.values()
        made = {*recording.constants.entries}
        for seed in range(3):
            traced(images(seed=seed))
        assert made == {*recording.constants.entries} and len(made) > len(recording.constants.arrays)


# --- launches -------------------------------------------------------------------------------------------------------


def launches_of(traced):
    return [recording.launches for recording in traced.recordings.values()]


@pytest.mark.parametrize("bf16", [False, True])
def test_launches_take_the_place_of_ops(bf16):
    model, names = fused(), []
    traced = minires.jit.trace(model)
    with minires.no_grad(), minires.autocast("cpu", dtype=minires.bfloat16, enabled=bf16):
        for seed in range(5):
            x = minires.from_numpy(np.random.default_rng(seed).standard_normal((4, 3, 32, 32)).astype(np.float32))
            y = traced(x)
            assert y.array.tobytes() == model(x).array.tobytes()
        (launches,) = launches_of(traced)
        assert launches and len(launches.calls) > 5
        before = y.array.copy()
        traced(x * 2)
        assert y.array.tobytes() == before.tobytes()  # results are not written into again
        with dispatch.observe(lambda kernel: names.append(kernel.name)):
            assert traced(x).array.tobytes() == before.tobytes()
    assert names  # whoever watches is shown kernels


def test_launches_are_of_one_layout_and_number_of_threads():
    model = fused()
    traced, x = minires.jit.trace(model), images()
    other = minires.from_numpy(np.ascontiguousarray(x.array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2))
    still = minires.from_numpy(x.array.copy())
    still.array.flags.writeable = False
    with minires.no_grad():
        for _ in range(4):
            traced(x)
        (launches,) = launches_of(traced)
        assert launches and launches.takes([x.array])
        assert not launches.takes([other.array]) and not launches.takes([still.array])
        wanted = model(x).array.tobytes()
        assert all(traced(image).array.tobytes() == wanted for image in (other, still))
        threads = minires.get_num_threads()
        minires.set_num_threads(1)
        try:
            assert launches.takes([x.array]) == (threads == 1)
            assert traced(x).array.tobytes() == wanted
        finally:
            minires.set_num_threads(threads)


def test_what_numpy_computes_is_no_launch():
    module = Odd(lambda x: minires.sin(x) @ x.transpose(2, 3) + x[:, :, ::-1]).eval()  # NumPy's, on the CPU
    traced = minires.jit.trace(module)
    with minires.no_grad():
        for seed in range(5):
            x = minires.from_numpy(np.random.default_rng(seed).standard_normal((2, 3, 40, 40)).astype(np.float32))
            assert traced(x).array.tobytes() == module(x).array.tobytes()
    assert launches_of(traced) == [False]


class Positive(Function):
    """x, which must be greater than zero: random numbers are not."""

    @staticmethod
    def forward(ctx, x):
        if (x <= 0).any():
            raise ValueError("greater than zero, please")
        return x


def test_an_op_that_refuses_random_numbers_goes_on_without_launches():
    model, x = fused(), minires.ones(2, 3, 16, 16)
    module = Odd(lambda x: model(Positive.apply(x))).eval()
    traced = minires.jit.trace(module)
    with minires.no_grad():
        for _ in range(5):
            assert traced(x).array.tobytes() == module(x).array.tobytes()
        assert launches_of(traced) == [False]
        with pytest.raises(ValueError, match="greater than zero"):
            traced(-x)


def test_what_goes_wrong_in_a_launch_is_said(monkeypatch):
    """What the ops refuse is theirs to say; a fault of the launches themselves must not pass for that."""

    def broken(self, inputs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(dispatch.Launches, "run", broken)
    traced = minires.jit.trace(fused())
    with minires.no_grad(), pytest.raises(ZeroDivisionError, match="a bug"):
        for seed in range(5):
            traced(images(seed=seed))


@pytest.mark.parametrize("most_bytes", [1 << 10, 1 << 16])
def test_launches_of_large_passes_are_not_kept(most_bytes, monkeypatch):
    monkeypatch.setattr(
        "minires.jit.launched._MOST_BYTES", most_bytes
    )  # less than the images; less than what a pass takes
    model, x = fused(), images()
    traced = minires.jit.trace(model)
    with minires.no_grad():
        for _ in range(5):
            assert agree(model, traced, x)
    assert launches_of(traced) == [False]


@pytest.fixture
def divided(monkeypatch):
    """Launches in parts, whether they are faster or not. The value: which ways there were to divide."""
    ways, divide = [], parts.divide
    monkeypatch.setattr(parts, "cache_bytes", lambda: 1 << 14)
    monkeypatch.setattr(parts, "_CALL", 0)
    monkeypatch.setattr(launched, "_is_faster", lambda *_: True)
    monkeypatch.setattr(launched, "divide", lambda *about: ways.extend(divide(*about)) or ways)
    return ways


@pytest.mark.parametrize("name, bf16", [("resnet20", False), ("resnet20", True), ("resnet50", False)])
def test_some_images_at_a_time(name, bf16, divided):
    model, n = fused(name), 7 * minires.get_num_threads() + 1  # the last part is smaller
    traced = minires.jit.trace(model)
    with minires.no_grad(), minires.autocast("cpu", dtype=minires.bfloat16, enabled=bf16):
        for seed in range(5):
            assert agree(model, traced, images(n, 32, seed))
        (launches,) = launches_of(traced)
    assert launches and divided and 1 < max(n // s.images for s in divided[-1])
    names = [getattr(function, "__self__", function).__name__ for function, *_ in launches.calls]
    assert len(names) > 3 * len({*names})


def test_what_is_of_more_than_one_image_is_not_divided(divided):
    constant, weight = minires.ones(9, 3, 16, 16), images(3, 3)

    def forward(x):
        y = ops.conv2d(x, weight, padding=1)  # this one is
        y = y - y.mean(0)
        y = ops.conv_bias_act(y, weight, minires.zeros(3), constant, padding=1)  # a constant has images, too
        return ops.conv2d(y, y[:3, :, :3, :3])  # the weight is made of images

    with minires.no_grad():
        recording, _ = record(Odd(forward), [images(9)])
    x = images(9).array
    arrays = {0: parts.about(x)}
    recording.run([x], lambda k, y: arrays.update({k: parts.about(y)}))
    (way,) = parts.divide(recording, arrays, 9, 2)
    assert [(s.first, s.last, s.images) for s in way] == [(0, 1, 4)]


def test_a_result_that_is_made_elsewhere_is_not_divided(divided, monkeypatch):
    monkeypatch.setattr(pools.Pool, "next_is", lambda self, place: contextlib.nullcontext())
    model = fused()
    traced = minires.jit.trace(model)
    with minires.no_grad():
        for seed in range(4):
            assert agree(model, traced, images(16, 32, seed))
    (launches,) = launches_of(traced)
    assert divided and launches  # those of the whole batch


def test_threads_that_call_at_the_same_time():
    model = fused()
    traced, xs = minires.jit.trace(model), [images(), images() * 2]
    with minires.no_grad():
        wanted = [model(x).array.tobytes() for x in xs]
        for _ in range(4):
            traced(xs[0])
    assert launches_of(traced)[0]
    wrong = []

    def work(k):
        with minires.no_grad():
            for _ in range(30):
                wrong.extend([k] if traced(xs[k]).array.tobytes() != wanted[k] else [])

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong
