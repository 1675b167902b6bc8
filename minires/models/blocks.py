"""The residual blocks. Each computes a residual F(x) with a few convolutions and adds the shortcut s(x).

    BasicBlock        y = relu(F(x) + s(x))    F = bn2 conv2 relu bn1 conv1                      3x3, 3x3
    Bottleneck        y = relu(F(x) + s(x))    F = bn3 conv3 relu bn2 conv2 relu bn1 conv1       1x1, 3x3, 1x1
    PreActBasicBlock  y = F(x) + s(x)          F = conv2 relu bn2 conv1 relu bn1
    PreActBottleneck  y = F(x) + s(x)          F = conv3 relu bn3 conv2 relu bn2 conv1 relu bn1

s(x) = x where F keeps the shape. Where it does not, option A takes every second pixel and adds channels of zeros (no
parameters), option B is a 1x1 convolution. A block whose skip was dropped has no s(x): it is plain, y = relu(F(x)).
x (N, C, H, W), y (N, channels * expansion, ceil(H / stride), ceil(W / stride)).

`self.bn1(x, relu=True)` is relu(bn1(x)), and `self.bn2(x, add=s, relu=True)` is relu(bn2(x) + s), each as one fused op.
With `one_op` all of F is, with the addition and the ReLU behind it (`ops.conv_chain`).

Source: He et al. 2015 (arXiv:1512.03385), figures 2 and 5; He et al. 2016
(arXiv:1603.05027), figure 4e, for pre-activation.
"""

from __future__ import annotations

from typing import Any, ClassVar

from .. import nn
from ..engine import Tensor
from ..nn import functional as F
from ..ops.conv_chain import conv_bn_chain


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the image's size at stride 1; no bias, because a BatchNorm follows."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


class ZeroPadShortcut(nn.Module):
    """Option A: every `stride`-th pixel, and channels of zeros, half of them before x's own and half after."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(f"shortcut='A' adds channels: it cannot make {out_channels} of {in_channels}; use 'B'")
        extra = out_channels - in_channels
        self.stride, self.before, self.after = stride, extra // 2, extra - extra // 2

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class Block(nn.Module):
    """What all blocks share: the skip connection.

    A block is made by `Block(in_channels, channels, stride, shortcut, variant, first)`. in_channels: channels of x.
    channels: the width of F. stride: of the one convolution of F that shrinks the image. shortcut: "A" or "B".
    variant: see `Bottleneck`. first: whether x comes from the stem (see `PreActBlock`).
    """

    expansion: ClassVar[int] = 1  # the block returns channels * expansion
    preact: ClassVar[bool] = False
    conv_bn: ClassVar[tuple[tuple[str, str], ...]]  # each convolution whose output goes to that BatchNorm alone
    last: ClassVar[str]  # the layer that ends F: where its weight is zero, F(x) = 0

    downsample: nn.Module | None  # s, where it is more than the identity
    skip = True
    one_op = False  # whether training runs F as one op; see ResNet.one_op_blocks

    def __init__(self, *settings: Any):  # each kind of block names its own
        super().__init__()

    def shortcut(self, x: Tensor) -> Tensor | None:
        """s(x), or None in a plain block."""
        if not self.skip:
            return None
        return x if self.downsample is None else self.downsample(x)

    def chain(self, x: Tensor) -> Tensor:
        """relu(F(x) + s(x)) as one op: what `forward` says line by line."""
        convs, norms = zip(*((getattr(self, conv), getattr(self, bn)) for conv, bn in self.conv_bn), strict=True)
        windows = [(conv.stride, conv.padding, conv.dilation, conv.groups) for conv in convs]
        weights, settings = [conv.weight for conv in convs], [bn.settings() for bn in norms]
        return conv_bn_chain(x, self.shortcut(x), weights, settings, windows)

    def drop_skip(self) -> None:
        """Make the block plain. Its `downsample` goes too, with its parameters."""
        self.skip, self.downsample = False, None

    def _downsample(self, option: str, in_channels: int, channels: int, stride: int) -> nn.Module | None:
        out_channels = channels * self.expansion
        if stride == 1 and in_channels == out_channels:
            return None
        if option == "A":
            return ZeroPadShortcut(in_channels, out_channels, stride)
        projection = nn.Sequential(conv1x1(in_channels, out_channels, stride))
        if not self.preact:
            projection.append(nn.BatchNorm2d(out_channels))
        return projection


class BasicBlock(Block):
    """Two 3x3 convolutions."""

    last = "bn2"
    conv_bn = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(self, in_channels, channels, stride=1, shortcut="B", variant="v1.5", first=False):
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = self._downsample(shortcut, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.one_op and self.training:
            return self.chain(x)
        out = self.bn1(self.conv1(x), relu=True)
        return self.bn2(self.conv2(out), add=self.shortcut(x), relu=True)


class Bottleneck(Block):
    """1x1 down to `channels`, 3x3, 1x1 up to four times as many.

    variant "v1.5" strides in the 3x3 convolution, as torchvision and most published weights do; "v1" in the first
    1x1, as in the paper, which leaves three quarters of x unread.
    """

    expansion = 4
    last = "bn3"
    conv_bn = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(self, in_channels, channels, stride=1, shortcut="B", variant="v1.5", first=False):
        super().__init__()
        stride1, stride2 = (stride, 1) if variant == "v1" else (1, stride)
        self.conv1 = conv1x1(in_channels, channels, stride1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride2)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, channels * self.expansion)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.downsample = self._downsample(shortcut, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.one_op and self.training:
            return self.chain(x)
        out = self.bn1(self.conv1(x), relu=True)
        out = self.bn2(self.conv2(out), relu=True)
        return self.bn3(self.conv3(out), add=self.shortcut(x), relu=True)


class PreActBlock(Block):
    """What the pre-activation blocks share: a = relu(bn1(x)) comes first, and nothing follows the sum.

    The first block after the stem has no bn1, because the stem has activated x already. A shortcut that changes the
    shape reads a, not x. (Both as in the paper's appendix and code.)
    """

    preact = True
    bn1: nn.BatchNorm2d | None

    def residual(self, a: Tensor) -> Tensor:
        """F, after its first activation."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        a = x if self.bn1 is None else self.bn1(x, relu=True)
        out = self.residual(a)
        shortcut = self.shortcut(x if self.downsample is None else a)
        return out if shortcut is None else out + shortcut


class PreActBasicBlock(PreActBlock):
    """Two 3x3 convolutions, each after its BatchNorm and ReLU."""

    last = "conv2"
    conv_bn = (("conv1", "bn2"),)

    def __init__(self, in_channels, channels, stride=1, shortcut="B", variant="v1.5", first=False):
        super().__init__()
        self.bn1 = None if first else nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.downsample = self._downsample(shortcut, in_channels, channels, stride)

    def residual(self, a: Tensor) -> Tensor:
        return self.conv2(self.bn2(self.conv1(a), relu=True))


class PreActBottleneck(PreActBlock):
    """1x1, 3x3, 1x1, each after its BatchNorm and ReLU; `variant` as in `Bottleneck`."""

    expansion = 4
    last = "conv3"
    conv_bn = (("conv1", "bn2"), ("conv2", "bn3"))

    def __init__(self, in_channels, channels, stride=1, shortcut="B", variant="v1.5", first=False):
        super().__init__()
        stride1, stride2 = (stride, 1) if variant == "v1" else (1, stride)
        self.bn1 = None if first else nn.BatchNorm2d(in_channels)
        self.conv1 = conv1x1(in_channels, channels, stride1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride2)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, channels * self.expansion)
        self.downsample = self._downsample(shortcut, in_channels, channels, stride)

    def residual(self, a: Tensor) -> Tensor:
        out = self.bn2(self.conv1(a), relu=True)
        return self.conv3(self.bn3(self.conv2(out), relu=True))
