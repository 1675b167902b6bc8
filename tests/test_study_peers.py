"""`gradients` and `branches` beside PyTorch: the same weights, hooks on the twin's blocks, float32 within 1e-4."""

import numpy as np
import pytest
from test_models_peers import TorchBlock, TorchResNet

import minires
from minires import models
from minires.study.branches import shares
from minires.study.gradients import profile

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peers

TOLERANCE = 1e-4  # relative


def pair(name):
    """Our network and PyTorch's with our weights, a batch of images, and the labels."""
    minires.manual_seed(0)
    ours = models.create_model(name, num_classes=10)
    theirs = TorchResNet((3, 3), (3, 3, 3), (16, 32, 64), "A", 10, False, name.startswith("preact"))
    theirs.load_state_dict({key: torch.from_numpy(np.array(t.array)) for key, t in ours.state_dict().items()})
    rng = np.random.default_rng(1)
    return ours, theirs, rng.standard_normal((16, 3, 16, 16)).astype(np.float32), rng.integers(0, 10, 16)


def backward(theirs, images, labels):
    loss = torch.nn.functional.cross_entropy(theirs(torch.from_numpy(images)), torch.from_numpy(labels))
    loss.backward()
    return loss.item()


def blocks_of(theirs):
    return {name: m for name, m in theirs.named_modules() if isinstance(m, TorchBlock)}


@pytest.mark.parametrize("name", ["resnet20", "plain20", "preact_resnet20"])
def test_gradients_are_torchs(name, monkeypatch):
    ours, theirs, images, labels = pair(name)
    if name == "plain20":
        monkeypatch.setattr(TorchBlock, "forward", _plain)
    outputs = {}

    def keep(block, args, output):
        output.retain_grad()
        outputs[block] = output

    for block in blocks_of(theirs).values():
        block.register_forward_hook(keep)
    with minires.exact():  # a ReLU input almost 0, rounded otherwise, would change the gradient of so small a batch
        found = profile(ours, images, labels, name)
    loss = backward(theirs, images, labels)
    assert found.loss == pytest.approx(loss, rel=TOLERANCE)
    expected = [outputs[b].grad.norm().item() for b in blocks_of(theirs).values()]
    np.testing.assert_allclose(found.gradient, expected, rtol=TOLERANCE)
    rms = [outputs[b].square().mean().sqrt().item() for b in blocks_of(theirs).values()]
    np.testing.assert_allclose(found.activation, rms, rtol=TOLERANCE)
    weights = [b.conv1.weight for b in blocks_of(theirs).values()]
    np.testing.assert_allclose(found.relative, [(w.grad.norm() / w.norm()).item() for w in weights], rtol=TOLERANCE)


def _plain(block, x):
    out = torch.relu(block.bn1(block.conv1(x)))
    return torch.relu(block.bn2(block.conv2(out)))


@pytest.mark.parametrize("name", ["resnet20", "preact_resnet20"])
def test_branches_are_torchs(name, monkeypatch):
    """The twin's blocks hand their input to the branch and to the skip as two tensors, each with its own gradient."""
    ours, theirs, images, labels = pair(name)
    uses = {}

    def fork(block, x):
        uses[block] = skip, into = x * 1, x * 1
        skip.retain_grad()
        into.retain_grad()
        return skip, into

    def residual(block, x):
        skip, into = fork(block, x)
        out = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(into)))))
        return torch.relu(out + (skip if block.downsample is None else block.downsample(skip)))

    def preact(block, x):
        if block.downsample is None and not block.first:
            skip, a = fork(block, x)
            a = torch.relu(block.bn1(a))
        else:
            skip, a = fork(block, x if block.first else torch.relu(block.bn1(x)))
        out = block.conv2(torch.relu(block.bn2(block.conv1(a))))
        return out + (skip if block.downsample is None else block.downsample(skip))

    monkeypatch.setattr(TorchBlock, "forward", preact if name.startswith("preact") else residual)
    found = shares(ours, images, labels)
    backward(theirs, images, labels)
    assert found.blocks == list(blocks_of(theirs))
    for i, block in enumerate(blocks_of(theirs).values()):
        identity, branch = (use.grad.double() for use in uses[block])
        g = identity + branch
        expected = {
            "identity": identity.norm(),
            "branch": branch.norm(),
            "identity_share": (identity * g).sum() / (g * g).sum(),
            "branch_share": (branch * g).sum() / (g * g).sum(),
        }
        for key, value in expected.items():
            assert getattr(found, key)[i] == pytest.approx(value.item(), rel=TOLERANCE), (found.blocks[i], key)
        cosine = (identity * branch).sum() / identity.norm() / branch.norm()
        assert found.cosine[i] == pytest.approx(cosine.item(), abs=TOLERANCE)
