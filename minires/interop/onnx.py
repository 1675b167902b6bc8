"""An ONNX graph, node by node: each method adds one layer and returns the name of its output.

    graph = OnnxGraph(fold_batch_norm=True)
    x = graph.relu(graph.convolution("input", model.conv1, "conv1", model.bn1, "bn1"))
    graph.write("model.onnx", x, input_shape=("N", 3, 32, 32))

Initializers have the names of our state dict. A BatchNorm that follows a convolution can be folded into it:
gamma (w*x - mean) / sqrt(var + eps) + beta = (s w)*x + (beta - s mean) with s = gamma / sqrt(var + eps) per output
channel, computed in float64. Operators: https://onnx.ai/onnx/operators, version OPSET.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import nn
from ..device import CPU, to_device
from ..engine import Tensor
from ..ops.windows import pair
from ..serialization import write_atomically

OPSET, IR_VERSION = 17, 8  # IR 8 is the format that came with opset 17
INPUT, OUTPUT = "input", "logits"
_END = 2**63 - 1  # the end of an axis, however long


class OnnxGraph:
    """A graph that grows. fold_batch_norm: whether a BatchNorm after a convolution becomes part of it.

    RuntimeError where the package onnx is missing.
    """

    def __init__(self, fold_batch_norm: bool = True):
        try:
            import onnx
        except ImportError:
            raise RuntimeError("writing ONNX needs the package onnx: pip install 'minires[onnx]'") from None
        self.onnx: Any = onnx
        self.fold = fold_batch_norm
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def node(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node; its output has its name."""
        self.nodes.append(self.onnx.helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, values: Any) -> str:
        """Add numbers: floating ones as float32, whole ones as int64."""
        array = np.asarray(values)
        dtype = np.int64 if array.dtype.kind == "i" else np.float32
        self.constants[name] = self.onnx.numpy_helper.from_array(np.asarray(array, dtype, order="C"), name)
        return name

    def convolution(
        self, x: str, conv: nn.Conv2d, path: str, bn: nn.BatchNorm2d | None = None, bn_path: str = ""
    ) -> str:
        """A convolution, and the BatchNorm that follows it, folded or as a node of its own."""
        weight = _numbers(conv.weight)
        bias = None if conv.bias is None else _numbers(conv.bias)
        if bn is not None and self.fold:
            scale, shift = _scale_and_shift(bn)
            weight, bias = weight * scale[:, None, None, None], shift + (0 if bias is None else scale * bias)
        inputs = [x, self.constant(f"{path}.weight", weight)]
        if bias is not None:
            inputs.append(self.constant(f"{path}.bias", bias))
        top, left = conv.padding
        y = self.node(
            "Conv", inputs, path, kernel_shape=list(conv.kernel_size), strides=list(conv.stride),
            dilations=list(conv.dilation), pads=[top, left, top, left], group=conv.groups,
        )  # fmt: skip
        return y if bn is None or self.fold else self.batch_norm(y, bn, bn_path)

    def batch_norm(self, x: str, bn: nn.BatchNorm2d, path: str) -> str:
        """A BatchNorm with its running statistics, as in evaluation."""
        values = {"weight": bn.weight, "bias": bn.bias, "running_mean": bn.running_mean, "running_var": bn.running_var}
        inputs = [self.constant(f"{path}.{name}", _numbers(value)) for name, value in values.items()]
        return self.node("BatchNormalization", [x, *inputs], path, epsilon=bn.eps)

    def relu(self, x: str) -> str:
        return self.node("Relu", [x], f"{x}.relu")

    def add(self, x: str, y: str, path: str) -> str:
        return self.node("Add", [x, y], f"{path}.add")

    def max_pool(self, x: str, pool: nn.MaxPool2d, path: str) -> str:
        kernel, stride = pair(pool.kernel_size, "kernel_size"), pair(pool.stride, "stride")
        pads = 2 * pair(pool.padding, "padding", least=0)
        return self.node("MaxPool", [x], path, kernel_shape=kernel, strides=stride, pads=pads)

    def zero_pad_shortcut(self, x: str, stride: int, before: int, after: int, path: str) -> str:
        """Option A: every `stride`-th pixel, and channels of zeros before and after x's own."""
        names = {"starts": [0, 0], "ends": [_END, _END], "axes": [2, 3], "steps": [stride, stride]}
        inputs = [self.constant(f"{path}.{name}", values) for name, values in names.items()]
        x = self.node("Slice", [x, *inputs], f"{path}.slice")
        pads = self.constant(f"{path}.pads", [0, before, 0, 0, 0, after, 0, 0])
        return self.node("Pad", [x, pads], f"{path}.pad", mode="constant")

    def mean_and_linear(self, x: str, linear: nn.Linear, path: str) -> str:
        """The mean over the image, and a fully connected layer: the head."""
        x = self.node("Flatten", [self.node("GlobalAveragePool", [x], "avgpool")], "flatten", axis=1)
        inputs = [x, self.constant(f"{path}.weight", _numbers(linear.weight))]
        if linear.bias is not None:
            inputs.append(self.constant(f"{path}.bias", _numbers(linear.bias)))
        return self.node("Gemm", inputs, path, transB=1)

    def write(
        self,
        path: str | os.PathLike[str],
        output: str,
        input_shape: Sequence[int | str],
        output_shape: Sequence[int | str],
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Write the graph to a file, whole or not at all, after onnx.checker has passed it with all shapes inferred.

        output: the name of the last node's output. Shapes: a text stands for a length that may vary. notes: the file's
        metadata_props.
        """
        helper, kind = self.onnx.helper, self.onnx.TensorProto.FLOAT
        nodes = [*self.nodes, helper.make_node("Identity", [output], [OUTPUT], name=OUTPUT)]
        ends = [helper.make_tensor_value_info(INPUT, kind, list(input_shape))]
        outs = [helper.make_tensor_value_info(OUTPUT, kind, list(output_shape))]
        graph = helper.make_graph(nodes, "minires", ends, outs, list(self.constants.values()))
        model = helper.make_model(
            graph, producer_name="minires", ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
        )
        helper.set_model_props(model, dict(notes or {}))
        self.onnx.checker.check_model(model, full_check=True)
        write_atomically(Path(path), lambda beside: beside.write_bytes(model.SerializeToString()))


def _scale_and_shift(bn: nn.BatchNorm2d) -> tuple[np.ndarray, np.ndarray]:
    """(s, t) so that the BatchNorm is s x + t, (C,) float64 each."""
    scale = _numbers(bn.weight) / np.sqrt(_numbers(bn.running_var) + bn.eps)
    return scale, _numbers(bn.bias) - scale * _numbers(bn.running_mean)


def _numbers(tensor: Tensor | None) -> np.ndarray:
    """The values, in float64 on the CPU."""
    if tensor is None:
        raise ValueError("a BatchNorm without weight, bias or running statistics cannot be exported")
    return to_device(tensor.array, CPU).astype(np.float64)
