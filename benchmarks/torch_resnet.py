"""The CIFAR ResNet of He et al. 2015 (section 4.2, option A) in PyTorch, with torchvision's parameter names."""

from __future__ import annotations

from typing import Any


def cifar_resnet(torch: Any, depth: int) -> Any:
    """A network of `depth` = 6n + 2 layers for 10 classes. ValueError for another depth."""
    nn, functional = torch.nn, torch.nn.functional
    if (depth - 2) % 6:
        raise ValueError(f"resnet{depth}: a CIFAR ResNet has 6n + 2 layers")

    class Block(nn.Module):
        def __init__(self, c: int, k: int, stride: int):
            super().__init__()
            self.conv1 = nn.Conv2d(c, k, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(k)
            self.conv2 = nn.Conv2d(k, k, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(k)
            self.stride, self.more = stride, k - c

        def forward(self, x: Any) -> Any:
            out = functional.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            if self.more:
                x = functional.pad(
                    x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2)
                )
            return functional.relu(out + x)

    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
            c = 16
            for stage, k in enumerate((16, 32, 64), 1):
                blocks = []
                for i in range((depth - 2) // 6):
                    blocks.append(Block(c, k, 2 if k > c and i == 0 else 1))
                    c = k
                setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            self.fc = nn.Linear(64, 10)

        def forward(self, x: Any) -> Any:
            x = functional.relu(self.bn1(self.conv1(x)))
            x = self.layer3(self.layer2(self.layer1(x)))
            return self.fc(x.mean((2, 3)))

    return ResNet()
