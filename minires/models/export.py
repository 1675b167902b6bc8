"""A ResNet as a file for other programs: ONNX, safetensors, or PyTorch.

The graph for ONNX is the network's forward in evaluation mode, layer by layer; blocks.py and resnet.py are what it
repeats. Images come as (N, C, H, W) float32, normalised as in training, for any N.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..creation import from_numpy
from ..device import CPU, to_device
from ..interop.onnx import INPUT, OnnxGraph
from ..nn import BatchNorm2d
from ..state import no_grad
from .blocks import Block, PreActBlock, ZeroPadShortcut
from .resnet import ResNet


def write_onnx(
    model: ResNet,
    path: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    fold_bn: bool = True,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write a ResNet as ONNX (opset 17): images (N, C, size, size) -> logits (N, classes), for any N.

    image_size: height and width in pixels; None means as in the paper. fold_bn: make each BatchNorm that follows a
    convolution a part of it; otherwise all stay nodes of their own. notes: texts by name for the file's metadata. The
    file is checked by onnx.checker and appears whole or not at all. RuntimeError where the package onnx is missing.
    """
    size = model.image_size if image_size is None else image_size
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"image_size={size!r} must be an int of at least 1")
    graph = OnnxGraph(fold_bn)
    x = graph.relu(graph.convolution(INPUT, model.conv1, "conv1", model.bn1, "bn1"))
    if model.maxpool is not None:
        x = graph.max_pool(x, model.maxpool, "maxpool")
    for name, block in model.blocks().items():
        x = _preact_block(graph, x, block, name) if isinstance(block, PreActBlock) else _block(graph, x, block, name)
    if model.bn is not None:
        x = graph.relu(graph.batch_norm(x, model.bn, "bn"))
    logits = graph.mean_and_linear(x, model.fc, "fc")
    channels, classes = model.conv1.weight.shape[1], model.fc.weight.shape[0]
    graph.write(path, logits, ("N", channels, size, size), ("N", classes), notes)


def compare_with_onnxruntime(model: ResNet, path: str | os.PathLike[str], images: int = 2) -> tuple[float, float]:
    """(largest difference, largest logit) of the file in onnxruntime and the model, on random images.

    ImportError where onnxruntime is missing.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    (signature,) = session.get_inputs()
    x = np.random.default_rng(0).standard_normal((images, *signature.shape[1:])).astype(np.float32)
    training = model.training
    model.eval()
    try:
        with no_grad():
            ours = to_device(model(from_numpy(x).to(model.conv1.weight.device)).array, CPU)
    finally:
        model.train(training)
    (theirs,) = session.run(None, {signature.name: x})
    return float(np.abs(ours - theirs).max()), float(np.abs(ours).max())


def _block(graph: OnnxGraph, x: str, block: Block, path: str) -> str:
    """relu(F(x) + s(x)), F being convolutions with their BatchNorms."""
    out, convolutions = x, _convolutions(block)
    for i in range(1, convolutions + 1):
        out = _with_batch_norm(graph, out, block, path, i, i)
        out = out if i == convolutions else graph.relu(out)
    shortcut = _shortcut(graph, x, block, path)
    return graph.relu(out if shortcut is None else graph.add(out, shortcut, path))


def _preact_block(graph: OnnxGraph, x: str, block: PreActBlock, path: str) -> str:
    """F(x) + s(x), F being convolutions, each after its BatchNorm and ReLU."""
    a = x if block.bn1 is None else graph.relu(graph.batch_norm(x, block.bn1, f"{path}.bn1"))
    out, convolutions = a, _convolutions(block)
    for i in range(1, convolutions):
        out = graph.relu(_with_batch_norm(graph, out, block, path, i, i + 1))
    out = graph.convolution(out, getattr(block, f"conv{convolutions}"), f"{path}.conv{convolutions}")
    shortcut = _shortcut(graph, x if block.downsample is None else a, block, path)
    return out if shortcut is None else graph.add(out, shortcut, path)


def _with_batch_norm(graph: OnnxGraph, x: str, block: Block, path: str, conv: int, bn: int) -> str:
    modules: Any = getattr(block, f"conv{conv}"), getattr(block, f"bn{bn}")
    return graph.convolution(x, modules[0], f"{path}.conv{conv}", modules[1], f"{path}.bn{bn}")


def _shortcut(graph: OnnxGraph, x: str, block: Block, path: str) -> str | None:
    """s(x), or None in a plain block."""
    if not block.skip or block.downsample is None:
        return x if block.skip else None
    path = f"{path}.downsample"
    if isinstance(block.downsample, ZeroPadShortcut):
        return graph.zero_pad_shortcut(
            x, block.downsample.stride, block.downsample.before, block.downsample.after, path
        )
    conv, *rest = block.downsample.children()
    bn = next((module for module in rest if isinstance(module, BatchNorm2d)), None)
    return graph.convolution(x, conv, f"{path}.0", bn, f"{path}.1")  # type: ignore[arg-type]


def _convolutions(block: Block) -> int:
    return sum(name.startswith("conv") for name, _ in block.named_children())
