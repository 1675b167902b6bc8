"""Activations and gradients by name, patching and ablation, on a small residual network."""

import numpy as np
import pytest

import minires as mr
from minires import nn
from minires.capture import ablate, capture, patch
from minires.engine import Tensor, state


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
    """The same activation module is called twice."""

    def __init__(self, channels=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1)
        self.layer1 = nn.Sequential(Block(channels), Block(channels))
        self.relu = nn.ReLU()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.relu(self.layer1(self.relu(self.conv1(x))) - 0.5)
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def net():
    mr.manual_seed(0)
    return Net().double()


def images(n=2, seed=1):
    return Tensor(np.random.default_rng(seed).standard_normal((n, 3, 6, 6)))


DY = np.random.default_rng(99).standard_normal((2, 5))


def no_hooks_left(net):
    return not any(m._forward_hooks for m in net.modules()) and state.hooks == [] and state.fuse


def test_outputs_and_gradients_of_modules(net):
    with capture(net, "layer1.0", "fc", grads=True) as cache:
        y = net(images())
        assert cache["fc"].grad is None  # until backward
        y.backward(DY)
    assert list(cache) == ["layer1.0", "fc"]
    np.testing.assert_array_equal(cache["fc"].output.array, y.array)
    np.testing.assert_array_equal(cache["fc"].grad.array, DY)
    assert not cache["fc"].output.requires_grad
    # the gradient is that with respect to the activation: put it in as a leaf
    x = Tensor(cache["layer1.0"].output.array.copy(), requires_grad=True)
    net.fc(net.relu(net.layer1[1](x) - 0.5).mean((2, 3))).backward(DY)
    np.testing.assert_allclose(cache["layer1.0"].grad.array, x.grad.array, rtol=1e-9, atol=1e-12)
    assert no_hooks_left(net)


def test_wildcards_name_every_module_below(net):
    with capture(net, "layer1.*", "conv?") as cache:
        net(images())
    parts = ("conv1", "bn1", "conv2", "bn2")
    assert set(cache) == {
        "conv1",
        *(f"layer1.{i}" for i in (0, 1)),
        *(f"layer1.{i}.{p}" for i in (0, 1) for p in parts),
    }


def test_the_model_itself_has_the_empty_name(net):
    with capture(net, "") as cache:
        y = net(images())
    np.testing.assert_array_equal(cache[""].output.array, y.array)


def test_a_module_that_is_called_twice_has_two_outputs_and_gradients(net):
    with capture(net, "relu", grads=True) as cache:
        net(images()).backward(DY)
    first, second = cache["relu"].outputs
    assert not np.array_equal(first.array, second.array)
    assert cache["relu"].output is second
    # the second one goes straight into mean and fc
    want = np.broadcast_to((DY @ net.fc.weight.array)[:, :, None, None] / 36, second.shape)
    np.testing.assert_allclose(cache["relu"].grads[1].array, want, rtol=1e-12)
    assert cache["relu"].grads[0].shape == first.shape


def test_the_residual_branch_before_the_skip_is_added(net):
    x = images()
    fused = net(x).array
    names = ("layer1.0.bn2/BatchNorm", "layer1.0.bn2/Add", "layer1.0.bn2/ReLU")
    with capture(net, "layer1.0.bn2/*", "layer1.0", "relu", grads=True) as cache:
        y = net(x)
        y.backward(DY)
    assert set(cache) == {"layer1.0", "relu", *names}
    branch, total, out = (cache[name].output.array for name in names)
    skip = cache["relu"].outputs[0].array
    np.testing.assert_allclose(branch + skip, total, rtol=1e-12)
    np.testing.assert_array_equal(np.maximum(total, 0), out)
    np.testing.assert_array_equal(out, cache["layer1.0"].output.array)
    np.testing.assert_allclose(y.array, fused, rtol=1e-9)
    grads = [cache[name].grad.array for name in names]
    np.testing.assert_array_equal(grads[0], grads[1])
    np.testing.assert_array_equal(grads[1], grads[2] * (total > 0))
    assert no_hooks_left(net)


def test_ops_of_the_model_itself_also_where_it_runs_inside_another(net):
    outer = nn.Sequential(net, nn.Identity())
    with capture(net, "/Mean", "fc/*", "*/ReLU", grads=True) as cache:
        y = outer(images())
        mr.relu(y).backward(DY)  # outside of the model
    parts = ("bn1", "bn2")
    relus = {"relu/ReLU", *(f"layer1.{i}.{p}/ReLU" for i in (0, 1) for p in parts)}
    assert set(cache) == {"/Mean", "fc/Linear", *relus}
    assert len(cache["relu/ReLU"].outputs) == 2 and None not in cache["relu/ReLU"].grads


def test_names_that_are_not_there(net):
    with pytest.raises(KeyError, match=r"no module is named 'layer1\.0\.conv3'; near: 'layer1\.0\.conv"):
        with capture(net, "fc", "layer1.0.conv3"):
            pass
    with pytest.raises(KeyError, match=r"no module is named 'layer9\.\*'"), capture(net, "layer9.*"):
        pass
    with capture(net, "fc", "fc/Nothing") as cache:
        net(images())
    with pytest.raises(KeyError, match=r"nothing was captured under 'fc/Nothing'; near: 'fc'"):
        cache["fc/Nothing"]
    assert no_hooks_left(net)


def test_a_module_that_returns_no_tensor_cannot_be_captured():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    model = nn.Sequential(Two())
    with pytest.raises(TypeError, match="cannot capture '0': it returns a tuple"), capture(model, "0"):
        model(images())
    assert no_hooks_left(model)


# --- patching -------------------------------------------------------------------------------------------------------


def test_patching_in_a_clean_activation_gives_the_clean_result(net):
    net.eval()
    clean, corrupted = images(seed=1), images(seed=2)
    with capture(net, "layer1.0") as cache:
        want = net(clean).array
    assert not np.allclose(net(corrupted).array, want)
    with patch(net, {"layer1.0": cache["layer1.0"].output}):
        np.testing.assert_array_equal(net(corrupted).array, want)
    with patch(net, {"layer1.0": cache["layer1.0"].output.array}), capture(net, "layer1.0") as seen:
        np.testing.assert_array_equal(net(corrupted).array, want)
    np.testing.assert_array_equal(seen["layer1.0"].output.array, cache["layer1.0"].output.array)
    assert no_hooks_left(net)


def test_gradients_flow_through_a_function_and_stop_at_an_array(net):
    net(images()).backward(DY)
    plain = net.conv1.weight.grad.array.copy()
    net.zero_grad()
    with patch(net, {"fc": lambda y: 3 * y}):
        net(images()).backward(DY)
    np.testing.assert_allclose(net.conv1.weight.grad.array, 3 * plain, rtol=1e-9)
    net.zero_grad()
    with patch(net, {"layer1.?": np.ones((2, 4, 6, 6))}):
        net(images()).backward(DY)
    assert net.conv1.weight.grad is None and net.fc.weight.grad is not None


def test_a_patch_must_fit(net):
    with pytest.raises(ValueError, match=r"'fc' puts out shape \(2, 5\), its replacement has shape \(2, 4\)"):
        with patch(net, {"fc": np.zeros((2, 4))}):
            net(images())
    with pytest.raises(KeyError, match="no module is named 'fd'; near: 'fc'"), patch(net, {"fd": np.zeros(3)}):
        pass
    assert no_hooks_left(net)


# --- ablation -------------------------------------------------------------------------------------------------------


def test_a_block_without_its_branch_hands_its_input_on(net):
    net.eval()
    with ablate(net, "layer1.1", to="identity"), capture(net, "layer1.0", "layer1") as cache:
        lesioned = net(images()).array
    np.testing.assert_array_equal(cache["layer1"].output.array, cache["layer1.0"].output.array)
    del net.layer1[1]
    np.testing.assert_array_equal(net(images()).array, lesioned)


def test_zero_and_mean(net):
    with capture(net, "layer1.0.conv2") as cache:
        net(images())
    with ablate(net, "layer1.0.conv2"), capture(net, "layer1.0.conv2") as zero:
        net(images())
    assert not zero["layer1.0.conv2"].output.array.any()
    with ablate(net, "layer1.0.conv?", "fc", to="mean"), capture(net, "layer1.0.conv1", "fc") as mean:
        y = net(images()).array
    with capture(net, "layer1.0.conv1") as cache:
        net(images())
    want = np.broadcast_to(cache["layer1.0.conv1"].output.array.mean((0, 2, 3), keepdims=True), (2, 4, 6, 6))
    np.testing.assert_allclose(mean["layer1.0.conv1"].output.array, want, rtol=1e-12)
    np.testing.assert_array_equal(y[0], y[1])
    assert no_hooks_left(net)


def test_ablation_says_what_does_not_fit(net):
    with pytest.raises(ValueError, match=r"'fc' puts out shape \(2, 5\), its replacement has shape \(2, 4\)"):
        with ablate(net, "fc", to="identity"):
            net(images())
    with (
        pytest.raises(ValueError, match="to='noise' must be 'zero', 'identity' or 'mean'"),
        ablate(net, "fc", to="noise"),
    ):
        pass
    with pytest.raises(KeyError, match="no module is named 'layer2'"), ablate(net, "layer2"):
        pass
