"""The experiments at small size: each one's claim, and its numbers against a definition of their own."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import minires
from minires import models, nn, study
from minires.engine import Tensor
from minires.hooks import BranchGradHook
from minires.nn import functional as F
from minires.study.branches import Shares, shares
from minires.study.gradients import RELU_RATE, profile
from minires.study.lesion import examine, removable, swapped, without
from minires.study.networks import digits, error_rate, fit, network, steps_of
from minires.study.shatter import Deep, autocorrelation, slopes
from minires.study.toposort import by_paths, chain, naive


@pytest.fixture(scope="module")
def small():
    return digits(8)


def batch(n=16, size=8, channels=1):
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, channels, size, size)), rng.integers(0, 10, n)


# --- toposort -------------------------------------------------------------------------------------------------------


def test_naive_recursion_counts_twice_and_the_engine_does_not():
    found = study.toposort(blocks=(1, 2, 3, 300), naive_blocks=3)
    assert found.blocks.tolist() == [1, 2, 3, 300]
    assert found.true[:3].tolist() == [1.5, 2.25, 3.375]
    assert found.naive[:3].tolist() == [1.5, 5.25, 30.75] and np.isnan(found.naive[3])
    assert found.skip_first[1] == 4.25 and found.by_paths[:3].tolist() == [1.5, 2.25, 3.375]
    np.testing.assert_allclose(found.engine, found.true, rtol=1e-12)
    assert found.naive_visits.tolist() == [5, 13, 29, -1] and found.engine_visits.tolist() == [2, 4, 6, 600]
    assert all(f.agrees for f in found.findings())


@pytest.mark.parametrize("walk", [naive, lambda end: by_paths(end, 0.0)])
def test_visits_double_with_every_block(walk):
    assert [walk(chain(n)[1]) for n in (1, 4, 7)] == [4 * 2**n - 3 for n in (1, 4, 7)]


# --- gradients ------------------------------------------------------------------------------------------------------


def test_gradients_explode_in_plain_networks_with_bn_and_not_in_their_twins():
    found = study.gradients(depths=(20, 56), steps=0, images=16)
    plain, residual = found.at(0, residual=False, norm=True), found.at(0, residual=True, norm=True)
    assert [p.network for p in plain] == ["plain20", "plain56"]
    assert plain[1].ratio > 20 * plain[0].ratio > 20 * residual[0].ratio
    assert residual[1].ratio < 30
    for p in plain:
        assert abs(np.log(p.per_layer) / np.log(RELU_RATE) - 1) < 0.35
    bare = found.at(0, residual=False, norm=False)
    assert all(0.9 < p.per_layer < 1 for p in bare)  # He's initialisation, less the border's loss
    exploded = found.at(0, residual=True, norm=False)[1]
    assert exploded.activation[-1] > 100 * exploded.activation[0] and exploded.loss > 10
    assert "what textbooks say" in str(found)


def test_profile_is_what_backward_computes():
    model, (images, labels) = network("plain20", 3).double(), batch()
    before = {key: np.array(t.array) for key, t in model.state_dict().items()}
    found = profile(model, images, labels, "plain20", step=7)
    assert all(np.array_equal(t.array, before[key]) for key, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert (found.network, found.step, found.norm, found.depth, found.residual) == ("plain20", 7, True, 20, False)
    assert found.stages.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3] and found.sizes.tolist() == [8, 8, 8, 4, 4, 4, 2, 2, 2]

    names, outputs, x = list(model.blocks()), [], model.stem(Tensor(images))
    for name in names:
        x = model.get_submodule(name)(x)
        x.retain_grad()
        outputs.append(x)
    F.cross_entropy(model.head(x), Tensor(labels)).backward()
    np.testing.assert_allclose(found.gradient, [np.linalg.norm(y.grad.array) for y in outputs], rtol=1e-12)
    np.testing.assert_allclose(found.activation, [np.sqrt((y.array**2).mean()) for y in outputs], rtol=1e-12)
    weights = [model.get_submodule(name).conv1.weight for name in names]
    expected = [np.linalg.norm(w.grad.array) / np.linalg.norm(w.array) for w in weights]
    np.testing.assert_allclose(found.relative, expected, rtol=1e-12)
    assert found.ratio == pytest.approx(expected[0] / expected[-1])
    g = found.gradient
    six = (g[0] / g[2]) * (g[3] / g[5]) * (g[6] / g[8])  # two blocks, four convolutions, in each of three layers
    assert found.per_layer == pytest.approx(six ** (1 / 12))


def test_a_network_that_diverges_is_a_result():
    found = study.gradients(depths=(20,), steps=2, images=16, lr=1e6)
    assert any(not p.finite for p in found.profiles) or len(found.at(2, True, False)) == 0
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert found.png() and str(found)


def test_twins_have_the_same_weights_and_leave_the_generator_alone():
    minires.manual_seed(5)
    state = minires.get_rng_state()
    plain, residual = network("plain20", 1), network("resnet20", 1)
    assert minires.get_rng_state() == state
    theirs = plain.state_dict()
    assert all(np.array_equal(t.array, theirs[key].array) for key, t in residual.state_dict().items())
    bare = network("resnet20", 1, norm=False)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in bare.modules())
    images, _ = batch()
    x = Tensor(images.astype(np.float32))
    h = F.relu(bare.conv1(x))
    block = bare.layer1[0]
    expected = F.relu(block.conv2(F.relu(block.conv1(h))) + h)
    assert np.array_equal(bare.features(x, "stem")["stem"].array, h.array)
    assert np.array_equal(block(h).array, expected.array)


# --- branches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options", [("resnet20", {}), ("preact_resnet20", {}), ("resnet20", {"shortcut": "B"})])
def test_shares_of_the_identity_and_of_the_branch_make_up_the_gradient(name, options):
    minires.manual_seed(0)
    model = models.create_model(name, num_classes=10, in_channels=1, **options).double()
    images, labels = batch()
    found = shares(model, images, labels, epoch=3)
    assert found.epoch == 3 and found.blocks == list(model.blocks())
    np.testing.assert_allclose(found.identity_share + found.branch_share, 1, rtol=1e-12)

    loss = F.cross_entropy(model(Tensor(images)), Tensor(labels))
    with BranchGradHook(arrays=True) as hook:
        loss.backward()
    features = model.features(Tensor(images), ("stem", "layer1", "layer2"))
    rms = {name: np.sqrt((y.array**2).mean()) for name, y in features.items()}
    assert found.activation[[0, 3, 6]] == pytest.approx([rms["stem"], rms["layer1"], rms["layer2"]])
    joins = list(reversed([join for join in hook.joins if len(join.shares) == 2]))
    assert len(joins) == 9
    for i, join in enumerate(joins):
        into_branch = [s.module.endswith(("conv1", "bn1")) and "downsample" not in s.module for s in join.shares]
        branch, identity = join.shares[into_branch.index(True)].array, join.shares[into_branch.index(False)].array
        g = branch + identity
        assert found.branch[i] == pytest.approx(np.linalg.norm(branch))
        assert found.identity[i] == pytest.approx(np.linalg.norm(identity))
        assert found.branch_share[i] == pytest.approx((branch * g).sum() / (g * g).sum())
        assert found.cosine[i] == pytest.approx((branch * identity).sum() / found.branch[i] / found.identity[i])


def test_batch_normalisation_makes_deep_branches_small(small):
    model = network("preact_resnet56", 0)
    found = shares(model, small.images[:32], small.labels[:32])
    relative = found.branch / found.identity
    inside = [i for i, block in enumerate(found.blocks) if block.endswith((".1", ".8"))]
    first, last = relative[inside[::2]], relative[inside[1::2]]
    assert (last < 0.6 * first).all()
    findings = study.Branches({"preact_resnet56": [found, found]}, {"preact_resnet56": 0.0}, 1, 32, 0).findings()
    assert [f.agrees for f in findings if "De & Smith" in f.source] == [True]


def test_plain_networks_have_no_joins():
    with pytest.raises(ValueError, match="no skip connections"):
        shares(network("plain20", 0).double(), *batch())


def test_branches_through_training(small, monkeypatch):
    monkeypatch.setattr(sys.modules["minires.study.branches"], "digits", lambda: type(small)(*(a[:64] for a in small)))
    found = study.branches(models=("resnet20",), epochs=2, images=16)
    moments = found.shares["resnet20"]
    assert [m.epoch for m in moments] == [0, 1, 2] and all(isinstance(m, Shares) for m in moments)
    assert not np.allclose(moments[0].branch_share, moments[2].branch_share)
    assert "layer3.2" in str(found) and found.png()


# --- lesion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "preact_resnet20"])
def test_a_block_that_is_taken_out_leaves_its_shortcut(name):
    model = network(name, 0).double().eval()
    images, _ = batch(2)
    whole = model(Tensor(images)).array
    for block in ("layer1.1", "layer2.0", "layer1.0"):
        with without(model, [block]):
            out = model(Tensor(images)).array
        assert not np.allclose(out, whole)
        last = model.get_submodule(f"{block}.{model.blocks()[block].last}")
        kept = {key: np.array(t.array) for key, t in last.state_dict().items()}
        for parameter in last.parameters():
            parameter.array[...] = 0  # F(x) = 0
        np.testing.assert_allclose(out, model(Tensor(images)).array, rtol=1e-12, err_msg=block)
        last.load_state_dict(kept)
    np.testing.assert_array_equal(model(Tensor(images)).array, whole)


def test_swapped_blocks_change_places_and_back():
    model = network("resnet20", 0).eval()
    one, other = model.layer1[0], model.layer1[2]
    with swapped(model, [("layer1.0", "layer1.2"), ("layer2.1", "layer2.2")]):
        assert model.layer1[0] is other and model.layer1[2] is one
    assert model.layer1[0] is one and model.layer1[2] is other
    with pytest.raises(ValueError, match="different layers"), swapped(model, [("layer1.0", "layer2.1")]):
        pass


def test_removable_blocks():
    assert len(removable(network("resnet20", 0))) == 9
    plain = [f"layer{n}" for n in ("1.0", "1.1", "1.2", "2.1", "2.2", "3.1", "3.2")]
    assert removable(network("plain20", 0)) == plain


def test_a_plain_network_breaks_where_its_residual_twin_hardly_notices(small):
    patients = {}
    for name in ("plain20", "resnet20"):
        model = network(name, 0)
        fit(model, small, steps_of(4, small))
        before = {key: np.array(t.array) for key, t in model.state_dict().items()}
        patients[name] = examine(model, small.test_images, small.test_labels, name, draws=1)
        assert all(np.array_equal(t.array, before[key]) for key, t in model.state_dict().items())
        assert patients[name].whole == error_rate(model, small.test_images, small.test_labels)
    plain, residual = patients.values()
    assert plain.whole < 30 and residual.whole < 30
    assert np.median(plain.single) > np.median(residual.single) + 25
    assert residual.deleted[0, -1] > 60  # nothing but shortcuts is left
    found = study.Lesion([plain, residual], "after 4 epochs", 360, "digits", 0)
    assert found.png() and {f.agrees for f in found.findings()} <= {True, False}


@pytest.mark.skipif("MINIRES_DATA" not in os.environ, reason="needs the CIFAR-10 images and weights of MINIRES_DATA")
def test_published_weights_lose_little_with_a_block():
    folder = Path(os.environ["MINIRES_DATA"])
    weights, data = str(folder / "resnet20-12fca82f.th"), str(folder / "cifar10-jpg.tar.xz")
    found = study.lesion(weights=(weights,), data=data, images=200, draws=1)
    (patient,) = found.patients
    assert 10 < patient.whole < 30 and len(patient.blocks) == 9  # 18.97 % of all 10,000 JPEG images
    assert np.median(patient.single) < 60 and patient.deleted[0, -1] > 70


# --- shatter --------------------------------------------------------------------------------------------------------


def test_gradients_shatter_in_deep_plain_networks():
    settings = {"depths": (2, 24), "residual_depths": (24,), "betas": (0.1, 1.0), "width": 100, "seeds": 3}
    found = study.shatter(points=128, **settings)
    shallow, deep, small_beta, large_beta = found.lag1
    assert shallow > 0.8 and abs(deep) < 0.25 and small_beta > large_beta > deep + 0.2
    assert found.png() and "plain, 24 layers" in str(found)


@pytest.mark.parametrize("beta", [None, 0.5])
def test_slopes_are_those_of_the_function(beta):
    model = Deep(4, 30, beta, np.random.default_rng(0))
    found = slopes(model, points=40)
    x, h = np.linspace(-2, 2, 40)[:, None], 1e-9
    above, below = model(Tensor(x + h)).array, model(Tensor(x - h)).array
    np.testing.assert_allclose(found, (above - below)[:, 0] / (2 * h), rtol=1e-4, atol=1e-6)


def test_autocorrelation():
    v = np.random.default_rng(0).standard_normal(200)
    expected = np.correlate(v - v.mean(), v - v.mean(), "full")[199:205]
    np.testing.assert_allclose(autocorrelation(v, 5), expected / expected[0], rtol=1e-12)
    assert autocorrelation(np.sin(np.linspace(0, 6, 200)), 1)[1] > 0.95


# --- what all have in common ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "experiment, wrong, says",
    [
        ("toposort", {"blocks": ()}, "blocks=()"),
        ("toposort", {"blocks": (0,)}, "blocks=(0,)"),
        ("toposort", {"naive_blocks": 40}, "naive_blocks=40"),
        ("toposort", {"blocks": (9,), "naive_blocks": 3}, "naive_blocks=3"),
        ("gradients", {"steps": -1}, "steps=-1"),
        ("gradients", {"depths": ()}, "depths=()"),
        ("gradients", {"depths": (20, 21)}, "plain21"),
        ("branches", {"epochs": -1}, "epochs=-1"),
        ("branches", {"models": ("resnet20", "resnet21")}, "resnet21"),
        ("branches", {"models": ("resnet20", "plain20")}, "plain20"),
        ("lesion", {"draws": 0}, "draws=0"),
        ("lesion", {"models": ("resnet20", "resnet21")}, "resnet21"),
        ("lesion", {"weights": ("resnet18-imagenet-v1",)}, "ImageNet"),
        ("lesion", {"weights": ("resnet20-nothing",)}, "resnet20-nothing"),
        ("shatter", {"seeds": 0}, "seeds=0"),
        ("shatter", {"lags": 256}, "lags=256"),
        ("trace", {"model": "resnet21"}, "resnet21"),
        ("trace", {"model": "resnet20", "batch": 0}, "batch=0"),
    ],
)
def test_settings_that_cannot_be_are_named_before_anything_runs(experiment, wrong, says, monkeypatch):
    monkeypatch.setattr(minires.nn.Module, "__call__", lambda *args: pytest.fail("a network ran"))
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        getattr(study, experiment)(**wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "experiment, settings",
    [
        ("toposort", {"blocks": (1,)}),
        ("gradients", {"depths": (20,), "steps": 0}),
        ("gradients", {"depths": (20,), "steps": 1}),
        ("branches", {"models": ("preact_resnet20",), "epochs": 0}),
        ("lesion", {"models": ("plain20",), "epochs": 0, "draws": 1}),
        ("lesion", {"models": ("preact_resnet20",), "epochs": 0, "draws": 1}),
        ("shatter", {"depths": (2,), "residual_depths": (), "width": 8, "seeds": 1}),
        ("shatter", {"depths": (2,), "betas": (1.0,), "residual_depths": (2,), "width": 8, "seeds": 1}),
    ],
)
def test_the_smallest_settings_are_told_and_drawn(experiment, settings, small, monkeypatch, recwarn):
    few = type(small)(small.images[:64], small.labels[:64], small.test_images[::18], small.test_labels[::18])
    monkeypatch.setattr(sys.modules[f"minires.study.{experiment}"], "digits", lambda: few, raising=False)
    found = getattr(study, experiment)(**settings)
    assert found.tables() and found.png() and json.dumps(found.to_json(), allow_nan=False)
    text = str(found)
    assert "What was published" in text and "nan" not in text
    assert max(map(len, text.splitlines())) <= 120 and not list(recwarn)
