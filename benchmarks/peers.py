"""The same work by PyTorch (on the CPU: oneDNN), where it is installed. Nothing else in the project's code uses it.

`python -m benchmarks.peers THREADS` is the worker of `benchmarks.kernels`: given a file of inputs, it answers with
numbers of its outputs; told a layout, with its time.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from .worker import burst, serve, take_channel

LAYOUTS = ("contiguous", "channels_last")
SAMPLED = 64  # outputs that are compared


def load_torch(threads: int) -> Any:
    """The module, set to that many threads; None where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    return torch


def peer(
    torch: Any, problem: str, arrays: dict[str, Any], params: dict[str, Any], layout: str = "channels_last"
) -> Callable[[], Any] | None:
    """A call without arguments that does the problem's work, returning NumPy-like tensors; None where there is none.

    arrays: float32 inputs by name. layout: "contiguous" or "channels_last", of arrays with four axes.
    """
    t = {name: None if a is None else _tensor(torch, a, layout) for name, a in arrays.items()}
    if problem.startswith("conv2d"):
        return _conv2d(torch, problem, t, params, layout)
    if problem == "batchnorm2d_fprop_train" and t["z"] is None and not params["relu"]:
        mean, var = torch.zeros_like(t["gamma"]), torch.ones_like(t["gamma"])
        return lambda: torch.batch_norm(t["x"], t["gamma"], t["beta"], mean, var, True, 0.1, params["eps"], False)
    if problem == "relu_fprop":
        return lambda: torch.relu(t["x"])
    if problem == "add_fprop":
        return lambda: torch.add(t["a"], t["b"])
    if problem == "linear_fprop":
        return lambda: torch.nn.functional.linear(t["x"], t["w"], t["b"])
    return None


def sampled(output: np.ndarray) -> np.ndarray:
    """Some of an output's elements, the same of every array of that shape, in logical order."""
    return output.reshape(-1)[np.linspace(0, output.size - 1, SAMPLED).astype(int)]


def _conv2d(torch: Any, problem: str, t: dict[str, Any], params: dict[str, Any], layout: str) -> Callable[[], Any]:
    geometry = (params["stride"], params["padding"], params["dilation"])
    if problem == "conv2d_fprop":
        return lambda: torch.conv2d(t["x"], t["w"], None, *geometry, params["groups"])
    data = problem == "conv2d_dgrad"
    dy = t["dy"]
    if data:  # the values of x do not matter for dx, nor those of w for dw
        c = t["w"].shape[1] * params["groups"]
        x, w = _empty(torch, (dy.shape[0], c, *params["input_hw"]), layout), t["w"]
    else:
        shape = (dy.shape[1], t["x"].shape[1] // params["groups"], *params["kernel_hw"])
        x, w = t["x"], _empty(torch, shape, layout)
    wanted = [data, not data, False]
    rest = (False, [0, 0], params["groups"], wanted)
    return lambda: torch.ops.aten.convolution_backward(dy, x, w, None, *geometry, *rest)[0 if data else 1]


def _empty(torch: Any, shape: tuple[int, ...], layout: str) -> Any:
    return torch.empty(shape).to(memory_format=_format(torch, layout))


def _tensor(torch: Any, array: np.ndarray, layout: str) -> Any:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.contiguous(memory_format=_format(torch, layout)) if tensor.ndim == 4 else tensor


def _format(torch: Any, layout: str) -> Any:
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


class _Rivals:
    """The calls of one case, by layout."""

    def __init__(self, torch: Any):
        self.torch, self.calls = torch, {}

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["do"] == "measure":
            with self.torch.no_grad():
                return {"seconds": burst(self.calls[message["layout"]], message["seconds"])}
        params = {name: tuple(v) if isinstance(v, list) else v for name, v in message["params"].items()}
        with np.load(message["file"]) as saved:
            arrays = {name: saved[name] if name in saved else None for name in message["arrays"]}
        layouts = LAYOUTS if any(a is not None and a.ndim == 4 for a in arrays.values()) else LAYOUTS[:1]
        calls = {one: peer(self.torch, message["problem"], arrays, params, one) for one in layouts}
        self.calls = {name: call for name, call in calls.items() if call is not None}
        with self.torch.no_grad():
            return {name: sampled(call().numpy()).tolist() for name, call in self.calls.items()}


if __name__ == "__main__":
    channel = take_channel()
    torch = load_torch(int(sys.argv[1]))
    serve({"torch": torch is not None}, _Rivals(torch).answer, channel)
