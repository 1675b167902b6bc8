"""The networks: parameter counts of the papers, torchvision's names, shapes, gradients, skips, and what layers cost."""

import numpy as np
import pytest

import minires
from minires import models, nn
from minires.engine import Tensor, no_grad
from minires.models import create_model, describe, list_models
from minires.models.blocks import BasicBlock, Block, Bottleneck, PreActBasicBlock, PreActBottleneck, ZeroPadShortcut

COUNTS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet1202": 19_421_274,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# torchvision's resnet18().state_dict(), in its order, up to the end of layer2
RESNET18_KEYS = [
    "conv1.weight",
    *(f"bn1.{key}" for key in BN),
    "layer1.0.conv1.weight",
    *(f"layer1.0.bn1.{key}" for key in BN),
    "layer1.0.conv2.weight",
    *(f"layer1.0.bn2.{key}" for key in BN),
    "layer1.1.conv1.weight",
    *(f"layer1.1.bn1.{key}" for key in BN),
    "layer1.1.conv2.weight",
    *(f"layer1.1.bn2.{key}" for key in BN),
    "layer2.0.conv1.weight",
    *(f"layer2.0.bn1.{key}" for key in BN),
    "layer2.0.conv2.weight",
    *(f"layer2.0.bn2.{key}" for key in BN),
    "layer2.0.downsample.0.weight",
    *(f"layer2.0.downsample.1.{key}" for key in BN),
    "layer2.1.conv1.weight",
    *(f"layer2.1.bn1.{key}" for key in BN),
    "layer2.1.conv2.weight",
    *(f"layer2.1.bn2.{key}" for key in BN),
]
RESNET50_BLOCK_KEYS = [  # torchvision's resnet50, layer1.0
    "conv1.weight",
    *(f"bn1.{key}" for key in BN),
    "conv2.weight",
    *(f"bn2.{key}" for key in BN),
    "conv3.weight",
    *(f"bn3.{key}" for key in BN),
    "downsample.0.weight",
    *(f"downsample.1.{key}" for key in BN),
]


def count(model):
    return sum(p.array.size for p in model.parameters())


def images(*shape, seed=0, dtype=np.float32):
    return Tensor(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def backward(y, seed=1):
    """Backward with a random upstream gradient."""
    y.backward(Tensor(np.random.default_rng(seed).standard_normal(y.shape).astype(y.dtype)))


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_papers(name):
    assert count(create_model(name)) == COUNTS[name]


@pytest.mark.parametrize("name", ["plain20", "plain56"])
def test_plain_twin_of_option_a_has_as_many_parameters(name):
    assert count(create_model(name)) == COUNTS[name.replace("plain", "resnet")]


def test_option_b_adds_two_projections():
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert count(models.resnet20(shortcut="B")) == COUNTS["resnet20"] + projections


def test_pre_activation_networks_have_the_papers_size():
    assert round(count(models.preact_resnet164()) / 1e6, 1) == 1.7  # He et al. 2016, table 4
    # the first block has no bn1, a later layer's first block has a narrower one, the head has one more: in all as many
    assert count(models.preact_resnet20()) == COUNTS["resnet20"]


def test_names_and_order_are_torchvisions():
    keys = list(models.resnet18().state_dict())
    assert keys[: len(RESNET18_KEYS)] == RESNET18_KEYS
    assert keys[-2:] == ["fc.weight", "fc.bias"] and len(keys) == 122
    prefix = "layer1.0."
    keys = [key.removeprefix(prefix) for key in models.resnet50().state_dict() if key.startswith(prefix)]
    assert keys == RESNET50_BLOCK_KEYS


def test_cifar_names():
    keys = list(models.resnet20().state_dict())
    assert [key for key in keys if "downsample" in key] == []  # option A has no parameters
    assert keys[0] == "conv1.weight" and keys[1] == "bn1.weight" and keys[-1] == "fc.bias"
    assert "layer3.2.bn2.running_var" in keys and "layer4.0.conv1.weight" not in keys


def test_convolutions_start_with_kaiming_fan_out():
    minires.manual_seed(0)
    model = models.resnet18()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            w = module.weight.array
            fan_out = w.shape[0] * w.shape[2] * w.shape[3]
            std = np.sqrt(2 / fan_out)  # of n draws, the standard deviation is off by about std / sqrt(2n)
            assert abs(w.std() - std) < 5 * std / np.sqrt(2 * w.size)
            assert abs(w.mean()) < 5 * std / np.sqrt(w.size)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight.array == 1).all() and (module.bias.array == 0).all()


# --- forward and backward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, shape, options",
    [
        ("resnet18", (2, 3, 33, 45), {}),
        ("resnet50", (2, 3, 64, 64), {"variant": "v1"}),
        ("resnet50", (1, 3, 65, 63), {"zero_init_residual": True}),
        ("resnet20", (3, 3, 32, 32), {}),
        ("resnet20", (2, 3, 17, 31), {"shortcut": "B"}),
        ("resnet20", (2, 3, 17, 31), {}),
        ("plain20", (2, 3, 9, 16), {}),
        ("plain18", (2, 3, 33, 45), {}),
        ("preact_resnet20", (2, 3, 15, 16), {}),
        ("preact_resnet20", (2, 3, 15, 16), {"shortcut": "B"}),
        ("preact_resnet164", (1, 3, 8, 8), {}),
        ("preact_resnet50", (1, 3, 64, 64), {}),
        ("resnet18", (2, 3, 16, 16), {"stem": "cifar"}),
    ],
)
def test_logits_and_a_gradient_in_every_parameter(name, shape, options):
    minires.manual_seed(0)
    model = create_model(name, num_classes=7, **options)
    y = model(images(*shape))
    assert y.shape == (shape[0], 7) and np.isfinite(y.array).all()
    backward(y)
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.shape == p.shape, key
        assert np.isfinite(p.grad.array).all(), key
        assert (np.abs(p.grad.array).max() > 0) != silenced(model, key, options), key


def silenced(model, key, options):
    """Whether the zeroed end of a residual branch keeps the gradient from this parameter, at the first step."""
    block = model.blocks().get(".".join(key.split(".")[:2]))
    part = key.split(".")[2:3]
    return bool(options.get("zero_init_residual") and block and part[0] not in (block.last, "downsample"))


def test_one_channel_and_evaluation_mode():
    minires.manual_seed(0)
    model = models.resnet20(in_channels=1).eval()
    x = images(2, 1, 28, 28)
    with no_grad():
        both, first = model(x), model(Tensor(x.array[:1]))
    assert both.shape == (2, 10) and not both.requires_grad
    np.testing.assert_allclose(both.array[:1], first.array, rtol=1e-5, atol=1e-5)  # one image does not see the other


def test_v1_strides_in_the_first_convolution():
    def strides(variant):
        convolutions = {
            key: m for key, m in models.resnet50(variant=variant).named_modules() if key.startswith("layer2.0")
        }
        return tuple(convolutions[f"layer2.0.conv{i}"].stride for i in (1, 2, 3))

    assert strides("v1.5") == ((1, 1), (2, 2), (1, 1))
    assert strides("v1") == ((2, 2), (1, 1), (1, 1))


def test_resnet1202_forward_and_backward():
    minires.manual_seed(0)
    model = models.resnet1202()
    y = model(images(2, 3, 4, 4))
    backward(y)
    assert all(p.grad is not None for p in model.parameters())
    assert np.abs(model.conv1.weight.grad.array).max() > 0


# --- blocks, each against its formula ---------------------------------------------------------------------------------


def relu(x):
    return np.maximum(x, 0)


def normalised(bn, x):
    """A BatchNorm in training, as a formula."""
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    gamma, beta = (p.array.reshape(1, -1, 1, 1) for p in (bn.weight, bn.bias))
    return gamma * (x - mean) / np.sqrt(var + bn.eps) + beta


def built(block, *args, **kwargs):
    """A float64 block whose BatchNorms are not at their start."""
    minires.manual_seed(3)
    rng = np.random.default_rng(4)
    module = block(*args, **kwargs).double()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.copy_(rng.uniform(0.5, 1.5, m.weight.shape))
            m.bias.data.copy_(rng.standard_normal(m.bias.shape))
    return module


def conv(layer, x):
    return layer(Tensor(x)).array


@pytest.mark.parametrize("stride, shortcut", [(1, "A"), (2, "A"), (2, "B")])
def test_basic_block_is_its_formula(stride, shortcut):
    b = built(BasicBlock, 4, 4 if stride == 1 else 6, stride, shortcut)
    x = images(2, 4, 7, 6, dtype=np.float64).array
    f = normalised(b.bn2, conv(b.conv2, relu(normalised(b.bn1, conv(b.conv1, x)))))
    if b.downsample is None:
        s = x
    elif shortcut == "A":
        s = np.pad(x[:, :, ::2, ::2], ((0, 0), (1, 1), (0, 0), (0, 0)))
    else:
        s = normalised(b.downsample[1], conv(b.downsample[0], x))
    np.testing.assert_allclose(b(Tensor(x)).array, relu(f + s), rtol=0, atol=1e-12)
    b.drop_skip()
    np.testing.assert_allclose(b(Tensor(x)).array, relu(f), rtol=0, atol=1e-12)


def test_bottleneck_is_its_formula():
    b = built(Bottleneck, 8, 4, 2)
    x = images(2, 8, 5, 6, dtype=np.float64).array
    f = relu(normalised(b.bn1, conv(b.conv1, x)))
    f = relu(normalised(b.bn2, conv(b.conv2, f)))
    f = normalised(b.bn3, conv(b.conv3, f))
    s = normalised(b.downsample[1], conv(b.downsample[0], x))
    np.testing.assert_allclose(b(Tensor(x)).array, relu(f + s), rtol=0, atol=1e-12)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("block, channels", [(PreActBasicBlock, 8), (PreActBottleneck, 2), (PreActBottleneck, 4)])
def test_pre_activation_block_is_its_formula(block, channels, first):
    b = built(block, 8, channels, first=first)
    x = images(2, 8, 5, 6, dtype=np.float64).array
    a = x if first else relu(normalised(b.bn1, x))
    f = conv(b.conv2, relu(normalised(b.bn2, conv(b.conv1, a))))
    if block is PreActBottleneck:
        f = conv(b.conv3, relu(normalised(b.bn3, f)))
    s = x if b.downsample is None else conv(b.downsample[0], a)
    np.testing.assert_allclose(b(Tensor(x)).array, f + s, rtol=0, atol=1e-12)
    assert (b.bn1 is None) == first
    assert (b.downsample is None) == (channels * block.expansion == 8)


@pytest.mark.parametrize("height, width, extra", [(8, 8, 16), (7, 5, 3), (1, 2, 1)])
def test_option_a_is_every_second_pixel_and_channels_of_zeros(height, width, extra):
    x = images(2, 5, height, width)
    x.requires_grad_()
    y = ZeroPadShortcut(5, 5 + extra, 2)(x)
    expected = np.zeros((2, 5 + extra, (height + 1) // 2, (width + 1) // 2), np.float32)
    expected[:, extra // 2 : extra // 2 + 5] = x.array[:, :, ::2, ::2]
    np.testing.assert_array_equal(y.array, expected)
    dy = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
    y.backward(Tensor(dy))
    dx = np.zeros_like(x.array)
    dx[:, :, ::2, ::2] = dy[:, extra // 2 : extra // 2 + 5]
    np.testing.assert_array_equal(x.grad.array, dx)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet50", "preact_resnet20", "preact_resnet50"])
def test_zero_init_residual_makes_every_block_its_shortcut(name):
    minires.manual_seed(0)
    model = create_model(name, zero_init_residual=True, num_classes=5)
    x = images(2, 3, 32, 32)
    with no_grad():
        x = model.stem(x)
        for layer in model.layer_names:
            for block in getattr(model, layer):
                a = x
                if block.preact and block.downsample is not None and block.bn1 is not None:
                    a = block.bn1(x, relu=True)
                shortcut = block.shortcut(a).array
                y = block(x).array
                np.testing.assert_array_equal(y, shortcut if block.preact else np.maximum(shortcut, 0))
                if block.downsample is None:
                    np.testing.assert_array_equal(y, x.array)
                x = Tensor(y)
    ends = [getattr(block, block.last).weight.array for block in create_model(name, num_classes=5).blocks().values()]
    assert all(np.abs(end).max() > 0 for end in ends)  # without the option nothing is zero


# --- plain twins and dropped skips ------------------------------------------------------------------------------------


def twins(name, **options):
    for kind in ("resnet", "plain"):
        minires.manual_seed(5)
        yield create_model(f"{kind}{name}", num_classes=10, **options)


@pytest.mark.parametrize("name", ["20", "18"])
def test_plain_twin_has_the_weights_but_no_skip(name):
    residual, plain = twins(name)
    weights = plain.state_dict()
    for key, value in residual.state_dict().items():
        if ".downsample." in key:
            assert key not in weights
        else:
            np.testing.assert_array_equal(value.array, weights[key].array)
    x = images(2, 3, 32, 32)
    y, z = residual(x).array, plain(x).array
    assert np.abs(y - z).max() > 0.01


def test_a_plain_block_forgets_x_where_its_branch_is_zero():
    plain = models.resnet20(drop_skip="all", zero_init_residual=True)
    with no_grad():
        out = plain.features(images(2, 3, 16, 16), at="layer3")["layer3"]
    assert (out.array == 0).all()


def test_drop_skip_removes_the_named_skips_only():
    residual, built_plain = (
        models.resnet20(shortcut="B"),
        models.resnet20(shortcut="B", drop_skip=("layer1.0", "layer3.0")),
    )
    residual.drop_skip("layer1.0", "layer3.0")
    for model in (residual, built_plain):
        assert [name for name, block in model.blocks().items() if not block.skip] == ["layer1.0", "layer3.0"]
        assert "layer2.0.downsample.0.weight" in model.state_dict()
        assert not any(key.startswith("layer3.0.downsample") for key in model.state_dict())
        backward(model(images(2, 3, 16, 16)))
        assert all(p.grad is not None for p in model.parameters())


def test_drop_skip_leaves_an_output_that_is_the_formula():
    minires.manual_seed(0)
    model = models.resnet20(drop_skip="layer2.1").double()
    x = images(2, 3, 16, 16, dtype=np.float64)
    block = model.blocks()["layer2.1"]
    with no_grad():
        h = model.layer2[0](model.features(x, at="layer1")["layer1"])
        expected = block.bn2(block.conv2(block.bn1(block.conv1(h), relu=True)), relu=True)
        np.testing.assert_array_equal(block(h).array, expected.array)


# --- features ---------------------------------------------------------------------------------------------------------


def test_features_are_the_activations_on_the_way_to_the_logits():
    minires.manual_seed(0)
    model = models.resnet18(num_classes=3).eval()
    x = images(1, 3, 64, 96)
    with no_grad():
        found = model.features(x, at=("layer4", "layer2", "stem"))
        assert list(found) == ["layer4", "layer2", "stem"]
        shapes = {name: y.shape for name, y in found.items()}
        assert shapes == {"layer4": (1, 512, 2, 3), "layer2": (1, 128, 8, 12), "stem": (1, 64, 16, 24)}
        np.testing.assert_array_equal(model.head(found["layer4"]).array, model(x).array)
        np.testing.assert_array_equal(model.layer4(model.layer3(found["layer2"])).array, found["layer4"].array)


def test_features_run_no_further_than_needed_and_carry_gradients():
    model = models.resnet20()
    y = model.features(images(2, 3, 16, 16), at="layer2")["layer2"]
    assert y.shape == (2, 32, 8, 8)
    backward(y)
    reached = {key.split(".")[0] for key, p in model.named_parameters() if p.grad is not None}
    assert reached == {"conv1", "bn1", "layer1", "layer2"}
    seen = {key.split(".")[0]: int(b.array) for key, b in model.named_buffers() if key.endswith("num_batches_tracked")}
    assert seen == {"bn1": 1, "layer1": 1, "layer2": 1, "layer3": 0}


def test_features_names_what_is_not_there():
    with pytest.raises(ValueError, match=r"at='layer4' is not one of stem, layer1, layer2, layer3$"):
        models.resnet20().features(images(1, 3, 8, 8), at=("layer1", "layer4"))


# --- by name ----------------------------------------------------------------------------------------------------------


def test_list_models():
    names = list_models()
    assert {*COUNTS, "plain18", "plain20", "plain110", "preact_resnet110"} <= set(names)
    assert len(names) == len(set(names)) and all(callable(getattr(models, name)) for name in names)
    assert list_models("plain*") == [name for name in names if name.startswith("plain")] != []
    assert list_models("vgg*") == []


def test_functions_are_the_named_models():
    minires.manual_seed(1)
    a = models.resnet20(4, shortcut="B").state_dict()
    minires.manual_seed(1)
    b = create_model("resnet20", num_classes=4, shortcut="B").state_dict()
    assert a.keys() == b.keys() and all((a[key].array == b[key].array).all() for key in a)
    assert models.resnet20.__name__ == "resnet20" and "269,722" in models.resnet20.__doc__


def test_num_classes_and_in_channels():
    model = create_model("resnet18", num_classes=5, in_channels=1)
    assert model.fc.weight.shape == (5, 512) and model.conv1.weight.shape == (64, 1, 7, 7)
    assert create_model("resnet18").fc.weight.shape[0] == 1000
    assert create_model("resnet110").fc.weight.shape[0] == 10


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: create_model("resnet21"),
            r"no model is named 'resnet21' \(did you mean .*resnet20.*\?\); there are .*resnet18",
        ),
        (lambda: create_model("???"), r"no model is named '\?\?\?'; there are "),
        (lambda: create_model("resnet20", num_classes=0), r"num_classes=0 must be an int of at least 1"),
        (lambda: create_model("resnet20", num_classes=2.5), r"num_classes=2.5 must be"),
        (lambda: create_model("resnet20", in_channels=True), r"in_channels=True must be"),
        (lambda: create_model("resnet20", shortcut="C"), r"shortcut='C' is not one of A, B"),
        (lambda: create_model("resnet50", variant="v2"), r"variant='v2' is not one of v1.5, v1"),
        (lambda: create_model("resnet50", stem="none"), r"stem='none' is not one of imagenet, cifar"),
        (lambda: create_model("resnet20", short="A"), r"resnet20 has no option 'short' \(did you mean .*shortcut"),
        (lambda: create_model("plain20", drop_skip=()), r"plain20 has no option 'drop_skip'"),
        (lambda: create_model("resnet20", drop_skip="layer1.7"), r"drop_skip='layer1.7' is not one of all, layer1.0"),
        (lambda: create_model("resnet20", drop_skip=3), r"drop_skip=3 must be a name or several"),
        (lambda: models.resnet20().drop_skip("fc"), r"drop_skip='fc' is not one of"),
        (lambda: describe("resnet20", image_size=0), r"input shape \(1, 3, 0, 0\) must be"),
        (lambda: describe(nn.Linear(3, 4)), r"the input of a Linear cannot be guessed: give input_shape="),
        (lambda: ZeroPadShortcut(8, 4, 2), r"shortcut='A' adds channels: it cannot make 4 of 8"),
    ],
)
def test_bad_input_gets_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_every_registered_block_knows_its_end():
    for block in (BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck):
        assert issubclass(block, Block) and hasattr(block(8, 8), block.last)
