"""A residual block of two biased convolutions on one grey image, in the style of a first PyTorch tutorial."""

# ruff: noqa: UP008  (as older scripts write it)

import minires
import minires.nn as nn
import minires.nn.functional as F
import minires.optim as optim


class IdentityBlock(nn.Module):
    def __init__(self, in_channels, channels):
        super(IdentityBlock, self).__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x):
        out = self.relu(self.conv1(x))
        out = self.conv2(out)
        out = out + x  # one channel is added to every one of the 64
        return F.relu(out)


def main(image=None, weights=None, steps=3):
    """Train the block to give back a constant; returns the shape of its output, the losses and the last gradients."""
    minires.manual_seed(0)
    block = IdentityBlock(1, 64)
    if weights is not None:
        block.load_state_dict({name: minires.tensor(value) for name, value in weights.items()})
    x = minires.randn(1, 1, 28, 28) if image is None else minires.tensor(image)
    optimizer = optim.SGD(block.parameters(), lr=0.01)

    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        output = block(x)
        loss = ((output - 1.0) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: output {tuple(output.shape)}, loss {loss.item():.4f}")
    return {
        "shape": tuple(output.shape),
        "losses": losses,
        "grads": {name: p.grad.numpy().copy() for name, p in block.named_parameters()},
        "weights": {name: value.numpy().copy() for name, value in block.state_dict().items()},
    }


if __name__ == "__main__":
    main()
