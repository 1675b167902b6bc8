"""What the hooks see of a small residual network, and what they say."""

import math
import re

import numpy as np
import pytest

import minires as mr
from minires import nn, no_grad
from minires.dispatch import run, use_kernels
from minires.engine import Function, Tensor, state
from minires.hooks import AnomalyError, AnomalyHook, BranchGradHook, Hook, TimerHook, TraceHook, find_anomaly
from minires.hooks.branches import _HANDS_ON
from minires.ops.conv_chain import conv_bn_chain
from minires.state import unfused


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        out = self.bn1(self.conv1(x), relu=True)
        return self.bn2(self.conv2(out), add=x, relu=True)


class Net(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1)
        self.layer1 = nn.Sequential(Block(channels), Block(channels))
        self.blocks = nn.ModuleList([nn.Linear(channels, 5)])  # a list is never called itself

    def forward(self, x):
        x = self.layer1(self.conv1(x))
        return self.blocks[0](x.mean((2, 3)))


@pytest.fixture
def net():
    mr.manual_seed(0)
    return Net().double()


def images(n=2):
    return Tensor(np.random.default_rng(1).standard_normal((n, 3, 6, 6)))


def upstream(*shape):
    return np.random.default_rng(99).standard_normal(shape)


class Divide(Function):
    """1 / x, with a backward that may be told to make something worse of it."""

    @staticmethod
    def forward(ctx, x, *, factor=1.0):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return 1 / x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_for_backward
        return -ctx.factor * dy / x**2


# --- the base -------------------------------------------------------------------------------------------------------


def test_hooks_are_called_in_order_and_leave_when_something_raises():
    calls = []

    class Log(Hook):
        def __init__(self, name):
            self.name = name

        def forward_pre(self, node, arrays):
            calls.append((self.name, "forward_pre", len(arrays)))

        def forward_post(self, node, arrays, y):
            calls.append((self.name, "forward_post", y.shape))

        def backward_pre(self, node, dy):
            calls.append((self.name, "backward_pre", dy.shape))

        def backward_post(self, node, dy, grads):
            calls.append((self.name, "backward_post", len(grads)))

        def addend(self, vertex, consumer, slot, share):
            calls.append((self.name, "addend", slot))

    x = Tensor(np.ones(2), requires_grad=True)
    with pytest.raises(ZeroDivisionError), Log("outer"), Log("inner"):
        Divide.apply(x).backward(np.ones(2))
        raise ZeroDivisionError
    assert calls == [
        ("outer", "forward_pre", 1),
        ("inner", "forward_pre", 1),
        ("inner", "forward_post", (2,)),
        ("outer", "forward_post", (2,)),
        ("outer", "backward_pre", (2,)),
        ("inner", "backward_pre", (2,)),
        ("inner", "backward_post", 1),
        ("outer", "backward_post", 1),
        ("outer", "addend", 0),
        ("inner", "addend", 0),
    ]
    assert state.hooks == []


def test_a_hook_cannot_be_entered_twice_at_once_but_again_later():
    hook = TimerHook()
    with hook, pytest.raises(RuntimeError, match="entered already"), hook:
        pass
    assert state.hooks == []
    with hook:
        pass


# --- TraceHook ------------------------------------------------------------------------------------------------------


def test_trace_names_ops_modules_and_kernels(net):
    with TraceHook() as trace, use_kernels(conv2d_fprop="fprop_im2col_numpy", conv2d_wgrad="wgrad_im2col_numpy"):
        net(images()).backward(upstream(2, 5))
    forward = [r for r in trace.records if r.direction == "forward"]
    backward = [r for r in trace.records if r.direction == "backward"]
    assert [(r.module, r.op) for r in forward] == [
        ("conv1", "Conv2d"),
        *[
            (f"layer1.{i}.{part}", op)
            for i in (0, 1)
            for part, op in [("conv1", "Conv2d"), ("bn1", "BatchNorm"), ("conv2", "Conv2d"), ("bn2", "BatchNorm")]
        ],
        ("Net", "Mean"),
        ("blocks.0", "Linear"),
    ]
    assert [(r.module, r.op) for r in backward] == [(r.module, r.op) for r in reversed(forward)]
    assert forward[0].kernels == ("fprop_im2col_numpy",)
    assert forward[0].inputs == ((2, 3, 6, 6), (4, 3, 3, 3), (4,)) and forward[0].outputs == ((2, 4, 6, 6),)
    assert backward[-1].kernels == ("wgrad_im2col_numpy",)  # nobody needs the image's gradient
    assert backward[-1].inputs == ((2, 4, 6, 6),) and backward[-1].outputs == (None, (4, 3, 3, 3), (4,))
    text = str(trace)
    assert re.search(r"forward +layer1\.1\.bn2 +BatchNorm +\S+ +2x4x6x6 4 4 2x4x6x6 4 4 +2x4x6x6", text)
    assert text.splitlines()[-1].strip() == f"{trace.saved_bytes:,}"


def test_trace_counts_each_kept_array_once_and_no_parameter():
    class Keep(Function):
        @staticmethod
        def forward(ctx, x, w):
            y = x * w
            ctx.save_for_backward(x, w, y, None)
            ctx.extra = (np.zeros(2, np.int8), "text")
            return y

        @staticmethod
        def backward(ctx, dy):
            x, w, _, _ = ctx.saved_for_backward
            return dy * w, dy * x

    x, w = Tensor(np.ones(10)), Tensor(np.ones(10), requires_grad=True)
    with TraceHook() as trace:
        y = Keep.apply(x, w)  # x 80, y 80, extra 2; w is there anyway
        z = Keep.apply(y, w)  # z 80, extra 2; y was counted
        with no_grad():
            Keep.apply(z, w)  # keeps nothing
    assert [r.saved_bytes for r in trace.records] == [162, 82, 0]
    assert trace.saved_bytes == 244


# --- TimerHook ------------------------------------------------------------------------------------------------------


def test_timer_adds_up_by_op_and_by_module(net, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr("minires.hooks.timer.time.perf_counter", lambda: float(next(clock)))  # a second per reading
    with TimerHook() as timer:
        net(images()).backward(upstream(2, 5))
    assert {op: (t.forward, t.backward, t.calls) for op, t in timer.by_op().items()} == {
        "Conv2d": (5, 5, 5),
        "BatchNorm": (4, 4, 4),
        "Mean": (1, 1, 1),
        "Linear": (1, 1, 1),
    }
    modules = timer.by_module()
    assert (modules["layer1"].forward, modules["layer1.0"].backward, modules["layer1.0.bn1"].calls) == (8, 4, 1)
    assert (timer.total.forward, timer.total.backward, timer.total.calls) == (11, 11, 11)
    assert re.search(r"^total +11000\.000 +11000\.000 +11$", str(timer), re.M)
    assert re.search(r"^layer1\.1 +4000\.000 +4000\.000 +4$", str(timer), re.M)


# --- BranchGradHook -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_branch_grads_are_those_of_the_two_paths(net, fused):
    x, dy = images(), upstream(2, 5)

    def share(block, path):
        """The gradient of the block's input through one path alone."""
        x = Tensor(inputs[block].copy(), requires_grad=True)
        out = block.bn1(block.conv1(x if path == "branch" else x.detach()), relu=True)
        out = block.bn2(block.conv2(out), add=x if path == "identity" else x.detach(), relu=True)
        rest = net.layer1[1](out) if block is net.layer1[0] else out
        net.blocks[0](rest.mean((2, 3))).backward(dy)
        return x.grad.array

    inputs = {}

    def keep(module, args, y):
        inputs[module] = args[0].array

    handles = [block.register_forward_hook(keep) for block in net.layer1]
    net(x)
    for handle in handles:
        handle.remove()
    with BranchGradHook(arrays=True) as hook:
        if fused:
            net(x).backward(dy)
        else:
            with unfused():
                net(x).backward(dy)
    assert [(j.op, j.module) for j in hook.joins] == [
        ("BatchNorm" if fused else "ReLU", "layer1.0.bn2"),
        ("Conv2d", "conv1"),
    ]
    for join, block, name in zip(hook.joins, reversed(net.layer1), ("layer1.1", "layer1.0"), strict=True):
        identity, branch = join.identity, join.branch
        assert identity.op == ("BatchNorm" if fused else "Add") and identity.module == f"{name}.bn2"
        assert branch.op == "Conv2d" and branch.module == f"{name}.conv1" and branch.slot == 0
        a, b = share(block, "identity"), share(block, "branch")
        np.testing.assert_allclose(identity.array, a, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(branch.array, b, rtol=1e-9, atol=1e-12)
        assert identity.norm == pytest.approx(np.linalg.norm(a)) and branch.norm == pytest.approx(np.linalg.norm(b))
        assert join.norm == pytest.approx(np.linalg.norm(a + b))
        assert join.cosine() == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
        assert join.shape == a.shape
    assert re.search(r"conv1 Conv2d +layer1\.0\.bn2 \w+ +identity +[\d.]+ +[+-][\d.]+\n +layer1\.0\.conv1", str(hook))


def test_branch_grads_of_many_uses_of_several_backwards_and_of_leaves():
    x = Tensor(np.array([3.0, 4.0]), requires_grad=True)
    with BranchGradHook() as hook:
        for _ in range(2):
            y = x.exp()
            (y + y * 2 + y * 0).backward(np.ones(2))
            (x + x).backward(np.ones(2))
    assert [(j.op, [s.op for s in j.shares]) for j in hook.joins] == 2 * [
        ("Exp", ["Mul", "Add", "Mul"]),
        ("leaf", ["Add", "Add"]),
    ]
    join = hook.joins[0]
    assert [s.norm for s in join.shares] == pytest.approx([0, math.sqrt(2), 2 * math.sqrt(2)])
    assert join.identity.op == "Add" and join.branch is None and join.shares[0].array is None
    assert math.isnan(join.cosine(0, 1)) and join.cosine(1, 2) == pytest.approx(1)
    assert join.norm == pytest.approx(3 * math.sqrt(2))


def test_a_normalised_input_is_no_identity_though_the_op_also_takes_a_residual():
    x = Tensor(np.random.default_rng(0).standard_normal((4, 2, 3, 3)), requires_grad=True)
    with BranchGradHook() as hook:
        (mr.batch_norm(x, None, None, training=True) + x - (1 - x)).backward(upstream(4, 2, 3, 3))
    assert [(s.op, s.slot, s.identity) for s in hook.joins[0].shares] == [
        ("Sub", 1, False),
        ("Add", 1, True),
        ("BatchNorm", 0, False),
    ]
    assert hook.joins[0].identity.op == "Add" and hook.joins[0].branch is None


def test_a_shortcut_that_strides_and_pads_is_an_identity_and_one_that_convolves_is_not():
    mr.manual_seed(0)
    for name, identities in (("resnet20", [1, 1]), ("resnet20_b", [0, 0])):
        options = {} if name == "resnet20" else {"shortcut": "B"}
        model = mr.models.create_model("resnet20", **options)
        with BranchGradHook() as hook:
            model(mr.randn(2, 3, 8, 8)).backward(upstream(2, 10).astype(np.float32))
        joins = {j.shares[-1].module: j for j in hook.joins}
        found = [sum(s.identity for s in joins[f"layer{n}.0.conv1"].shares) for n in (2, 3)]
        assert found == identities


def _chain(x, residual):
    """A residual branch of one convolution as one op."""
    channels = x.shape[1]
    weight, bias = (Tensor(np.ones(channels)) for _ in range(2))
    norm = dict(running_mean=None, running_var=None, weight=weight, bias=bias, training=True, momentum=0.1, eps=1e-5)
    filters = Tensor(np.random.default_rng(1).standard_normal((channels, channels, 1, 1)))
    return conv_bn_chain(x, residual, [filters], [norm], [((1, 1), (0, 0), (1, 1), 1)])


def test_the_ops_that_hand_a_gradient_on_exist_and_do_so():
    known = {cls.__name__ for cls in _subclasses(Function)}
    assert set(_HANDS_ON) <= known
    x = Tensor(np.random.default_rng(0).standard_normal((2, 3, 4, 4)), requires_grad=True)
    stop = x.detach()
    cases = {
        "Add": lambda: x + stop,
        "Sub": lambda: x - stop,
        "GetItem": lambda: x[:, 1:],
        "Pad": lambda: mr.pad(x, (1, 1)),
        "Reshape": lambda: x.reshape(6, 16),
        "Permute": lambda: x.permute(1, 0, 2, 3),
        "Cat": lambda: mr.cat([x, stop]),
        "BatchNorm": lambda: mr.bn_add_relu(stop, x, None, None, training=True),
        "ConvBnChain": lambda: _chain(stop, x),
        "Expand": lambda: x[None].expand(2, 2, 3, 4, 4),
        "AvgPool2d": lambda: mr.avg_pool2d(x, 2),
        "Sum": lambda: x.sum(1),
        "Mean": lambda: x.mean(1),
        "Clone": lambda: x.clone(),
        "Move": lambda: x.to(np.float32),
        "InputMark": lambda: _marked(nn.Flatten(), x),
        "OutputMark": lambda: _marked(nn.Flatten(), x),
    }
    assert set(cases) == set(_HANDS_ON)
    for name, case in cases.items():
        node = case().node
        while node.name != name:  # marks of a module's input lie below its ops
            (node,) = [vertex for vertex in node.inputs if vertex is not None]
        slots = _HANDS_ON[name]
        got = [i for i, needs in enumerate(node.needs_grad) if needs]
        assert slots is None or set(got) <= set(slots)


def _marked(module, x):
    """What a module with a full backward hook makes of x, with both marks in the graph."""
    module.register_full_backward_hook(lambda module, dx, dy: None)
    return module(x)


def _subclasses(cls):
    return {cls}.union(*(_subclasses(sub) for sub in cls.__subclasses__()))


# --- AnomalyHook ----------------------------------------------------------------------------------------------------


class Inside(nn.Module):
    """Applies a function as part of a module."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


def test_a_hook_that_cannot_be_entered_leaves_nothing_behind():
    before, hook = np.geterr(), AnomalyHook(conv2d_fprop="nope")
    for _ in range(2):
        with pytest.raises(ValueError, match="no kernel 'nope'"), hook:
            pass
    assert np.geterr() == before and not state.hooks


def test_anomaly_names_the_op_and_module_that_made_it_forward(net):
    net.layer1.add_module("bad", Inside(lambda x: Divide.apply(x * 0)))
    with pytest.raises(AnomalyError) as caught, AnomalyHook():
        net(images())
    e = caught.value
    assert (e.op, e.module, e.direction) == ("Divide", "layer1.bad", "forward")
    assert re.search(r"forward: the output \(2, 4, 6, 6\) of Divide in layer1\.bad holds 288 Inf of 288", str(e))
    assert "first made here" in str(e)
    assert state.hooks == [] and state.scope is None


def test_anomaly_says_when_the_input_was_bad_already(net):
    net.layer1[1].conv2.weight.array[0, 1, 2, 2] = np.nan
    with pytest.raises(
        AnomalyError, match=r"Conv2d in layer1\.1\.conv2.* already input 1 \(4, 4, 3, 3\) held 1 NaN of 144"
    ):
        with AnomalyHook():
            net(images())


def test_anomaly_names_the_op_and_module_that_made_it_backward(net):
    net.layer1.add_module("bad", Inside(lambda x: Divide.apply(x + 10, factor=np.inf)))
    y = net(images())
    with pytest.raises(AnomalyError) as caught, AnomalyHook():
        y.backward(upstream(2, 5))
    e = caught.value
    assert (e.op, e.module, e.direction) == ("Divide", "layer1.bad", "backward")
    assert re.search(r"backward: the gradient \(2, 4, 6, 6\) of input 0 of Divide .* 288 Inf of 288", str(e))


def test_anomaly_sees_a_bad_gradient_that_no_op_made():
    x = Tensor(np.array([1e200, 1.0]), requires_grad=True)
    with pytest.raises(AnomalyError, match="given"), AnomalyHook():
        Divide.apply(x).backward(np.array([np.nan, 1.0]))
    y = x / 1e210
    with pytest.raises(AnomalyError, match=r"gradient \(2,\) of the output of Div .*sum of finite"), AnomalyHook():
        (y * 1e308 + y * 1e308).backward(np.ones(2))


def test_anomaly_lets_good_steps_pass_and_chooses_kernels(net):
    with TraceHook() as trace, AnomalyHook(conv2d_fprop="fprop_reference"):
        net(images()).backward(upstream(2, 5))
    kernels = {k for r in trace.records if r.op == "Conv2d" and r.direction == "forward" for k in r.kernels}
    assert kernels == {"fprop_reference"}


def test_find_anomaly_reruns_the_failing_step(net):
    """The step itself spoils the weights, draws random numbers and changes running statistics: all is put back."""
    seen, runs = [], []
    good = net.state_dict()["layer1.0.bn1.running_mean"].array.copy()

    def step():
        runs.append(1)
        seen.append((mr.rand(3).array, net.layer1[0].bn1.running_mean.array.copy(), net.conv1.weight.grad))
        y = net(images())
        y = Divide.apply(y - y.detach().array)  # Inf
        y.backward(upstream(2, 5))
        for p in net.parameters():
            p.data -= 0.1 * p.grad
        return y.sum()

    with pytest.raises(AnomalyError) as caught:
        find_anomaly(step, net)
    assert (caught.value.op, caught.value.direction) == ("Divide", "forward")
    assert len(runs) == 2
    np.testing.assert_array_equal(seen[0][0], seen[1][0])
    np.testing.assert_array_equal(seen[1][1], good)
    assert seen[1][2] is None
    assert all(np.isfinite(p.array).all() for p in net.parameters())


def test_find_anomaly_returns_the_result_of_a_good_step_and_runs_it_once(net):
    runs = []

    def step():
        runs.append(1)
        y = net(images())
        y.backward(upstream(2, 5))
        return y

    assert find_anomaly(step, net).shape == (2, 5)
    assert len(runs) == 1


def test_find_anomaly_says_so_when_the_second_run_is_clean(net):
    def step():
        net(images()).backward(upstream(2, 5))
        net.conv1.weight.grad.array[0] = np.inf  # by no op
        return 1.0

    with pytest.raises(AnomalyError, match=r"the gradient of conv1\.weight \(27 Inf of 108\); but no op made it"):
        find_anomaly(step, net)


def test_kernels_outside_of_ops_are_not_anybody_s():
    x = Tensor(np.ones(3), requires_grad=True)
    with TraceHook() as trace:
        run("add_fprop", x.array, x.array)
        Divide.apply(x)
    assert trace.records[0].kernels == ()
