"""Networks: `create_model("resnet20")`, or by function, `resnet20()`. `describe("resnet20")` lists its layers.

`create_model("resnet50", weights="resnet50-imagenet-v2")`, or weights="file.pth": trained ones (`list_weights()`).
"""

from .blocks import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck
from .cifar_resnet import (
    plain20,
    plain32,
    plain44,
    plain56,
    plain110,
    preact_resnet20,
    preact_resnet32,
    preact_resnet44,
    preact_resnet56,
    preact_resnet110,
    preact_resnet164,
    preact_resnet1001,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
    resnet1202,
)
from .imagenet_resnet import (
    plain18,
    plain34,
    preact_resnet18,
    preact_resnet34,
    preact_resnet50,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)
from .info import Info, describe
from .registry import create_model, guess_model, list_models
from .resnet import ResNet
from .weights import PublishedWeights, get_weights, list_weights

__all__ = [  # noqa: RUF022  (families in order of depth)
    "BasicBlock",
    "Bottleneck",
    "PreActBasicBlock",
    "PreActBottleneck",
    "Info",
    "PublishedWeights",
    "ResNet",
    "create_model",
    "describe",
    "get_weights",
    "guess_model",
    "list_models",
    "list_weights",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "resnet152",
    "resnet1202",
    "plain18",
    "plain20",
    "plain32",
    "plain34",
    "plain44",
    "plain56",
    "plain110",
    "preact_resnet18",
    "preact_resnet20",
    "preact_resnet32",
    "preact_resnet34",
    "preact_resnet44",
    "preact_resnet50",
    "preact_resnet56",
    "preact_resnet110",
    "preact_resnet164",
    "preact_resnet1001",
]
