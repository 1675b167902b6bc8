"""ResNet-18, -50 and the CIFAR ResNets in PyTorch, with torchvision's parameter names and minires' architecture.

Source: He et al. 2015 (arXiv:1512.03385), table 1 and section 4.2; bottlenecks stride in their 3x3 ("v1.5").
"""

from __future__ import annotations

from typing import Any

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_BOTTLENECK = 50  # from this depth on


def resnet(torch: Any, name: str) -> Any:
    """The network that minires calls `name` ("resnet18", "resnet20", ...). ValueError for one that is not there."""
    depth = int(name.removeprefix("resnet")) if name.removeprefix("resnet").isdigit() else 0
    if depth in DEPTHS:
        return _network(torch, DEPTHS[depth], (64, 128, 256, 512), 4 if depth >= _BOTTLENECK else 1, 1000, False)
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(
            f"{name!r} is not here in PyTorch: there are resnet{sorted(DEPTHS)} and resnet20, resnet32, ..."
        )
    return _network(torch, ((depth - 2) // 6,) * 3, (16, 32, 64), 1, 10, True)


def _network(
    torch: Any, depths: tuple[int, ...], widths: tuple[int, ...], expansion: int, classes: int, cifar: bool
) -> Any:
    nn, functional = torch.nn, torch.nn.functional

    def conv(c: int, k: int, taps: int, stride: int = 1) -> Any:
        return nn.Conv2d(c, k, taps, stride, taps // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, c: int, width: int, stride: int):
            super().__init__()
            k = width * expansion
            sizes = [(c, width, 1, 1), (width, width, 3, stride), (width, k, 1, 1)]  # Bottleneck
            if expansion == 1:
                sizes = [(c, width, 3, stride), (width, k, 3, 1)]
            for i, size in enumerate(sizes, 1):
                setattr(self, f"conv{i}", conv(*size))
                setattr(self, f"bn{i}", nn.BatchNorm2d(size[1]))
            self.convolutions, self.stride, self.more = len(sizes), stride, k - c
            self.downsample = None
            if not cifar and (stride > 1 or k != c):
                self.downsample = nn.Sequential(conv(c, k, 1, stride), nn.BatchNorm2d(k))

        def forward(self, x: Any) -> Any:
            out = x
            for i in range(1, self.convolutions + 1):
                out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
                if i < self.convolutions:
                    out = functional.relu(out)
            if self.downsample is not None:
                x = self.downsample(x)
            elif self.more:  # option A
                x = functional.pad(
                    x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2)
                )
            return functional.relu(out + x)

    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            c = widths[0]
            self.conv1 = nn.Conv2d(3, c, 3, 1, 1, bias=False) if cifar else nn.Conv2d(3, c, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(c)
            for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
                blocks = []
                for i in range(depth):
                    blocks.append(Block(c, width, 2 if i == 0 and stage > 1 else 1))
                    c = width * expansion
                setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            self.fc = nn.Linear(c, classes)

        def forward(self, x: Any) -> Any:
            x = functional.relu(self.bn1(self.conv1(x)))
            if not cifar:
                x = functional.max_pool2d(x, 3, 2, 1)
            for stage in range(1, len(depths) + 1):
                x = getattr(self, f"layer{stage}")(x)
            return self.fc(x.mean((2, 3)))

    return ResNet()
