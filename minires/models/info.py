"""What a network costs, layer by layer: parameters, multiply-adds, and the memory that backward needs.

The network runs forward once on zeros while a hook watches every op. A multiply-add (MAC) is one product and its sum
in a convolution or a matrix product, as the papers count: 1.81 G for ResNet-18 at 224x224, 40.6 M for ResNet-20 at
32x32. Saved bytes are the arrays that the graph keeps for backward, apart from the parameters; an array that
several ops keep (a BatchNorm's output is the next convolution's input) counts once, where it was kept first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import nn
from ..device import namespace_of
from ..engine import Node, Tensor, set_grad_enabled
from ..hooks import Hook
from .registry import create_model
from .resnet import ResNet


@dataclass
class Row:
    """One layer: its name and class, the shape of its output, its parameters, multiply-adds and saved bytes."""

    name: str
    type: str
    output_shape: tuple[int, ...] = ()
    parameters: int = 0
    macs: int = 0
    saved_bytes: int = 0


@dataclass
class Info:
    """The rows in the order in which the layers ran, and their sums. `str()` of it is a table."""

    name: str
    input_shape: tuple[int, ...]
    rows: list[Row] = field(default_factory=list)

    parameters = property(lambda self: sum(row.parameters for row in self.rows))
    macs = property(lambda self: sum(row.macs for row in self.rows))
    saved_bytes = property(lambda self: sum(row.saved_bytes for row in self.rows))

    def table(self) -> list[tuple[str, ...]]:
        """Header, rows and totals as text."""
        cells = [("layer", "type", "output", "parameters", "MACs", "saved bytes")]
        for row in [*self.rows, Row("total", "", (), self.parameters, self.macs, self.saved_bytes)]:
            numbers = (f"{row.parameters:,}", f"{row.macs:,}", f"{row.saved_bytes:,}")
            cells.append((row.name, row.type, " × ".join(map(str, row.output_shape)), *numbers))
        return cells

    def __str__(self) -> str:
        cells = self.table()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [f"{self.name}, input {' × '.join(map(str, self.input_shape))}"]
        for row in cells:
            text = [c.rjust(w) if i > 2 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("  ".join(text).rstrip())
        return "\n".join(lines)


def describe(
    model: str | nn.Module,
    image_size: int | Sequence[int] | None = None,
    batch: int = 1,
    input_shape: Sequence[int] | None = None,
    **options: Any,
) -> Info:
    """What a network costs in a training step, forward.

    model: a name for `create_model` (which takes the options), or a module, of which a copy is run. image_size: the
    images' side in pixels or (height, width); None means as in the paper. batch: images at once. input_shape: instead
    of both, the whole shape of the input; a module that is no `ResNet` needs it. Raises ValueError for what cannot be.
    """
    name = model if isinstance(model, str) else type(model).__name__
    model = create_model(model, **options) if isinstance(model, str) else copy.deepcopy(model).train()
    if input_shape is None:
        if not isinstance(model, ResNet):
            raise ValueError(f"the input of a {name} cannot be guessed: give input_shape=(N, C, H, W)")
        side = model.image_size if image_size is None else image_size
        input_shape = (batch, model.conv1.weight.shape[1], *((side, side) if isinstance(side, int) else side))
    if not input_shape or not all(isinstance(n, int) and n > 0 for n in input_shape):
        raise ValueError(f"input shape {tuple(input_shape)} must be ints of at least 1")
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.eval()  # it keeps as much as in training, and also takes images with one value per channel
    weight = next(model.parameters(), None)
    xp = np if weight is None else namespace_of(weight.array)
    x = Tensor(xp.zeros(tuple(input_shape), np.float32 if weight is None else weight.dtype))
    with _Watch(model) as watch, set_grad_enabled(True):
        output = model(x)  # as long as it lives, so does the graph, and no array takes the place of another
    del output
    return Info(name, tuple(input_shape), watch.finished())


class _Watch(Hook):
    """Adds up every op's cost in the row of the module that ran it."""

    def __init__(self, model: nn.Module):
        self.modules = {id(module): (path or "(itself)", module) for path, module in model.named_modules()}
        self.rows: dict[int, Row] = {}
        self.counted = {id(_buffer(t.array)) for t in model.parameters()}
        self.counted_parameters: set[int] = set()

    def row(self, module: nn.Module) -> Row:
        if id(module) not in self.rows:
            path, _ = self.modules[id(module)]
            own = {
                id(p): p.array.size for p in module.parameters(recurse=False) if id(p) not in self.counted_parameters
            }
            self.counted_parameters.update(own)
            self.rows[id(module)] = Row(path, type(module).__name__, parameters=sum(own.values()))
        return self.rows[id(module)]

    def forward_post(self, node: Node, arrays: Sequence[Any], y: Any) -> None:
        scope = node.scope
        while scope is not None and id(scope.module) not in self.modules:
            scope = scope.parent
        if scope is None:
            return
        row = self.row(scope.module)
        row.output_shape = y.shape
        row.macs += _macs(node.name, arrays, y)
        if any(node.needs_grad):
            row.saved_bytes += sum(self.newly_kept(a) for a in node.saved_for_backward or ())

    def newly_kept(self, array: Any) -> int:
        """The bytes that are alive because of `array` alone."""
        if not hasattr(array, "nbytes"):
            return 0
        buffer = _buffer(array)
        if id(buffer) in self.counted:
            return 0
        self.counted.add(id(buffer))
        return buffer.nbytes

    def finished(self) -> list[Row]:
        """The rows, with those of modules that own parameters but never ran, without containers that cost nothing."""
        for _, module in self.modules.values():
            if next(module.parameters(recurse=False), None) is not None:
                self.row(module)
        rows = [(self.modules[key][1], row) for key, row in self.rows.items()]
        return [row for module, row in rows if row.parameters or row.macs or row.saved_bytes or not module._modules]


def _buffer(array: Any) -> Any:
    """The array that owns the memory."""
    while getattr(array, "base", None) is not None and hasattr(array.base, "nbytes"):
        array = array.base
    return array


def _macs(op: str, arrays: Sequence[Any], y: Any) -> int:
    if op == "Conv2d":
        return y.size * math.prod(arrays[1].shape[1:])  # y (N, K, P, Q), each of C/groups * R * S products
    if op == "Linear":
        return y.size * arrays[1].shape[1]  # weight (O, I)
    if op == "MatMul":
        return y.size * arrays[0].shape[-1]
    return 0
