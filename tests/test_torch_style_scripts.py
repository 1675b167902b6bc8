"""Scripts written as for PyTorch run after changing the names of the modules that they import, and nothing else.

They stand in tests/scripts. Two of them run under PyTorch too, from the same text with the names changed back.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minires.models import resnet18

SCRIPTS = Path(__file__).parent / "scripts"


def load(name, library="minires"):
    """The script's namespace, with `minires` in its text replaced by `library`."""
    text = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8").replace("minires", library)
    namespace = {"__name__": name}
    exec(compile(text, f"{name} ({library})", "exec"), namespace)
    return namespace


def test_identity_block():
    found = load("identity_block")["main"]()
    assert found["shape"] == (1, 64, 28, 28)
    assert found["losses"][-1] < found["losses"][0]
    assert {name: grad.shape for name, grad in found["grads"].items()} == {
        "conv1.weight": (64, 1, 3, 3),
        "conv1.bias": (64,),
        "conv2.weight": (64, 64, 3, 3),
        "conv2.bias": (64,),
    }
    assert all(np.abs(grad).max() > 0 for grad in found["grads"].values())


def test_projection_block():
    found = load("projection_block")["main"]()
    assert found["shape"] == (4, 64, 32, 32)
    assert found["losses"][-1] < found["losses"][0]
    assert "shortcut.1.running_var" in found["weights"] and found["weights"]["bn1.num_batches_tracked"] == 3
    assert all(np.abs(grad).max() > 0 for grad in found["grads"].values())


def write_images(folder, per_class, seed):
    """Two classes that differ in where the light is, 40x40 pixels."""
    rng = np.random.default_rng(seed)
    for name, rows in (("above", slice(0, 20)), ("below", slice(20, 40))):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 60, (40, 40, 3))
            pixels[rows] += 180
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


def test_image_folder_program(tmp_path):
    write_images(tmp_path / "train", 12, seed=0)
    write_images(tmp_path / "test", 5, seed=1)
    found = load("image_folder_resnet")["main"](tmp_path, num_epochs=3)
    assert found["classes"] == ["above", "below"]
    assert found["total"] == 10 and found["correct"] >= 9
    assert found["history"][-1] < found["history"][0]
    assert found["lr"] == pytest.approx(0.01 * 0.1)  # StepLR has taken one step down
    ours = resnet18(num_classes=2)
    theirs = {name: tuple(value.shape) for name, value in found["model"].state_dict().items()}
    assert theirs == {name: value.shape for name, value in ours.state_dict().items()}
    ours.load_state_dict(found["model"].state_dict())


@pytest.mark.peers
@pytest.mark.parametrize("name, shape", [("identity_block", (1, 1, 28, 28)), ("projection_block", (4, 3, 32, 32))])
def test_the_same_text_under_torch_gives_the_same_numbers(name, shape):
    pytest.importorskip("torch")
    images = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    start = load(name)["main"](steps=1)["weights"]
    ours = load(name)["main"](images, start, steps=4)
    theirs = load(name, "torch")["main"](images, start, steps=4)
    assert ours["shape"] == theirs["shape"]
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-5)
    for kind in ("grads", "weights"):
        assert list(ours[kind]) == list(theirs[kind])
        for key, value in theirs[kind].items():
            np.testing.assert_allclose(
                ours[kind][key], value, rtol=0, atol=1e-4 * max(1e-3, np.abs(value).max()), err_msg=key
            )
