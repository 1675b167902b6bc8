"""Modules: registration, names, state dicts, modes, hooks and errors; a small net against PyTorch (peers)."""

import copy

import numpy as np
import pytest

from minires import nn
from minires.engine import Tensor, no_grad, state
from minires.nn import functional as F

RNG = np.random.default_rng(0)


def _tensor(*shape, dtype=np.float64, requires_grad=False):
    return Tensor(RNG.standard_normal(shape).astype(dtype), requires_grad)


class Net(nn.Module):
    """A small ResNet-like net with shared weights nowhere, a buffer, and an absent bias."""

    def __init__(self, dtype=np.float64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False, dtype=dtype)
        self.bn1 = nn.BatchNorm2d(8, dtype=dtype)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, dtype=dtype), nn.BatchNorm2d(8, dtype=dtype))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5, dtype=dtype)
        self.scale = nn.Parameter(np.ones((1, 5), dtype))

    def forward(self, x):
        x = self.bn1(self.conv1(x), relu=True)
        x = self.layer1[1](self.layer1[0](x), add=x, relu=True)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)) * self.scale


KEYS = [
    "scale",
    "conv1.weight",
    "bn1.weight",
    "bn1.bias",
    "bn1.running_mean",
    "bn1.running_var",
    "bn1.num_batches_tracked",
    "layer1.0.weight",
    "layer1.0.bias",
    "layer1.1.weight",
    "layer1.1.bias",
    "layer1.1.running_mean",
    "layer1.1.running_var",
    "layer1.1.num_batches_tracked",
    "fc.weight",
    "fc.bias",
]
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

# --- registration and names -------------------------------------------------------------------------------------------


def test_names_in_order_of_registration():
    net = Net()
    assert list(net.state_dict()) == KEYS
    assert [name for name, _ in net.named_parameters()] == [k for k in KEYS if not k.endswith(BUFFERS)]
    assert [name for name, _ in net.named_buffers()] == [k for k in KEYS if k.endswith(BUFFERS)]
    assert [name for name, _ in net.named_children()] == ["conv1", "bn1", "layer1", "pool", "fc"]
    names = ["", "conv1", "bn1", "layer1", "layer1.0", "layer1.1", "pool", "fc"]
    assert [name for name, _ in net.named_modules()] == names
    assert [name for name, _ in net.named_parameters(recurse=False)] == ["scale"]
    assert next(iter(net.named_parameters(prefix="net")))[0] == "net.scale"
    assert len(list(net.parameters())) == 10 and len(list(net.modules())) == 8


def test_get_by_dotted_name():
    net = Net()
    assert net.get_submodule("layer1.0") is net.layer1[0] and net.get_submodule("") is net
    assert net.get_parameter("layer1.1.bias") is net.layer1[1].bias
    assert net.get_buffer("bn1.running_mean") is net.bn1.running_mean
    with pytest.raises(AttributeError, match=r"Sequential has no submodule '7' \(of 'layer1.7'\); it has: 0, 1"):
        net.get_submodule("layer1.7")
    with pytest.raises(AttributeError, match="Conv2d has no parameter 'bias'"):
        net.get_parameter("conv1.bias")
    with pytest.raises(AttributeError, match="Linear has no buffer 'mean'"):
        net.get_buffer("fc.mean")


def test_shared_parts_are_listed_once():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    net = nn.Sequential(a, b, a)
    assert [name for name, _ in net.named_parameters()] == ["0.weight", "0.bias", "1.bias"]
    assert [name for name, _ in net.named_parameters(remove_duplicate=False)] == [
        f"{i}.{name}" for i in range(3) for name in ("weight", "bias")
    ]
    assert len(list(net.modules())) == 3 and len(list(net.children())) == 2
    assert len(net.state_dict()) == 6  # under each name, as in PyTorch


def test_assignment_replaces_and_deletes():
    layer = nn.Linear(2, 2)
    new = nn.Parameter(np.zeros((2, 2)))
    layer.weight = new
    assert layer.weight is new and [n for n, _ in layer.named_parameters()] == ["weight", "bias"]
    layer.bias = None
    assert layer.bias is None and [n for n, _ in layer.named_parameters()] == ["weight"]
    layer.child = None  # a plain attribute until it is a module
    layer.child = nn.ReLU()
    assert [n for n, _ in layer.named_children()] == ["child"]
    del layer.child
    assert not hasattr(layer, "child") and "weight" in dir(layer)
    layer.note = "plain"
    del layer.note
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'note'"):
        _ = layer.note


def test_buffers():
    module = nn.Module()
    module.register_buffer("kept", Tensor(np.zeros(2)))
    module.register_buffer("scratch", Tensor(np.ones(3)), persistent=False)
    assert list(module.state_dict()) == ["kept"] and len(list(module.buffers())) == 2
    module.kept = Tensor(np.ones(2))
    assert module.state_dict()["kept"].array.tolist() == [1, 1] and not list(module.parameters())


class Forgetful(nn.Module):
    def __init__(self, part):
        self.part = part
        super().__init__()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Forgetful(nn.ReLU()), AttributeError, r"cannot assign module before Module.__init__\(\) call"),
        (
            lambda: Forgetful(nn.Parameter(np.zeros(1))),
            AttributeError,
            "cannot assign parameters before Module.__init__",
        ),
        (
            lambda: setattr(nn.Linear(1, 1), "weight", Tensor(np.zeros(1))),
            TypeError,
            "cannot assign Tensor to parameter",
        ),
        (lambda: setattr(nn.Sequential(nn.ReLU()), "0", 3), TypeError, "cannot assign int to child module '0'"),
        (
            lambda: setattr(nn.BatchNorm2d(1), "running_mean", 3),
            TypeError,
            "cannot assign int to buffer 'running_mean'",
        ),
        (lambda: nn.Module().add_module("a.b", nn.ReLU()), ValueError, r"name 'a.b' must be"),
        (lambda: nn.Module().add_module("train", nn.ReLU()), KeyError, "attribute 'train' of Module exists"),
        (lambda: nn.Module().add_module("a", 3), TypeError, "'a' must be a Module or None, not int"),
        (lambda: nn.Module().register_parameter("a", Tensor(np.zeros(1))), TypeError, "wrap it"),
        (lambda: nn.Module().register_buffer("a", np.zeros(1)), TypeError, "must be a Tensor or None, not ndarray"),
        (lambda: nn.Parameter(np.zeros(3, np.int64)), ValueError, "floating"),
        (lambda: nn.Module()(1), NotImplementedError, r"Module does not define forward\(\)"),
        (lambda: nn.Module().train("yes"), ValueError, r"train\(mode\) needs True or False"),
        (lambda: nn.Linear(2, 2).to(np.int64), TypeError, "floating dtypes, not int64"),
        (lambda: nn.Linear(2, 2).register_forward_hook(3), TypeError, "must be callable"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_calling_a_module_that_skipped_init():
    class Empty(nn.Module):
        def __init__(self):
            pass

        def forward(self, x):
            return x

    with pytest.raises(AttributeError, match=r"Empty.__init__\(\) must call super\(\).__init__\(\) first"):
        Empty()(1)


# --- state dict -------------------------------------------------------------------------------------------------------


def test_state_dict_round_trip():
    a, b = Net(), Net()
    a(_tensor(2, 3, 6, 6))
    assert b.load_state_dict(a.state_dict()) == ([], [])
    x = _tensor(2, 3, 6, 6)
    np.testing.assert_array_equal(a.eval()(x).array, b.eval()(x).array)
    assert int(b.bn1.num_batches_tracked.array) == 1
    assert all(p.array is not q.array for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_state_dict_is_detached_and_shares_memory():
    net = Net()
    saved = net.state_dict()
    assert all(not t.requires_grad and type(t) is Tensor for t in saved.values())
    net.scale.data.copy_(np.full((1, 5), 3.0))
    assert saved["scale"].array[0, 0] == 3.0


def test_loading_keeps_dtype_and_takes_arrays():
    net = nn.Linear(2, 3)
    weight = np.arange(6.0).reshape(3, 2)
    net.load_state_dict({"weight": weight, "bias": np.zeros(3)})
    assert net.weight.dtype == np.float32 and net.weight.array.tolist() == weight.tolist()


def test_a_state_dict_that_does_not_fit_loads_nothing():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = {k: v.array.copy() for k, v in net.state_dict().items()}
    wrong = {k: v + 1 for k, v in before.items() if k not in ("0.bias", "1.weight")}
    wrong |= {
        "0.weight": np.zeros((3, 4)),
        "1.running_var": np.zeros(1),
        "head.bias": np.zeros(1),
        "extra": np.zeros(1),
    }
    with pytest.raises(nn.StateDictError) as caught:
        net.load_state_dict(wrong)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, RuntimeError)
    assert str(caught.value).splitlines() == [
        "state dict does not fit Sequential:",
        "    missing keys: 0.bias, 1.weight",
        "    unexpected keys: head.bias, extra",
        "    0.weight: shape (3, 4) in the state dict, (3, 2) in the module",
        "    1.running_var: shape (1,) in the state dict, (3,) in the module",
    ]
    with pytest.raises(nn.StateDictError, match=r"0\.weight: shape"):  # shapes are never a matter of strictness
        net.load_state_dict(wrong, strict=False)
    for key, value in net.state_dict().items():
        np.testing.assert_array_equal(value.array, before[key])


def test_not_strict():
    net = nn.Linear(2, 3)
    missing, unexpected = net.load_state_dict({"bias": np.ones(3), "other": np.zeros(1)}, strict=False)
    assert (missing, unexpected) == (["weight"], ["other"]) and net.bias.array.tolist() == [1, 1, 1]


def test_checkpoints_from_before_num_batches_tracked():
    net = nn.BatchNorm2d(2)
    old = {k: v for k, v in net.state_dict().items() if k != "num_batches_tracked"}
    assert net.load_state_dict(old) == ([], [])


def test_hint_for_data_parallel():
    net = nn.Linear(2, 3)
    with pytest.raises(nn.StateDictError, match="remove that prefix"):
        net.load_state_dict({f"module.{k}": v for k, v in net.state_dict().items()})


def test_complex_values_do_not_fit_real_ones():
    net = nn.Linear(1, 1, bias=False)
    with pytest.raises(nn.StateDictError, match="complex128 in the state dict, float32 in the module"):
        net.load_state_dict({"weight": np.ones((1, 1), complex)})


# --- modes, dtypes ----------------------------------------------------------------------------------------------------


def test_train_and_eval_reach_everything():
    net = Net()
    assert net.training and net.eval() is net and not any(m.training for m in net.modules())
    net.layer1.train()
    assert [n for n, m in net.named_modules() if m.training] == ["layer1", "layer1.0", "layer1.1"]


def test_a_nested_module_may_override_train():
    class Frozen(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(False)

    assert not nn.Sequential(nn.Sequential(Frozen(2))).train()[0][0].training


def test_to_converts_what_is_floating_in_place():
    net = Net()
    net(_tensor(2, 3, 5, 5)).sum().backward()
    parameter = net.fc.weight
    assert net.float() is net and net.fc.weight is parameter
    assert {t.dtype for t in net.parameters()} == {np.dtype(np.float32)} == {p.grad.dtype for p in net.parameters()}
    assert net.bn1.running_mean.dtype == np.float32 and net.bn1.num_batches_tracked.dtype == np.int64
    assert net(_tensor(2, 3, 5, 5, dtype=np.float32)).dtype == np.float32
    assert net.double().fc.weight.dtype == np.float64
    assert net.to("cpu", np.float32).fc.weight.dtype == np.float32
    assert net.to(_tensor(1)).fc.weight.dtype == np.float64
    assert net.half().cpu().fc.weight.dtype == np.float16


def test_freezing_and_zero_grad():
    net = Net()
    net.layer1.requires_grad_(False)
    net(_tensor(2, 3, 5, 5)).backward(_tensor(2, 5))
    assert [n for n, p in net.named_parameters() if p.grad is None] == [
        f"layer1.{n}" for n, _ in net.layer1.named_parameters()
    ]
    net.zero_grad(set_to_none=False)
    assert (net.fc.weight.grad.array == 0).all()
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_apply_visits_children_first():
    seen = []
    net = Net()
    assert net.apply(lambda m: seen.append(m)) is net
    assert seen[-1] is net and len(seen) == len(list(net.modules()))
    assert seen.index(net.layer1[0]) < seen.index(net.layer1)


def test_deepcopy_is_independent():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    other = copy.deepcopy(net)
    assert other[0].weight is other[1].weight and other[0].weight is not net[0].weight
    assert isinstance(other[0].weight, nn.Parameter) and other[0].weight.requires_grad
    other[0].weight.data.copy_(np.zeros((2, 2)))
    assert net[0].weight.array.any()


def test_a_parameter_shares_its_data():
    data = _tensor(3)
    parameter = nn.Parameter(data)
    assert parameter.array is data.array and parameter.requires_grad and parameter.is_leaf
    assert repr(parameter).startswith("Parameter containing:\n")
    assert not nn.Parameter(data, requires_grad=False).requires_grad


# --- hooks and scope --------------------------------------------------------------------------------------------------


def test_forward_hooks():
    layer, log = nn.Linear(2, 3), []
    x = _tensor(4, 2, dtype=np.float32)
    plain = layer(x)
    pre = layer.register_forward_pre_hook(lambda m, args: log.append(("pre", m, args)))
    post = layer.register_forward_hook(lambda m, args, y: log.append(("post", m, args, y)))
    y = layer(x)
    assert log == [("pre", layer, (x,)), ("post", layer, (x,), y)]
    pre.remove()
    post.remove()
    pre.remove()  # twice is fine
    layer(x)
    assert len(log) == 2
    with layer.register_forward_pre_hook(lambda m, args: args[0] * 2), layer.register_forward_hook(lambda m, a, y: -y):
        np.testing.assert_allclose(layer(x).array, -layer.forward(x * 2).array)
    np.testing.assert_array_equal(layer(x).array, plain.array)


def test_a_hook_may_remove_itself():
    layer, calls = nn.Identity(), []

    def once(module, args, y):
        calls.append(1)
        handle.remove()

    handle = layer.register_forward_hook(once)
    layer(1)
    layer(1)
    assert calls == [1]


def test_scope_is_the_chain_of_running_modules_and_survives_errors():
    chains = []

    class Probe(nn.Module):
        def forward(self, fail):
            scope, chain = state.scope, []
            while scope is not None:
                chain.append(scope.module)
                scope = scope.parent
            chains.append(chain)
            if fail:
                raise KeyError("inside")

    probe = Probe()
    inner = nn.Sequential(probe)
    outer = nn.Sequential(inner)
    outer(False)
    with pytest.raises(KeyError):
        outer(True)
    assert chains == [[probe, inner, outer]] * 2 and state.scope is None


def test_full_backward_hook_sees_and_replaces_gradients():
    first, second = nn.Linear(3, 4, dtype=np.float64), nn.Linear(4, 2, dtype=np.float64)
    net, seen = nn.Sequential(first, second), []
    x, dy = _tensor(5, 3, requires_grad=True), _tensor(5, 2)
    net(x).backward(dy)
    plain = x.grad.array
    x.grad = None
    handle = second.register_full_backward_hook(lambda m, gi, go: seen.append((m, gi, go)))
    net(x).backward(dy)
    ((module, grad_input, grad_output),) = seen
    assert module is second
    np.testing.assert_array_equal(grad_output[0].array, dy.array)
    np.testing.assert_allclose(grad_input[0].array, dy.array @ second.weight.array, rtol=1e-12)
    np.testing.assert_allclose(x.grad.array, plain, rtol=1e-12)
    handle.remove()
    x.grad = None
    with second.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,)):
        net(x).backward(dy)
    np.testing.assert_allclose(x.grad.array, 2 * plain, rtol=1e-12)


def test_full_backward_hook_with_two_inputs_and_with_none():
    class Product(nn.Module):
        def forward(self, a, b):
            return a * b

    module, seen = Product(), []
    a, b, dy = _tensor(3, requires_grad=True), _tensor(3, requires_grad=True), _tensor(3)
    with module.register_full_backward_hook(lambda m, gi, go: seen.append(gi)):
        module(a, b).backward(dy)
        module(a, b.detach()).backward(dy)
    np.testing.assert_allclose(seen[0][0].array, dy.array * b.array)
    np.testing.assert_allclose(seen[0][1].array, dy.array * a.array)
    assert seen[1][1] is None
    layer, seen = nn.Linear(3, 2, dtype=np.float64), []
    with layer.register_full_backward_hook(lambda m, gi, go: seen.append((gi, go))):
        layer(_tensor(4, 3)).backward(dy2 := _tensor(4, 2))
        with no_grad():
            layer(_tensor(4, 3))
    assert len(seen) == 1 and seen[0][0] == (None,)
    np.testing.assert_array_equal(seen[0][1][0].array, dy2.array)
    with (
        module.register_full_backward_hook(lambda m, gi, go: gi),
        pytest.raises(ValueError, match="one input, not of 2"),
    ):
        module(a, b).backward(dy)


# --- PyTorch ----------------------------------------------------------------------------------------------------------


@pytest.mark.peers
def test_a_small_net_has_pytorchs_keys_and_outputs():
    import torch

    class Peer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.bn1 = torch.nn.BatchNorm2d(8)
            self.layer1 = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8))
            self.pool = torch.nn.AdaptiveAvgPool2d(1)
            self.fc = torch.nn.Linear(8, 5)
            self.scale = torch.nn.Parameter(torch.ones(1, 5))

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x)))
            return self.fc(self.pool(torch.relu(self.layer1(x) + x)).flatten(1)) * self.scale

    ours, peer = Net(), Peer().double()
    assert list(ours.state_dict()) == list(peer.state_dict()) == KEYS
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in peer.named_parameters()]
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in peer.named_modules()]
    ours.load_state_dict(peer.state_dict())  # NumPy understands PyTorch's tensors
    x, dy = _tensor(4, 3, 6, 6), _tensor(4, 5)
    y, their_y = ours(x), peer(torch.from_numpy(x.array))
    np.testing.assert_allclose(y.array, their_y.detach().numpy(), rtol=1e-11, atol=1e-12)
    y.backward(dy)
    their_y.backward(torch.from_numpy(dy.array))
    for (name, p), q in zip(ours.named_parameters(), peer.parameters(), strict=True):
        np.testing.assert_allclose(p.grad.array, q.grad.numpy(), rtol=1e-9, atol=1e-11, err_msg=name)
