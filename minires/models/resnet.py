"""Residual networks: a stem, layers of blocks, and a head.

    x (N, C, H, W) -> stem -> layer1 -> layer2 -> ... -> average over the image -> fc -> logits (N, num_classes)

Each layer is a sequence of blocks; from layer2 on, its first block halves the image and changes the channels.
Parameters have torchvision's names (`conv1`, `bn1`, `layer1.0.conv1`, `layer2.0.downsample.0`, `fc`) in torchvision's
order, so its weights fit. The networks of the papers stand in imagenet_resnet.py and cifar_resnet.py.

Source: He et al. 2015 (arXiv:1512.03385), table 1 and section 4.2; initialisation: He et al. 2015 (arXiv:1502.01852),
eq. 14; `zero_init_residual`: Goyal et al. 2017 (arXiv:1706.02677), section 5.1.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from .. import nn
from ..engine import Tensor
from ..nn.checkpoint import checkpoint
from .blocks import Block


class Layer(nn.Sequential):
    """Blocks one after the other. segment: above 0, so many of them at a time are run by `nn.checkpoint`."""

    segment = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.segment:
            return super().forward(x)
        blocks = list(self)
        for i in range(0, len(blocks), self.segment):
            part = blocks[i : i + self.segment]
            x = checkpoint(functools.partial(_chain, part), x, modules=part)
        return x


def _chain(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


class ResNet(nn.Module):
    """A residual network: `ResNet(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512))` is ResNet-18.

    block: the class of its blocks. depths: how many blocks each layer has. widths: the width of each layer's blocks.
    stem: "imagenet", a 7x7 convolution and a max pool that shrink the image to a quarter, or "cifar", a 3x3
    convolution that keeps its size. num_classes: length of the output. in_channels: channels of the images.
    shortcut ("A" or "B") and variant ("v1.5" or "v1"): see the blocks. zero_init_residual: F(x) = 0 at the start, so
    that every block begins as its shortcut. drop_skip: names of blocks without a skip connection, or "all" for the
    plain twin; the weights are drawn first, so a twin made with the same seed has the same weights. checkpoint_blocks,
    one_op_blocks: see the attributes of these names.
    Raises ValueError naming what cannot be.
    """

    conv_bn = (("conv1", "bn1"),)  # of the stem; see nn.fuse_for_inference

    def __init__(
        self,
        block: type[Block],
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        stem: str = "imagenet",
        num_classes: int = 1000,
        in_channels: int = 3,
        shortcut: str = "B",
        variant: str = "v1.5",
        zero_init_residual: bool = False,
        drop_skip: str | Iterable[str] = (),
        checkpoint_blocks: bool | int = False,
        one_op_blocks: bool = False,
    ):
        super().__init__()
        _check_count("num_classes", num_classes)
        _check_count("in_channels", in_channels)
        _check_known("stem", stem, ("imagenet", "cifar"))
        _check_known("shortcut", shortcut, ("A", "B"))
        _check_known("variant", variant, ("v1.5", "v1"))

        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, widths[0], 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else None
        self.image_size = 224 if stem == "imagenet" else 32  # what the papers train on; any other size will do

        self.layer_names = [f"layer{i}" for i in range(1, len(depths) + 1)]
        channels = widths[0]
        for name, depth, width in zip(self.layer_names, depths, widths, strict=True):
            layer = Layer()
            for i in range(depth):
                first = name == "layer1" and i == 0
                stride = 2 if i == 0 and not first else 1
                layer.append(block(channels, width, stride, shortcut, variant, first))
                channels = width * block.expansion
            self.add_module(name, layer)

        self.bn = nn.BatchNorm2d(channels) if block.preact else None  # the activation that these blocks end without
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)

        self._initialise(zero_init_residual)
        self.drop_skip(*_names("drop_skip", drop_skip))
        self.checkpoint_blocks = checkpoint_blocks
        self.one_op_blocks = one_op_blocks

    def forward(self, x: Tensor) -> Tensor:
        """The logits (N, num_classes) of images (N, C, H, W)."""
        x = self.stem(x)
        for name in self.layer_names:
            x = getattr(self, name)(x)
        return self.head(x)

    def stem(self, x: Tensor) -> Tensor:
        """What comes before the blocks: images (N, C, H, W) to activations."""
        x = self.bn1(self.conv1(x), relu=True)  # relu(bn1(conv1(x)))
        return x if self.maxpool is None else self.maxpool(x)

    def head(self, x: Tensor) -> Tensor:
        """What comes after the blocks: activations to logits."""
        if self.bn is not None:
            x = self.bn(x, relu=True)
        return self.fc(self.flatten(self.avgpool(x)))

    def features(self, x: Tensor, at: str | Iterable[str]) -> dict[str, Tensor]:
        """The activations after the named parts: the backbone of a detection or segmentation network.

        at: one or several of "stem", "layer1", "layer2", .... They come back by name in this order, and the network
        runs no further than the last of them. ValueError names what is not there.
        """
        wanted = _names("at", at)
        known = ("stem", *self.layer_names)
        for name in wanted:
            _check_known("at", name, known)
        found: dict[str, Tensor] = {}
        for name in known:
            if not found.keys() >= set(wanted):
                found[name] = x = getattr(self, name)(x)
        return {name: found[name] for name in wanted}

    @property
    def checkpoint_blocks(self) -> int:
        """Trade time for memory: keep only the input of every block for backward, which runs the block again.

        n: of every n-th block of a layer (n blocks are then made again at a time); True: an n that needs little memory,
        the root of half the blocks of a layer (3 in ResNet-110, 10 in ResNet-1202); False or 0: keep everything.
        Gradients are the same bit for bit (`nn.checkpoint`).
        """
        return getattr(self, self.layer_names[0]).segment

    @checkpoint_blocks.setter
    def checkpoint_blocks(self, every: bool | int) -> None:
        if not isinstance(every, int) or every < 0:
            raise ValueError(f"checkpoint_blocks={every!r} must be True, False or a number of blocks")
        for name in self.layer_names:
            layer = getattr(self, name)
            layer.segment = round((len(layer) / 2) ** 0.5) if every is True else int(every)

    @property
    def one_op_blocks(self) -> bool:
        """Whether training runs the convolutions of a block with their BatchNorms and ReLUs as one op.

        On a GPU in 16 bits that moves less memory. The same up to rounding; hooks see the block, not what is in it.
        Pre-activation blocks stay as they are.
        """
        return any(block.one_op for block in self.blocks().values())

    @one_op_blocks.setter
    def one_op_blocks(self, whether: bool) -> None:
        for block in self.blocks().values():
            block.one_op = bool(whether) and not block.preact

    def blocks(self) -> dict[str, Block]:
        """Every block by its name ("layer1.0", ...), from input to output."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Block)}

    def drop_skip(self, *names: str) -> None:
        """Make the named blocks ("layer1.0", ...) plain, or "all" of them. ValueError names one that is not there."""
        blocks = self.blocks()
        for name in names:
            _check_known("drop_skip", name, ("all", *blocks))
        for name in blocks if "all" in names else names:
            blocks[name].drop_skip()

    def _initialise(self, zero_init_residual: bool) -> None:
        """Normal weights of variance 2 / fan_out: a gradient keeps its size on its way through convolution and ReLU."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for block in self.blocks().values():
                nn.init.zeros_(getattr(block, block.last).weight)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be an int of at least 1")


def _check_known(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")


def _names(name: str, value: Any) -> list[str]:
    """A name or several as a list."""
    if not isinstance(value, Iterable):
        raise ValueError(f"{name}={value!r} must be a name or several")
    return [value] if isinstance(value, str) else list(value)
