"""Training steps and inference in every library: `python -m benchmarks.contestants LIBRARY WHAT PRECISION MODEL BATCH
SIZE THREADS` is the worker of `benchmarks.networks`.

All begin with the same weights and images. A worker's first message is what it computed in its first step: samples of
the logits, or the loss and samples of all gradients. The peers run as their documentation advises for a CPU.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .memory_use import peak_bytes, reset_peak, resident_bytes
from .worker import burst, serve, take_channel

LEARNING: dict[str, Any] = dict(lr=0.01, momentum=0.9, weight_decay=1e-4)
_BRANCH = 0.1  # of `fill`
_SAMPLES = 64  # elements of a gradient that are compared
_MEMORY_STEPS = 3


class Unavailable(Exception):
    """What a library cannot do here, in one line."""


def fill(parameters: Iterable[tuple[str, Any]], branch: float = 1.0) -> None:
    """The same parameters in every library: weights drawn from the parameter's name, biases 0.

    branch: weight of the last BatchNorm of each block. A small one, as where training begins with 0 there (Goyal et al.
    2017, section 5.1), keeps the rounding of bfloat16 from growing with each block: with 1, at batch 8, the gradients
    of ResNet-50 in bfloat16 differ from those in float32 by 1.3 times their norm, PyTorch's as ours.
    """
    arrays = dict(parameters)
    last = ".bn3.weight" if any(name.endswith(".bn3.weight") for name in arrays) else ".bn2.weight"
    for name, array in arrays.items():
        if name.endswith("bias"):
            array[...] = 0
        elif name.endswith(last):
            array[...] = branch
        elif array.ndim > 1:
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            array[...] = rng.standard_normal(array.shape) * (2 / array[0].size) ** 0.5


def _sample(array: np.ndarray) -> list[float]:
    flat = np.asarray(array, dtype=np.float64).reshape(-1)
    return flat[np.linspace(0, flat.size - 1, min(flat.size, _SAMPLES)).astype(int)].tolist()


class Setting:
    """What a contestant is given: the model's name, images (NCHW, float32) and labels, and whether to use bfloat16."""

    def __init__(self, model: str, batch: int, size: int, threads: int, bf16: bool):
        rng = np.random.default_rng(0)
        self.model, self.threads, self.bf16 = model, threads, bf16
        self.images = rng.standard_normal((batch, 3, size, size)).astype(np.float32)
        self.labels = rng.integers(0, 10, batch)


# A contestant imports its library when it is made, and returns `begin`, which builds the network. That returns the step
# that is timed, which returns its loss or logits, and a function that returns the gradients by name after a step.


def _minires(setting: Setting, training: bool) -> Callable[[], Any]:
    import minires.kernels.cpu.jit as jit  # pyright: ignore[reportMissingImports]

    import minires
    import minires.models
    import minires.optim

    jit.set_num_threads(setting.threads)
    if setting.bf16 and not hasattr(minires, "autocast"):
        raise Unavailable("minires has no bfloat16")

    def precision() -> Any:
        return minires.autocast("cpu", dtype=minires.bfloat16) if setting.bf16 else contextlib.nullcontext()

    def begin() -> tuple[Callable[[], Any], Callable[[], dict]]:
        model = minires.models.create_model(setting.model)
        fill(((name, p.array) for name, p in model.named_parameters()), _BRANCH)
        x, target = minires.from_numpy(setting.images), minires.from_numpy(setting.labels)
        if not training:
            traced = minires.jit.trace(minires.nn.fuse_for_inference(model))

            def infer() -> np.ndarray:
                with minires.no_grad(), precision():
                    return traced(x).array

            return infer, dict
        traced = minires.jit.trace(model)
        optimizer = minires.optim.SGD(model.parameters(), **LEARNING)

        def step() -> float:
            optimizer.zero_grad()
            with precision():
                loss = minires.nn.functional.cross_entropy(traced(x), target)
            loss.backward()
            optimizer.step()
            return loss.item()

        return step, lambda: {name: p.grad.array for name, p in model.named_parameters() if p.grad is not None}

    return begin


def _torch(
    setting: Setting, training: bool, channels_last: bool = False, compiled: bool = False, freezing: bool = False
) -> Callable[[], Any]:
    torch = importlib.import_module("torch")
    torch.set_num_threads(setting.threads)
    if compiled:
        importlib.import_module("torch._inductor").config.freezing = freezing

    def begin() -> tuple[Callable[[], Any], Callable[[], dict]]:
        plain, x = _torch_model(torch, setting), torch.from_numpy(setting.images)
        if channels_last:
            plain, x = (thing.to(memory_format=torch.channels_last) for thing in (plain, x))
        target = torch.from_numpy(setting.labels)
        model = plain if training else plain.eval()
        model = torch.compile(model) if compiled else model
        precision = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=setting.bf16)
        if not training:

            def infer() -> np.ndarray:
                with torch.no_grad(), precision():
                    return model(x).float().numpy()

            return infer, dict
        optimizer = torch.optim.SGD(plain.parameters(), fused=True, **LEARNING)

        def step() -> float:
            optimizer.zero_grad()
            with precision():
                loss = torch.nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            return loss.item()

        return step, lambda: {name: p.grad.numpy() for name, p in plain.named_parameters()}

    return begin


def _torch_model(torch: Any, setting: Setting) -> Any:
    from .torch_resnet import resnet

    model = resnet(torch, setting.model)
    fill(((name, p.detach().numpy()) for name, p in model.named_parameters()), _BRANCH)
    return model


def _onnx_bytes(setting: Setting) -> bytes:
    """The network as PyTorch exports it, for runtimes that read ONNX."""
    torch = importlib.import_module("torch")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        images = (torch.from_numpy(setting.images),)
        torch.onnx.export(_torch_model(torch, setting).eval(), images, path, dynamo=False, input_names=["x"])
        return path.read_bytes()


def _onnxruntime(setting: Setting, training: bool) -> Callable[[], Any]:
    if setting.bf16:
        raise Unavailable("ONNX Runtime has no bfloat16 on CPUs")
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = setting.threads

    def begin() -> tuple[Callable[[], Any], Callable[[], dict]]:
        session = ort.InferenceSession(_onnx_bytes(setting), options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"x": setting.images})[0], dict

    return begin


def _openvino(setting: Setting, training: bool) -> Callable[[], Any]:
    ov = importlib.import_module("openvino")
    core = ov.Core()
    if setting.bf16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable("OpenVINO has no bfloat16 on this CPU")

    def begin() -> tuple[Callable[[], Any], Callable[[], dict]]:
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if setting.bf16 else "f32",
            "INFERENCE_NUM_THREADS": setting.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = core.compile_model(core.read_model(_onnx_bytes(setting)), "CPU", options).create_infer_request()
        return lambda: request.infer([setting.images], share_inputs=True, share_outputs=True)[0], dict

    return begin


CONTESTANTS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {  # the packages that they need; how they are made
    "minires": ((), _minires),
    "torch": (("torch",), _torch),
    "torch_channels_last": (("torch",), functools.partial(_torch, channels_last=True)),
    "torch_compile": (("torch",), functools.partial(_torch, compiled=True)),
    "torch_compile_channels_last": (("torch",), functools.partial(_torch, compiled=True, channels_last=True)),
    "torch_freezing": (("torch",), functools.partial(_torch, compiled=True, freezing=True)),
    "onnxruntime": (("torch", "onnx", "onnxruntime"), _onnxruntime),
    "openvino": (("torch", "onnx", "openvino"), _openvino),
}
INFERENCE_ONLY = ("torch_freezing", "onnxruntime", "openvino")


def missing(library: str) -> str:
    """The packages that a contestant needs and that are not installed, as text; "" where nothing is missing."""
    return ", ".join(name for name in CONTESTANTS[library][0] if importlib.util.find_spec(name) is None)


def _work(channel: Any, library: str, what: str, precision: str, model: str, *numbers: int) -> None:
    setting, training = Setting(model, *numbers, bf16=precision == "bf16"), what != "infer"
    try:
        begin = CONTESTANTS[library][1](setting, training)
    except Unavailable as error:
        serve({"unavailable": str(error)}, lambda message: {}, channel)
        return
    gc.collect()
    idle = resident_bytes()
    step, gradients = begin()
    result = step()
    if training:
        first = {"loss": [result], **{name: _sample(gradient) for name, gradient in gradients().items()}}
    else:
        first = {"logits": _sample(result)}
    step()

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        if message["do"] == "measure":
            return {"seconds": burst(step, message["seconds"])}
        reset_peak()
        for _ in range(_MEMORY_STEPS):
            step()
        return {"idle": idle, "peak": peak_bytes()}

    serve({"first": first}, answer, channel)


if __name__ == "__main__":
    stream = take_channel()
    _work(stream, *sys.argv[1:5], *map(int, sys.argv[5:]))  # pyright: ignore[reportArgumentType]
