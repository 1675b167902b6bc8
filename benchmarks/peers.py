"""The same work by PyTorch (on the CPU: oneDNN), where it is installed. Nothing else in the project's code uses it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np


def load_torch(threads: int) -> Any:
    """The module, set to that many threads; None where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    return torch


def peer(torch: Any, problem: str, arrays: dict[str, Any], params: dict[str, Any]) -> Callable[[], Any] | None:
    """A call without arguments that does the problem's work, returning NumPy-like tensors; None where there is none.

    arrays: float32 inputs by name. Activations go in channels-last, as ours do.
    """
    t = {name: None if a is None else _tensor(torch, name, a) for name, a in arrays.items()}
    if problem.startswith("conv2d"):
        return _conv2d(torch, problem, t, params)
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


def _conv2d(torch: Any, problem: str, t: dict[str, Any], params: dict[str, Any]) -> Callable[[], Any]:
    geometry = (params["stride"], params["padding"], params["dilation"])
    if problem == "conv2d_fprop":
        return lambda: torch.conv2d(t["x"], t["w"], None, *geometry, params["groups"])
    data = problem == "conv2d_dgrad"
    dy = t["dy"]
    if data:  # the values of x do not matter for dx, nor those of w for dw
        c = t["w"].shape[1] * params["groups"]
        x, w = _empty(torch, (dy.shape[0], c, *params["input_hw"])), t["w"]
    else:
        shape = (dy.shape[1], t["x"].shape[1] // params["groups"], *params["kernel_hw"])
        x, w = t["x"], torch.empty(shape).to(memory_format=torch.channels_last)
    wanted = [data, not data, False]
    rest = (False, [0, 0], params["groups"], wanted)
    return lambda: torch.ops.aten.convolution_backward(dy, x, w, None, *geometry, *rest)[0 if data else 1]


def _empty(torch: Any, shape: tuple[int, ...]) -> Any:
    return torch.empty(shape).to(memory_format=torch.channels_last)


def _tensor(torch: Any, name: str, array: np.ndarray) -> Any:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
