"""The same convolutions by cuDNN, through nvidia-cudnn-frontend and raw pointers, where it is installed.

The graph's API: docs.nvidia.com/deeplearning/cudnn/frontend. All plans that build are offered, not the heuristic's
first one alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

_MOST_PLANS = 24
_MOST_WORKSPACE = 4 << 30


def build_graph(cudnn: Any, direction: str, dtype: str, shapes: dict[str, tuple[int, ...]], params: dict, handle: Any):
    """(graph, its tensors by name). shapes: logical NCHW and KCRS of what goes in and comes out ("x", "w", "y").

    Activations and weights lie channels-last. Needs no GPU where `handle` is None.
    """
    kind = {"float32": cudnn.data_type.FLOAT, "float16": cudnn.data_type.HALF, "bfloat16": cudnn.data_type.BFLOAT16}
    io, single = kind[dtype], cudnn.data_type.FLOAT
    about = {} if handle is None else {"handle": handle}
    graph = cudnn.pygraph(io_data_type=io, intermediate_data_type=single, compute_data_type=single, **about)

    def tensor(name: str) -> Any:
        return graph.tensor(name=name, dim=list(shapes[name]), stride=_strides(shapes[name]), data_type=io)

    window = {name: list(params[name]) for name in ("padding", "stride", "dilation")}
    if direction == "fprop":
        t = {"x": tensor("x"), "w": tensor("w")}
        out = graph.conv_fprop(image=t["x"], weight=t["w"], **window)
    elif direction == "dgrad":
        t = {"y": tensor("y"), "w": tensor("w")}
        out = graph.conv_dgrad(loss=t["y"], filter=t["w"], **window)
    else:
        t = {"x": tensor("x"), "y": tensor("y")}
        out = graph.conv_wgrad(image=t["x"], loss=t["y"], **window)
    result = {"fprop": "y", "dgrad": "x", "wgrad": "w"}[direction]
    out.set_output(True).set_data_type(io).set_dim(list(shapes[result])).set_stride(_strides(shapes[result]))
    graph.validate()
    graph.build_operation_graph()
    return graph, t | {result: out}


def cudnn_conv(cupy: Any, direction: str, dtype: str, arrays: tuple, params: dict) -> tuple[dict, str]:
    """(calls by plan, cuDNN's version and what it refused, or why there are none). A call returns the result as a
    logical NCHW array."""
    if importlib.util.find_spec("cudnn") is None:
        return {}, "nvidia-cudnn-frontend is not installed"
    cudnn: Any = importlib.import_module("cudnn")
    handle = new_handle(cupy, cudnn)
    shapes, inputs = _shapes(direction, arrays, params)
    graph, tensors = build_graph(cudnn, direction, dtype, shapes, params, handle)
    result = {"fprop": "y", "dgrad": "x", "wgrad": "w"}[direction]
    n, c, h, w = shapes[result]
    out = cupy.empty((n, h, w, c), arrays[0].dtype)
    held = {name: cupy.ascontiguousarray(a.transpose(0, 2, 3, 1)) for name, a in inputs.items()}
    pointers = {tensors[name]: a.data.ptr for name, a in (held | {result: out}).items()}
    calls, refused = plans(cupy, cudnn, graph, pointers, handle)
    _keep.append((graph, tensors, held, out, handle))
    named = {
        f"cudnn:{index}": lambda call=call: (call(), out.transpose(0, 3, 1, 2))[1] for index, call in calls.items()
    }
    return named, f"cuDNN {cudnn.backend_version()}, frontend {cudnn.__version__}{refused and ', ' + refused}"


def new_handle(cupy: Any, cudnn: Any) -> Any:
    """A handle on CuPy's current stream."""
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=cupy.cuda.get_current_stream().ptr)
    return handle


def plans(cupy: Any, cudnn: Any, graph: Any, pointers: dict, handle: Any) -> tuple[dict[int, Callable[[], None]], str]:
    """(calls by the index of their plan, what was refused and why, in words).

    A plan may be refused, by this GPU or this version; an error of the device is another matter, and propagates.
    """
    refusals = (RuntimeError, cudnn.cudnnGraphNotSupportedError)
    try:
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
    except refusals as error:
        return {}, f"no plan for this graph: {_first_line(error)}"
    calls: dict[int, Callable[[], None]] = {}
    reasons: list[str] = []
    count = min(graph.get_execution_plan_count(), _MOST_PLANS)
    for index in range(count):
        try:
            graph.build_plan_at_index(index)
            size = graph.get_workspace_size_plan_at_index(index)
        except refusals as error:
            reasons.append(_first_line(error))
            continue
        if size > _MOST_WORKSPACE:
            reasons.append(f"it wants {size >> 20} MiB of workspace")
            continue
        space = cupy.empty(max(size, 1), cupy.uint8)

        def call(index: int = index, space: Any = space) -> None:
            graph.execute_plan_at_index(pointers, space.data.ptr, index, handle)

        try:
            call()
        except refusals as error:
            reasons.append(_first_line(error))
            continue
        cupy.cuda.Device().synchronize()
        calls[index] = call
    if not reasons:
        return calls, "" if calls else "no plan was offered"
    return calls, f"{len(reasons)} of {count} plans refused, the first: {reasons[0]}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


_keep: list[Any] = []  # what the calls point to


def _shapes(direction: str, arrays: tuple, params: dict) -> tuple[dict, dict[str, Any]]:
    """Logical shapes of x, w and y, and which arrays are given."""
    a, b = arrays
    if direction == "fprop":
        (n, _, h, v), (k, _, r, s) = a.shape, b.shape
        sizes = zip((h, v), (r, s), params["stride"], params["padding"], params["dilation"], strict=True)
        p, q = ((size + 2 * pad - d * (taps - 1) - 1) // u + 1 for size, taps, u, pad, d in sizes)
        return {"x": a.shape, "w": b.shape, "y": (n, k, p, q)}, {"x": a, "w": b}
    if direction == "dgrad":
        return {"x": (a.shape[0], b.shape[1], *params["input_hw"]), "w": b.shape, "y": a.shape}, {"y": a, "w": b}
    return {"x": a.shape, "w": (b.shape[1], a.shape[1], *params["kernel_hw"]), "y": b.shape}, {"x": a, "y": b}


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Of channels-last memory, in numbers."""
    _, c, h, w = shape
    return [c * h * w, 1, w * c, c]
