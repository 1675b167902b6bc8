"""The networks of the benchmarks, and what their layers are: read from the models themselves."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from minires.kernels import registry  # pyright: ignore[reportMissingImports]
from minires.kernels.registry import BENCH, Case  # pyright: ignore[reportMissingImports]

import minires

from .peaks import Peaks

NETWORKS = {"resnet20": (128, 32), "resnet18": (16, 224), "resnet50": (8, 224)}  # images, their side
DIRECTIONS = ("fprop", "dgrad", "wgrad")


@dataclass(frozen=True)
class Layer:
    """A convolution of a network. count: how often it is there. first: it sees the images, which need no gradient."""

    network: str
    case: Case
    count: int
    first: bool

    @property
    def plain_3x3(self) -> bool:
        """Whether it is 3x3 at stride 1, the layers that the summary over ResNet-18 and -50 is taken of."""
        return self.case.params["rs"] == (3, 3) and self.case.params["stride"] == (1, 1)


@functools.cache
def layers(network: str, batch: int = 0, size: int = 0) -> tuple[Layer, ...]:
    """The distinct convolutions of a network in their order. batch, size: 0 means those of `NETWORKS`."""
    usual_batch, usual_size = NETWORKS.get(network, (1, 0))
    batch, size = batch or usual_batch, size or usual_size
    model = minires.models.create_model(network).eval()
    size = size or model.image_size
    seen: dict[str, tuple[Case, int]] = {}

    def note(module: Any, inputs: Any, output: Any) -> None:
        (_, c, *hw), (k, _, *rs) = inputs[0].shape, module.weight.shape
        name = f"{network}_{rs[0]}x{rs[1]}_{c}to{k}_{hw[0]}" + (f"_s{module.stride[0]}" if module.stride[0] > 1 else "")
        params = dict(n=batch, c=c, hw=tuple(hw), k=k, rs=tuple(rs), stride=module.stride, padding=module.padding)
        params |= dict(dilation=module.dilation, groups=module.groups)
        seen[name] = Case(name, params, BENCH), seen.get(name, (None, 0))[1] + 1

    for module in model.modules():
        if isinstance(module, minires.nn.Conv2d):
            module.register_forward_hook(note)
    with minires.no_grad():
        model(minires.zeros(1, 3, size, size))
    return tuple(Layer(network, case, count, i == 0) for i, (case, count) in enumerate(seen.values()))


def floor_seconds(network: str, batch: int, size: int, peaks: Peaks, training: bool, dtype: str = "float32") -> float:
    """The least time of the network's convolutions, each direction by itself: its multiply-adds at the peak of FMA, or
    its inputs and outputs moved once at the speed of a copy. All else could happen on the way and counts nothing.
    (A Winograd kernel multiplies less and may fall below it.)
    """
    total = 0.0
    for layer in layers(network, batch, size):
        for direction in DIRECTIONS if training else DIRECTIONS[:1]:
            if not (layer.first and direction == "dgrad"):
                flops, moved = work(f"conv2d_{direction}", layer.case, dtype)
                total += layer.count * peaks.floor(flops, moved, dtype == "bfloat16")
    return total


@dataclass(frozen=True)
class _Shape:
    """As much of an array as a problem's flops and bytes look at."""

    shape: tuple[int, ...]
    dtype: Any


def work(problem: str, case: Case, dtype: str = "float32") -> tuple[int, int]:
    """(flops, bytes) of a convolution's direction, in float32 or bfloat16."""
    import ml_dtypes
    import numpy as np
    from minires.kernels.conv2d.problem import out_hw  # pyright: ignore[reportMissingImports]

    p, number = case.params, np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    geometry = {name: p[name] for name in ("stride", "padding", "dilation")}
    y = _Shape((p["n"], p["k"], *out_hw(p["hw"], p["rs"], *geometry.values())), number)
    x, w = _Shape((p["n"], p["c"], *p["hw"]), number), _Shape((p["k"], p["c"] // p["groups"], *p["rs"]), number)
    arrays = {"conv2d_fprop": (x, w), "conv2d_dgrad": (y, w), "conv2d_wgrad": (x, y)}[problem]
    extra = {"conv2d_dgrad": {"input_hw": p["hw"]}, "conv2d_wgrad": {"kernel_hw": p["rs"]}}.get(problem, {})
    params = {**geometry, "groups": p["groups"], **extra}
    entry = registry.problem(problem)
    return entry.flops(*arrays, **params), entry.bytes_moved(*arrays, **params)


def geometric_mean(numbers: list[float]) -> float:
    """The number whose logarithm is the mean of their logarithms."""
    return math.exp(sum(map(math.log, numbers)) / len(numbers))
