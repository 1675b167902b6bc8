"""The networks for CIFAR-10: ResNet-20 to -1202, their plain twins, and the pre-activation networks.

A 3x3 stem and three layers of n blocks with 16, 32 and 64 channels: 6n + 2 layers with weights, 9n + 2 where blocks are
bottlenecks. 32x32 images, 10 classes, option A shortcuts (`shortcut="B"` for 1x1 convolutions). A plain twin is the
same network without its skip connections; option A has no parameters, so it has just as many.

Error rates on CIFAR-10 are the papers'. Source: He et al. 2015 (arXiv:1512.03385), section 4.2 and table 6; He et al.
2016 (arXiv:1603.05027), tables 2 and 4, for pre-activation (with `shortcut="B"` for bottlenecks).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .blocks import BasicBlock, Block, PreActBasicBlock, PreActBottleneck
from .registry import register
from .resnet import ResNet

WIDTHS = (16, 32, 64)


def _cifar(
    name: str, block: type[Block], n: int, note: str, shortcut: str = "A", **options: Any
) -> Callable[..., ResNet]:
    return register(name, note, block, (n, n, n), WIDTHS, stem="cifar", num_classes=10, shortcut=shortcut, **options)


resnet20 = _cifar("resnet20", BasicBlock, 3, "ResNet-20: 269,722 parameters, 8.75 % error.")
resnet32 = _cifar("resnet32", BasicBlock, 5, "ResNet-32: 464,154 parameters, 7.51 % error.")
resnet44 = _cifar("resnet44", BasicBlock, 7, "ResNet-44: 658,586 parameters, 7.17 % error.")
resnet56 = _cifar("resnet56", BasicBlock, 9, "ResNet-56: 853,018 parameters, 6.97 % error.")
resnet110 = _cifar("resnet110", BasicBlock, 18, "ResNet-110: 1,727,962 parameters, 6.43 % error.")
resnet1202 = _cifar("resnet1202", BasicBlock, 200, "ResNet-1202: 19,421,274 parameters, 7.93 % error.")

PLAIN: Any = {"drop_skip": "all", "fixed": ("drop_skip",)}
plain20 = _cifar("plain20", BasicBlock, 3, "ResNet-20 without skip connections.", **PLAIN)
plain32 = _cifar("plain32", BasicBlock, 5, "ResNet-32 without skip connections.", **PLAIN)
plain44 = _cifar("plain44", BasicBlock, 7, "ResNet-44 without skip connections.", **PLAIN)
plain56 = _cifar("plain56", BasicBlock, 9, "ResNet-56 without skip connections.", **PLAIN)
plain110 = _cifar("plain110", BasicBlock, 18, "ResNet-110 without skip connections.", **PLAIN)

preact_resnet20 = _cifar("preact_resnet20", PreActBasicBlock, 3, "ResNet-20 with pre-activation.")
preact_resnet32 = _cifar("preact_resnet32", PreActBasicBlock, 5, "ResNet-32 with pre-activation.")
preact_resnet44 = _cifar("preact_resnet44", PreActBasicBlock, 7, "ResNet-44 with pre-activation.")
preact_resnet56 = _cifar("preact_resnet56", PreActBasicBlock, 9, "ResNet-56 with pre-activation.")
preact_resnet110 = _cifar("preact_resnet110", PreActBasicBlock, 18, "ResNet-110 with pre-activation: 6.37 % error.")
preact_resnet164 = _cifar("preact_resnet164", PreActBottleneck, 18, "164 layers, bottlenecks: 5.46 % error.", "B")
preact_resnet1001 = _cifar("preact_resnet1001", PreActBottleneck, 111, "1001 layers, bottlenecks: 4.92 % error.", "B")
