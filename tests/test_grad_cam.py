"""Grad-CAM against its definition, by other means than its own: `capture` with the whole backward."""

import numpy as np
import pytest

import minires
from minires.capture import capture
from minires.engine import Tensor
from minires.grad_cam import grad_cam
from minires.models import create_model


@pytest.fixture(scope="module")
def model():
    minires.manual_seed(0)
    model = create_model("resnet20", 5)
    model(minires.randn(8, 3, 16, 16))  # running statistics that are not those of a new network
    return model.eval()


def by_definition(model, images, classes, layer):
    """One image at a time, so that none can mix with another."""
    maps = []
    for image, c in zip(images.array, classes, strict=True):
        with capture(model, layer, grads=True) as seen:
            model(Tensor(image[None]))[0, int(c)].backward()
        a, slope = seen[layer].output.array[0], seen[layer].grad.array[0]
        weights = slope.mean((1, 2))
        heat = np.maximum((weights[:, None, None] * a).sum(0), 0)
        maps.append(heat / heat.max() if heat.max() > 0 else heat)
    return np.stack(maps)


@pytest.mark.parametrize("layer", ["layer3", "layer2", "layer1.1.conv2"])
def test_definition(model, layer):
    images, classes = minires.randn(4, 3, 20, 12), [3, 0, 0, 4]
    found = grad_cam(model, images, classes, "" if layer == "layer3" else layer)
    wanted = by_definition(model, images, classes, layer)
    assert found.shape == wanted.shape and found.shape[1:] == {"layer3": (5, 3), "layer2": (10, 6)}.get(layer, (20, 12))
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert found.min() >= 0 and (found.max((1, 2)) <= 1).all()


def test_the_largest_logit_by_default(model):
    images = minires.randn(3, 3, 16, 16)
    chosen = model(images).array.argmax(1)
    np.testing.assert_array_equal(grad_cam(model, images), grad_cam(model, images, chosen))


def test_nothing_that_speaks_for_the_class_is_a_map_of_zeros():
    model = create_model("resnet20", 2)
    model.fc.load_state_dict({"weight": np.stack([np.full(64, -1), np.full(64, 1)]).astype(np.float32), "bias": [0, 0]})
    images = minires.randn(2, 3, 8, 8)
    assert (grad_cam(model, images, [0, 0]) == 0).all() and (grad_cam(model, images, [1, 1]).max((1, 2)) == 1).all()


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.zero_grad()
    model.conv1.weight.requires_grad_(False)
    try:
        before = {name: t.array.copy() for name, t in model.state_dict().items()}
        grad_cam(model, minires.randn(2, 3, 16, 16))
        assert model.training and model.layer1[0].bn1.training
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
        assert all(p.grad is None for p in model.parameters())
        assert all((before[n] == t.array).all() for n, t in model.state_dict().items())
    finally:
        model.conv1.weight.requires_grad_(True)
        model.eval()


@pytest.mark.parametrize("classes", [[0], [0, 5], [0, -1], [[0, 1]]])
def test_classes_that_do_not_fit(model, classes):
    with pytest.raises(ValueError, match="must be 2 numbers from 0 to 4"):
        grad_cam(model, minires.randn(2, 3, 16, 16), classes)


def test_a_layer_that_is_not_there(model):
    with pytest.raises(KeyError, match=r"layer33.*near: .*layer3"):
        grad_cam(model, minires.randn(1, 3, 16, 16), layer="layer33")
