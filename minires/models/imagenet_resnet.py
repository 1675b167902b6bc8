"""The networks for ImageNet: ResNet-18 to -152, the plain ones they are compared with, and their pre-activation forms.

Four layers of 64, 128, 256 and 512 channels (times 4 after a bottleneck), 224x224 images, 1000 classes, option B
shortcuts. `resnet18(stem="cifar", num_classes=10)` suits small images. Parameters and MACs (multiply-adds) are of the
whole network for one 224x224 image.

Source: He et al. 2015 (arXiv:1512.03385), table 1; He et al. 2016 (arXiv:1603.05027) for pre-activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .blocks import BasicBlock, Block, Bottleneck, PreActBasicBlock, PreActBottleneck
from .registry import register
from .resnet import ResNet

WIDTHS = (64, 128, 256, 512)


def _imagenet(
    name: str, block: type[Block], depths: tuple[int, ...], note: str, **options: Any
) -> Callable[..., ResNet]:
    return register(name, note, block, depths, WIDTHS, **options)


resnet18 = _imagenet("resnet18", BasicBlock, (2, 2, 2, 2), "ResNet-18: 11,689,512 parameters, 1.81 GMACs.")
resnet34 = _imagenet("resnet34", BasicBlock, (3, 4, 6, 3), "ResNet-34: 21,797,672 parameters, 3.66 GMACs.")
resnet50 = _imagenet("resnet50", Bottleneck, (3, 4, 6, 3), "ResNet-50: 25,557,032 parameters, 4.09 GMACs.")
resnet101 = _imagenet("resnet101", Bottleneck, (3, 4, 23, 3), "ResNet-101: 44,549,160 parameters, 7.80 GMACs.")
resnet152 = _imagenet("resnet152", Bottleneck, (3, 8, 36, 3), "ResNet-152: 60,192,808 parameters, 11.51 GMACs.")

PLAIN: Any = {"drop_skip": "all", "fixed": ("drop_skip",)}
plain18 = _imagenet("plain18", BasicBlock, (2, 2, 2, 2), "ResNet-18 without skip connections.", **PLAIN)
plain34 = _imagenet("plain34", BasicBlock, (3, 4, 6, 3), "ResNet-34 without skip connections.", **PLAIN)

preact_resnet18 = _imagenet("preact_resnet18", PreActBasicBlock, (2, 2, 2, 2), "ResNet-18 with pre-activation.")
preact_resnet34 = _imagenet("preact_resnet34", PreActBasicBlock, (3, 4, 6, 3), "ResNet-34 with pre-activation.")
preact_resnet50 = _imagenet("preact_resnet50", PreActBottleneck, (3, 4, 6, 3), "ResNet-50 with pre-activation.")
