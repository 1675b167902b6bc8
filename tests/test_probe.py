"""The linear probe: the minimum of its definition, and a run that has one."""

import numpy as np
import pytest

import minires
from minires.models import create_model
from minires.train import resume
from minires.train.evaluation import evaluate_run
from minires.train.finetune import finetune
from minires.train.probe import features, fit_head, minimise


def data(n=120, d=5, k=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    x = rng.normal(size=(n, d)) + rng.normal(size=(k, d))[labels]
    return (x * rng.uniform(0.1, 50, d) + rng.normal(size=d) * 10).astype(np.float32), labels


@pytest.mark.parametrize("l2", [1e-3, 0.1, 3.0])
def test_the_gradient_of_the_definition_vanishes(l2):
    """At the head that is found; the definition in float64, features scaled as it says."""
    x, labels = data()
    weight, bias = fit_head(x, labels, 3, l2)
    assert weight.shape == (3, 5) and bias.shape == (3,) and weight.dtype == bias.dtype == np.float32
    mean, scale = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    z, w = (x - mean) / scale, weight * scale
    y = z @ w.T + (bias + weight @ mean)
    p = np.exp(y - y.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(x)), labels] -= 1
    assert np.abs(p.T @ z / len(x) + l2 * w).max() < 3e-5 and np.abs(p.mean(0)).max() < 3e-5


def test_as_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, labels = data(seed=1)
    z = (x - x.mean(0, dtype=np.float64)) / x.std(0, dtype=np.float64)
    theirs = linear_model.LogisticRegression(C=1 / (0.05 * len(x)), tol=1e-8, max_iter=1000).fit(z, labels)
    weight, bias = fit_head(x, labels, 3, 0.05)
    y = x @ weight.T + bias
    shares = np.exp(y - y.max(1, keepdims=True))
    np.testing.assert_allclose(shares / shares.sum(1, keepdims=True), theirs.predict_proba(z), atol=2e-4)


def test_constant_features_say_nothing():
    x, labels = data()
    x = np.concatenate([x, np.full((len(x), 1), 7, np.float32), np.zeros((len(x), 1), np.float32)], 1)
    weight, _ = fit_head(x, labels, 3, 0.1)
    assert (weight[:, -2:] == 0).all() and np.isfinite(weight).all()
    x[0, 0] = np.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_head(x, labels, 3)


def test_classes_that_can_be_told_apart_are():
    labels = np.repeat(np.arange(4), 5)
    weight, bias = fit_head(np.eye(4, dtype=np.float32)[labels], labels, 4, 1e-6)
    assert ((np.eye(4) @ weight.T + bias).argmax(1) == np.arange(4)).all()


def test_minimise_follows_a_curved_valley():
    def rosenbrock(v):
        a, b = v
        slope = np.array([-2 * (1 - a) - 400 * a * (b - a * a), 200 * (b - a * a)])
        return float((1 - a) ** 2 + 100 * (b - a * a) ** 2), slope

    np.testing.assert_allclose(minimise(rosenbrock, np.array([-1.2, 1.0]), 200, 1e-8), [1, 1], atol=1e-6)


def test_features_are_what_the_head_is_given():
    model = create_model("resnet20", 3, 1)
    images = minires.randn(5, 1, 8, 8)
    x, labels = features(model, [(images[:3], minires.tensor([0, 1, 2])), (images[3:], minires.tensor([1, 0]))])
    assert x.shape == (5, 64) and labels.tolist() == [0, 1, 2, 1, 0] and model.training
    model.eval()
    np.testing.assert_allclose(x @ model.fc.weight.array.T + model.fc.bias.array, model(images).array, atol=1e-5)
    assert not model.fc._forward_pre_hooks


def test_a_run_of_a_probe(tmp_path):
    """Even the features of a network that learned nothing tell digits apart; nothing but the head changes."""
    minires.manual_seed(0)
    minires.save(create_model("resnet20", 7, 1).state_dict(), tmp_path / "w.safetensors")
    changes = {"dataset": "digits", "image_size": 8, "mean": (0.3,), "std": (0.4,), "threads": 1}
    notes = []
    path, out = str(tmp_path / "w.safetensors"), tmp_path / "run"
    summary = finetune(path, model="resnet20", probe=True, out=str(out), on_note=notes.append, **changes)
    assert summary.test_accuracy > 0.8 and summary.steps == 1
    assert any(note.startswith("features of 1,437 images in ") for note in notes)
    before, after = minires.load(tmp_path / "w.safetensors"), minires.load(out / "model.safetensors")
    assert all(before[n].array.tobytes() == after[n].array.tobytes() for n in before if not n.startswith("fc."))
    assert after["fc.weight"].shape == (10, 64)
    assert evaluate_run(out).top1 == summary.test_accuracy
    again = finetune(path, model="resnet20", probe=True, out=str(tmp_path / "again"), **changes)
    assert again.test_loss == summary.test_loss
    with pytest.raises(ValueError, match="is complete"):
        resume(out)
