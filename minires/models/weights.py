"""Published weights by name, and what must be known to use them.

    minires.models.list_weights("resnet50*")
    weights = minires.models.get_weights("resnet50-imagenet-v2")
    model = minires.models.create_model("resnet50", weights=weights.name)        fetched once, with pooch
    model = minires.models.create_model("resnet50", weights="resnet50-11ad3fa6.pth")      from a file

Accuracies are those that the publishers give, in percent: for ImageNet on its 50,000 validation images, one crop; for
CIFAR on the 10,000 test images. Files are checked against their SHA-256, or, where only its beginning is known, against
that: PyTorch names files after the first eight digits (`torch.hub.load_state_dict_from_url`, check_hash). The digits
of "-cifar10" weights 44 to 1202 and of the "-b" ones stand in the files' names but were not verified.

Sources: torchvision's `ResNet50_Weights` and its like; github.com/akamaster/pytorch_resnet_cifar10;
github.com/chenyaofo/pytorch-cifar-models (its normalisation: issues 4 and 8).
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.cache import cache_folder
from ..data.download import download
from ..engine import Tensor
from ..interop.weights import PUBLISHED

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_TORCHVISION = "https://download.pytorch.org/models/"
_AKAMASTER = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"
_CHENYAOFO = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download/resnet/"
_IMAGENET_SCALE = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_CIFAR_SCALES: dict[int, Any] = {
    10: {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)},
    100: {"mean": (0.5070, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2761)},
}


@dataclass(frozen=True)
class PublishedWeights:
    """Weights that somebody trained.

    name: here; model, options: what `create_model` makes the network with; url; sha256: all of its digits or the first
    eight. dataset, num_classes: what they were trained on; classes: their names, where there are few. mean, std: images
    are RGB in [0, 1], minus mean, over std. resize: the length that the shorter side is resized to first (bilinear,
    antialiased), None for no resizing; image_size: the side of the square that is then cut out of the middle, in
    pixels. top1, top5: accuracy in percent, top5 None where it is not given. licence: of the repository.
    """

    name: str
    model: str
    url: str
    sha256: str
    dataset: str
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: int | None
    image_size: int
    top1: float
    top5: float | None
    licence: str
    classes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def filename(self) -> str:
        """The name of the file, the last part of its address."""
        return self.url.rpartition("/")[2]

    def fetch(self, folder: str | Path | None = None) -> Path:
        """The file in `folder` (by default "weights" in minires's cache), downloaded unless it is there already.

        Raises as `minires.data.download.download` does: RuntimeError without pooch, OSError without a network,
        ValueError where the file has another hash.
        """
        return download(self.url, self.sha256, Path(folder or cache_folder("weights")) / self.filename)


_WEIGHTS: dict[str, PublishedWeights] = {}


def list_weights(pattern: str = "*") -> list[str]:
    """The names of all published weights, or of those that match a shell pattern such as "resnet50*"."""
    return [name for name in _WEIGHTS if fnmatch.fnmatchcase(name, pattern)]


def get_weights(name: str) -> PublishedWeights:
    """What is known of published weights. ValueError for another name says which there are."""
    if name not in _WEIGHTS:
        near = difflib.get_close_matches(name, _WEIGHTS)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ValueError(f"no published weights are named {name!r}{hint}; there are {', '.join(_WEIGHTS)}")
    return _WEIGHTS[name]


def options_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """How `create_model` makes a network that a state dict under our names fits: num_classes, in_channels, stem and
    shortcut, as far as its shapes tell. What only the arithmetic knows (variant) they do not."""
    found: dict[str, Any] = {}
    if "fc.weight" in state and len(state["fc.weight"].shape) == 2:
        found["num_classes"] = state["fc.weight"].shape[0]
    if "conv1.weight" in state and len(shape := state["conv1.weight"].shape) == 4:
        found["in_channels"] = shape[1]
        found["stem"] = "imagenet" if shape[2] == 7 else "cifar"
        found["shortcut"] = "B" if any(".downsample." in name for name in state) else "A"
    return found


def _add(name: str, model: str, url: str, sha256: str, **facts: Any) -> None:
    _WEIGHTS[name] = PublishedWeights(name, model, url, sha256, **facts)


def _imagenet(model: str, version: int, digits: str, top1: float, top5: float) -> None:
    _add(
        f"{model}-imagenet-v{version}", model, f"{_TORCHVISION}{model}-{digits}.pth", digits, **_IMAGENET_SCALE,
        dataset="ImageNet-1K", num_classes=1000, resize=256 if version == 1 else 232, image_size=224,
        top1=top1, top5=top5, licence="BSD-3-Clause",
    )  # fmt: skip


def _cifar10(model: str, sha256: str, error: float) -> None:
    """Option A, trained with ImageNet's mean and std."""
    _add(
        f"{model}-cifar10", model, f"{_AKAMASTER}{model}-{sha256[:8]}.th", sha256, **_IMAGENET_SCALE,
        dataset="CIFAR-10", num_classes=10, classes=CIFAR10_CLASSES, resize=None, image_size=32,
        top1=round(100 - error, 2), top5=None, licence="BSD-2-Clause",
    )  # fmt: skip


def _cifar_b(model: str, classes: int, digits: str, top1: float, top5: float) -> None:
    """Option B: a projection where the shape changes."""
    _add(
        f"{model}-cifar{classes}-b", model, f"{_CHENYAOFO}cifar{classes}_{model}-{digits}.pt", digits,
        **_CIFAR_SCALES[classes], dataset=f"CIFAR-{classes}", num_classes=classes, resize=None, image_size=32,
        classes=CIFAR10_CLASSES if classes == 10 else (), top1=top1, top5=top5, licence="BSD-3-Clause",
        options={"shortcut": "B"},
    )  # fmt: skip


_imagenet("resnet18", 1, "f37072fd", 69.758, 89.078)
_imagenet("resnet34", 1, "b627a593", 73.314, 91.420)
_imagenet("resnet50", 1, "0676ba61", 76.130, 92.862)
_imagenet("resnet50", 2, "11ad3fa6", 80.858, 95.434)
_imagenet("resnet101", 1, "63fe2227", 77.374, 93.546)
_imagenet("resnet101", 2, "cd907fc2", 81.886, 95.780)
_imagenet("resnet152", 1, "394f9c45", 78.312, 94.046)
_imagenet("resnet152", 2, "f82ba261", 82.284, 96.002)

_cifar10("resnet20", "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8", 8.27)
_cifar10("resnet32", "d509ac1820d7f25398913559d7e81a13229b1e7adc5648e3bfa5e22dc137f850", 7.37)
_cifar10("resnet44", "014dd654", 6.90)
_cifar10("resnet56", "4bfd9763", 6.61)
_cifar10("resnet110", "1d1ed7c2", 6.32)
_cifar10("resnet1202", "f3b1deed", 6.18)

_cifar_b("resnet20", 10, "4118986f", 92.60, 99.81)
_cifar_b("resnet32", 10, "ef93fc4d", 93.53, 99.77)
_cifar_b("resnet44", 10, "2a3cabcb", 94.01, 99.77)
_cifar_b("resnet56", 10, "187c023a", 94.37, 99.83)
_cifar_b("resnet20", 100, "23dac2f1", 68.83, 91.01)
_cifar_b("resnet32", 100, "84213ce6", 70.16, 90.89)
_cifar_b("resnet44", 100, "ffe32858", 71.63, 91.58)
_cifar_b("resnet56", 100, "f2eff4c8", 72.63, 91.94)

PUBLISHED.update({name: weights.fetch for name, weights in _WEIGHTS.items()})
