"""A residual block with BatchNorm and a 1x1 convolution as its shortcut, in the style of many PyTorch repositories."""

import minires
import minires.nn as nn
import minires.optim as optim


class ResidualBlock(nn.Module):
    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        out = self.relu(out)
        return out


def main(images=None, weights=None, steps=3):
    """A few steps towards an average output of one half; returns what a test compares."""
    minires.manual_seed(0)
    block = ResidualBlock(3, 64)
    if weights is not None:
        block.load_state_dict({name: minires.tensor(value) for name, value in weights.items()})
    x = minires.randn(4, 3, 32, 32) if images is None else minires.tensor(images)
    criterion = nn.MSELoss()
    optimizer = optim.SGD(block.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        output = block(x)
        loss = criterion(output.mean((2, 3)), minires.zeros(4, 64) + 0.5)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: output {tuple(output.shape)}, loss {loss.item():.4f}")

    block.eval()
    with minires.no_grad():
        print("evaluated:", block(x).mean().item())
    return {
        "shape": tuple(output.shape),
        "losses": losses,
        "grads": {name: p.grad.numpy().copy() for name, p in block.named_parameters()},
        "weights": {name: value.numpy().copy() for name, value in block.state_dict().items()},
    }


if __name__ == "__main__":
    main()
