"""A bottleneck of ResNet-50 forward and backward in bfloat16: ours as one op and line by line, PyTorch's, cuDNN's.

cuDNN's is the sequence of its operations, each by the fastest of its plans: "cudnn" one by one (convolution; BatchNorm
with ReLU and addition), "cudnn_fused" with what its frontend offers in Python for fusing them (forward scale-bias-ReLU-
conv-statistics, backward scale-bias-ReLU-wgrad; BatchNorm's backward takes the activation, and is not fused with
dgrad). Between operations there is nothing: no casts, no optimizer, no allocation, which is in cuDNN's favour.

cuDNN also has dgrad-dReLU-dBN in one kernel. Its last operation, which sums for dgamma and dbeta and makes the factors
of the next pass, is `dbn_weight` in the C++ frontend; the Python class `cudnn.pygraph` of nvidia-cudnn-frontend 1.28
has neither it nor `bn_finalize`, and `genstats`, the nearest that it has, sums squares, where dy * x must be summed. So
that fusion is not on cuDNN's side here.

Source: docs.nvidia.com/deeplearning/cudnn/frontend, operations "Convolutions", "Normalizations" and "Pointwise".
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .cudnn_peer import new_handle, plans

# Identity blocks of ResNet-50: width of the 3x3, H = W. Batch 256.
BLOCKS = {"block56": (64, 56), "block28": (128, 28), "block14": (256, 14), "block7": (512, 7)}
BATCH = 256
Shape = tuple[int, int, int, int]


def blocks(argument: str) -> Iterator[dict[str, Any]]:
    """Rows of "block56" and its kin: median time of every side, and how much longer than ours as one op it takes."""
    from .gpu_layers import on_gpu

    cupy: Any = importlib.import_module("cupy")
    width, size = BLOCKS[argument]
    calls, outputs, reasons = _ours(cupy, width, size), {}, {}
    if importlib.util.find_spec("torch") is None:
        reasons["torch"] = "PyTorch is not installed"
    else:
        calls |= _torch(width, size)
    for name, call in calls.items():
        outputs[name] = np.asarray(call(), np.float32)
    for name, y in outputs.items():  # dx of the same inputs by the same weights
        off = float(np.sqrt(((y - outputs["line"]) ** 2).mean() / (outputs["line"] ** 2).mean()))
        if not off < 0.25:  # rounding to 16 bits switches some ReLUs, which moves dx by about a tenth
            yield {"block": argument, "side": name, "wrong_by": off}
            calls.pop(name)
    for name, fused in (("cudnn", False), ("cudnn_fused", True)):
        sequence, reasons[name] = cudnn_block(cupy, width, size, fused)
        if sequence is not None:
            calls[name] = sequence
    timed = {name: call.step if isinstance(call, _Side) else call for name, call in calls.items()}
    times = on_gpu(cupy, timed, seconds=5.0)
    ours = times["one_op"].median if "one_op" in times else None
    for name in (*times, *(name for name, reason in reasons.items() if name not in times)):
        row: dict[str, Any] = {"block": argument, "batch": BATCH, "dtype": "bfloat16", "side": name}
        if name in times:
            t = times[name]
            row |= {"median_us": round(t.median * 1e6, 1), "p20_us": round(t.p20 * 1e6, 1)}
            row |= {"p80_us": round(t.p80 * 1e6, 1), "n": t.n}
            row |= {"over_one_op": None if ours is None else round(t.median / ours, 3)}
        yield row | {"note": reasons.get(name, "")}


class _Side:
    """step(): forward and backward. Called itself, it also returns dx as a NumPy array."""

    def __init__(self, step: Callable[[], Any], dx: Callable[[], Any]):
        self.step, self.dx = step, dx

    def __call__(self) -> Any:
        self.step()
        return self.dx()


def _inputs(width: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and dy as channels-last memory, (N, H, W, C)."""
    rng = np.random.default_rng(0)
    shape = (BATCH, size, size, 4 * width)
    return rng.standard_normal(shape, dtype=np.float32), rng.standard_normal(shape, dtype=np.float32)


def _ours(cupy: Any, width: int, size: int) -> dict[str, Any]:
    import minires
    from minires.models.blocks import Bottleneck

    x, dy = (minires.from_numpy(a.transpose(0, 3, 1, 2)).to("cuda") for a in _inputs(width, size))
    x, dy = x.to(minires.bfloat16).requires_grad_(), dy.to(minires.bfloat16)

    def side(one_op: bool) -> _Side:
        minires.manual_seed(0)
        block = Bottleneck(4 * width, width).to("cuda")
        block.one_op = one_op

        def step() -> None:
            x.grad = None
            block.zero_grad()
            with minires.autocast("cuda", dtype=minires.bfloat16):
                y = block(x)
            y.backward(dy)

        return _Side(step, lambda: x.grad.float().cpu().numpy())

    return {"line": side(False), "one_op": side(True)}


def _torch(width: int, size: int) -> dict[str, Any]:
    import minires
    from minires.models.blocks import Bottleneck

    torch: Any = importlib.import_module("torch")
    torch.backends.cudnn.benchmark = True
    minires.manual_seed(0)
    weights = {name: torch.from_numpy(t.numpy()) for name, t in Bottleneck(4 * width, width).state_dict().items()}

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i, (c, k, taps) in enumerate(_convolutions(width), 1):
                setattr(self, f"conv{i}", torch.nn.Conv2d(c, k, taps, padding=taps // 2, bias=False))
                setattr(self, f"bn{i}", torch.nn.BatchNorm2d(k))

        def forward(self, x: Any) -> Any:
            out = torch.relu(self.bn1(self.conv1(x)))
            out = torch.relu(self.bn2(self.conv2(out)))
            return torch.relu(self.bn3(self.conv3(out)) + x)

    block = Block()
    block.load_state_dict(weights)
    block = block.cuda().to(memory_format=torch.channels_last)
    x, dy = (torch.from_numpy(a).cuda().bfloat16().permute(0, 3, 1, 2) for a in _inputs(width, size))
    x.requires_grad_()

    def side(run: Any) -> _Side:
        def step() -> None:
            x.grad = None
            block.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                y = run(x)
            y.backward(dy)

        return _Side(step, lambda: x.grad.float().cpu().numpy())

    return {"torch": side(block), "torch_compiled": side(torch.compile(block, mode="max-autotune-no-cudagraphs"))}


def _convolutions(width: int) -> tuple[tuple[int, int, int], ...]:
    """C, K and taps of each."""
    return (4 * width, width, 1), (width, width, 3), (width, 4 * width, 1)


def steps(width: int, size: int, fused: bool) -> list[tuple[str, dict[str, Any]]]:
    """The operations of a block in order, forward and backward, as arguments of `build`."""
    forward, backward = [], []
    for i, (c, k, taps) in enumerate(_convolutions(width)):
        about = dict(x=(BATCH, c, size, size), w=(k, c, taps, taps), y=(BATCH, k, size, size))
        into = fused and i > 0  # the first convolution's input is activated
        last = dict(residual=i == 2)
        forward.append(("fprop", about | dict(norm=into, statistics=fused)))
        if not fused:
            forward.append(("bn_relu", about | last))
        elif i == 2:
            forward.append(("apply_relu", about | last))
        backward = [("bn_bwd", about), ("wgrad", about | dict(norm=into)), ("dgrad", about), *backward]
    return forward + backward


def build(cudnn: Any, kind: str, handle: Any, *, x: Shape, w: Shape, y: Shape, **options: bool):
    """(graph, its tensors by name); bfloat16 activations and weights, float32 statistics. Without a handle it needs no
    GPU."""
    half, single = cudnn.data_type.BFLOAT16, cudnn.data_type.FLOAT
    about = {} if handle is None else {"handle": handle}
    graph = cudnn.pygraph(io_data_type=half, intermediate_data_type=single, compute_data_type=single, **about)
    t: dict[str, Any] = {}
    window = dict(padding=[w[2] // 2] * 2, stride=[1, 1], dilation=[1, 1])

    def tensor(name: str, shape: Shape, kind: Any = half) -> Any:
        _, c, h, v = shape
        t[name] = graph.tensor(name=name, dim=list(shape), stride=[c * h * v, 1, v * c, c], data_type=kind)
        return t[name]

    def vector(name: str, channels: int, kind: Any = single) -> Any:
        return tensor(name, (1, channels, 1, 1), kind)

    def result(name: str, out: Any, shape: Shape, kind: Any = half) -> None:
        _, c, h, v = shape
        t[name] = out.set_output(True).set_data_type(kind).set_dim(list(shape)).set_stride([c * h * v, 1, v * c, c])

    def normalised(image: Any, channels: int) -> Any:
        scaled = graph.scale(input=image, scale=vector("scale", channels, half))
        return graph.bias(input=scaled, bias=vector("bias", channels, half))

    k = y[1]
    if kind in ("fprop", "wgrad"):
        image = tensor("x", x)
        image = graph.relu(input=normalised(image, x[1])) if options.get("norm") else image
        if kind == "wgrad":
            result("w", graph.conv_wgrad(image=image, loss=tensor("y", y), **window), w)
        else:
            out = graph.conv_fprop(image=image, weight=tensor("w", w), **window)
            if options.get("statistics"):
                for name, sums in zip(("sum", "square"), graph.genstats(input=out), strict=True):
                    result(name, sums, (1, k, 1, 1), single)
            result("y", out, y)
    elif kind == "dgrad":
        result("x", graph.conv_dgrad(loss=tensor("y", y), filter=tensor("w", w), **window), x)
    elif kind == "bn_bwd":
        masked = graph.relu_backward(loss=tensor("dy", y), input=tensor("active", y))
        statistics = dict(scale=vector("gamma", k), mean=vector("mean", k), inv_variance=vector("inv_std", k))
        outs = graph.batchnorm_backward(grad=masked, input=tensor("y", y), **statistics)
        result("dx", outs[0], y)
        for name, out in zip(("dgamma", "dbeta"), outs[1:], strict=True):
            result(name, out, (1, k, 1, 1), single)
    else:
        image, ones = tensor("y", y), dict(dim=[1, 1, 1, 1], stride=[1, 1, 1, 1], data_type=single)
        if kind == "bn_relu":
            scalars = {name: graph.tensor(name=name, is_pass_by_value=True, **ones) for name in ("eps", "momentum")}
            t |= scalars
            named = dict(in_running_mean="running_mean", in_running_var="running_var", scale="gamma", bias="beta")
            vectors = {argument: vector(name, k) for argument, name in named.items()}
            image, *rest = graph.batchnorm(input=image, epsilon=scalars["eps"], momentum=scalars["momentum"], **vectors)
            for name, out in zip(("mean", "inv_std", "next_mean", "next_var"), rest, strict=True):
                result(name, out, (1, k, 1, 1), single)
        else:
            image = normalised(image, k)
        if options.get("residual"):
            image = graph.add(a=image, b=tensor("z", y))
        result("out", graph.relu(input=image), y)
    graph.validate()
    graph.build_operation_graph()
    return graph, t


def cudnn_block(cupy: Any, width: int, size: int, fused: bool) -> tuple[Callable[[], None] | None, str]:
    """(all operations of a block in turn, each by its fastest plan; what cuDNN it is, or why there is none)."""
    from .gpu_layers import on_gpu

    if importlib.util.find_spec("cudnn") is None:
        return None, "nvidia-cudnn-frontend is not installed"
    cudnn: Any = importlib.import_module("cudnn")
    handle, chosen, notes = new_handle(cupy, cudnn), [], []
    for kind, about in steps(width, size, fused):
        graph, tensors = build(cudnn, kind, handle, **about)
        single = cudnn.data_type.FLOAT
        held, pointers = [], {}
        for name, t in tensors.items():
            if name in ("eps", "momentum"):  # by value, from the host
                held.append(np.full((1, 1, 1, 1), 1e-5 if name == "eps" else 0.1, np.float32))
                pointers[t] = held[-1].ctypes.data
                continue
            count = int(np.prod(t.get_dim()))
            held.append(cupy.random.default_rng(0).standard_normal(count, dtype=np.float32))
            if t.get_data_type() != single:
                held[-1] = held[-1].astype(np.dtype("bfloat16"))
            pointers[t] = held[-1].data.ptr
        calls, refused = plans(cupy, cudnn, graph, pointers, handle)
        if not calls:
            return None, f"{kind} {about['w']}: {refused}"
        times = on_gpu(cupy, {str(index): call for index, call in calls.items()}, seconds=0.2)
        best = min(times, key=lambda name: times[name].median)
        notes.append(f"{kind} {times[best].median * 1e6:.0f}")
        chosen.append((calls[int(best)], graph, held))

    def run() -> None:
        for call, *_ in chosen:
            call()

    return run, f"cuDNN {cudnn.backend_version()}, frontend {cudnn.__version__}; us: {', '.join(notes)}"
