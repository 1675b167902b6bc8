"""Units of `gpu_report` that run whole networks: training and inference beside PyTorch, graphs beside no graphs.

A contestant's name says what it does: amp, bfloat16 by autocast; graph, replayed as a CUDA graph; one_op, a block's
convolutions and BatchNorms as one op; fused, BatchNorm folded into weights; compiled, torch.compile with max-autotune,
which replays CUDA graphs too. Images lie on the GPU, channels-last, for both. TF32 is off.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from minires.kernels.timing import timing  # pyright: ignore[reportMissingImports]

Row = dict[str, Any]
SETUPS = {"resnet20:128": 32, "resnet20:512": 32, "resnet50:256": 224, "resnet18:256": 224, "resnet50:64": 224}
TRAINERS = (
    "minires_amp_one_op_graph",
    "minires_amp_graph",
    "torch_amp",
    "torch_amp_compiled",
    "minires_graph",
    "torch",
    "torch_compiled",
    "minires_amp",
    "minires",
)
PREDICTORS = (
    "minires_amp_fused_graph",
    "torch_amp",
    "torch_amp_compiled",
    "minires_fused_graph",
    "torch",
    "torch_compiled",
    "minires_amp",
    "minires",
)
REPLAYS = ("fp32", "amp", "amp_one_op", "loop_fp32", "loop_bf16", "loop_fp16")
STEPS = 1000  # of `replays`
_LEARNING: dict[str, Any] = dict(lr=0.1, momentum=0.9, weight_decay=1e-4)
_SECONDS, _SAMPLES = 10.0, 5  # measured for; samples at least, of 5 steps each
_WARM = 6  # calls before: more than a graph needs until it is captured


def training_names() -> list[str]:
    return [f"{library}:{setup}" for setup in SETUPS for library in TRAINERS]


def inference_names() -> list[str]:
    return [f"{library}:{setup}" for setup in SETUPS for library in PREDICTORS]


def training(argument: str) -> Iterator[Row]:
    """Images per second of training steps of one library: forward, backward, SGD. argument: "library:model:batch", and
    ":seconds" of measuring."""
    yield from _measured(argument, _our_step, _torch_step)


def inference(argument: str) -> Iterator[Row]:
    """Images per second of one library's forward pass in evaluation mode."""
    yield from _measured(argument, _our_forward, _torch_forward)


def _measured(argument: str, ours: Callable[..., Any], theirs: Callable[..., Any]) -> Iterator[Row]:
    library, model, batch, *rest = argument.split(":")
    seconds = float(rest[0]) if rest else _SECONDS
    is_ours = library.startswith("minires")
    if not is_ours and importlib.util.find_spec("torch") is None:
        yield {"library": library, "model": model, "skipped": "PyTorch is not installed"}
        return
    images, labels = _batch(int(batch), SETUPS[f"{model}:{batch}"])
    step, wait, version = (ours if is_ours else theirs)(library, model, images, labels)
    first = [_number(step()) for _ in range(_WARM)]
    if library.endswith("graph"):
        version += ", replayed"
    wait()
    samples: list[float] = []
    stop = time.perf_counter() + seconds
    while len(samples) < _SAMPLES or time.perf_counter() < stop:
        begin = time.perf_counter()
        for _ in range(5):
            result = step()
        wait()
        samples.append((time.perf_counter() - begin) / 5)
    t, n = timing(samples), int(batch)
    row = {"library": library, "model": model, "batch": n, "n": t.n, "images_per_s": round(n / t.median, 1)}
    row |= {"p20_ms": round(t.p20 * 1e3, 3), "median_ms": round(t.median * 1e3, 3), "p80_ms": round(t.p80 * 1e3, 3)}
    yield row | {"first": [round(v, 4) for v in first], "last": round(_number(result), 4), "version": version}


def _number(result: Any) -> float:
    """One number of a loss or of logits, in whichever library and precision."""
    return float(result.reshape(-1)[0])


def _batch(n: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, H, W) that lie channels-last, and labels."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((n, size, size, 3), dtype=np.float32).transpose(0, 3, 1, 2)
    return images, rng.integers(0, 10, n)


def network(model: str, one_op: bool = False) -> Any:
    """Ours, with the same first weights at every call, on the GPU."""
    import minires

    minires.manual_seed(0)
    classes = 10 if model == "resnet20" else 1000
    return minires.models.create_model(model, num_classes=classes, one_op_blocks=one_op).to("cuda")


def _our_step(library: str, model: str, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Any, str]:
    import minires

    step = training_step(network(model, "one_op" in library), "amp" in library, graph="graph" in library)[0]
    x, target = (minires.from_numpy(a).to("cuda") for a in (images, labels))
    return lambda: step(x, target).array, _synchronize, importlib.metadata.version("minires")


def training_step(net: Any, amp: bool, graph: bool) -> tuple[Callable[..., Any], Any]:
    """(a step on images and labels, its optimizer). Its call is a RuntimeError where a graph is wanted and refused."""
    import minires

    optimizer = minires.optim.SGD(net.parameters(), **_LEARNING, capturable=graph)

    def step(x: Any, target: Any) -> Any:
        optimizer.zero_grad()
        with minires.autocast("cuda", dtype=minires.bfloat16, enabled=amp):
            loss = minires.nn.functional.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        return loss

    return minires.cuda.make_graphed_step(step, note=_refuse) if graph else step, optimizer


def _our_forward(library: str, model: str, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Any, str]:
    import minires

    net = network(model).eval()
    if "fused" in library:
        net = minires.nn.fuse_for_inference(net)
    x = minires.from_numpy(images).to("cuda")

    def forward(x: Any) -> Any:
        with minires.no_grad(), minires.autocast("cuda", dtype=minires.bfloat16, enabled="amp" in library):
            return net(x)

    run = minires.cuda.make_graphed_step(forward, note=_refuse) if "graph" in library else forward
    return lambda: run(x).array, _synchronize, importlib.metadata.version("minires")


def _refuse(text: str) -> None:
    raise RuntimeError(text)  # a figure without the graph must not stand under its name


def _synchronize() -> None:
    cupy: Any = importlib.import_module("cupy")
    cupy.cuda.Device().synchronize()


def _torch_net(library: str, model: str, images: np.ndarray) -> tuple[Any, Any, Any, Any]:
    """(torch, the network, what is called, images)."""
    from .torch_resnet import resnet

    torch: Any = importlib.import_module("torch")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    net = resnet(torch, model).cuda().to(memory_format=torch.channels_last)
    run = torch.compile(net, mode="max-autotune") if library.endswith("compiled") else net
    return torch, net, run, torch.from_numpy(images).cuda().to(memory_format=torch.channels_last)


def _torch_step(library: str, model: str, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Any, str]:
    torch, net, run, x = _torch_net(library, model, images)
    optimizer = torch.optim.SGD(net.parameters(), **_LEARNING)
    target = torch.from_numpy(labels).cuda()

    def step() -> Any:
        with torch.autocast("cuda", torch.bfloat16, enabled="amp" in library):
            loss = torch.nn.functional.cross_entropy(run(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, torch.cuda.synchronize, torch.__version__


def _torch_forward(library: str, model: str, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Any, str]:
    torch, net, run, x = _torch_net(library, model, images)
    net.eval()

    def forward() -> Any:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled="amp" in library):
            return run(x)

    return forward, torch.cuda.synchronize, torch.__version__


def replays(argument: str) -> Iterator[Row]:
    """Replays beside steps without a graph, one after the other on the same batches, with a learning rate that changes
    and dropout: the first step at which loss or weights differ in a bit; raises where there is one. "loop_...": the
    step of `minires train`, whose update is stopped on the GPU where something is not finite."""
    import minires

    batches = [tuple(minires.from_numpy(a).to("cuda") for a in _batch(128, 32, seed)) for seed in range(4)]
    nets, steps, schedules, captured = [], [], [], []
    for graph in (False, True):
        net = minires.nn.Sequential(network("resnet20", "one_op" in argument), minires.nn.Dropout(0.1))
        make = _loop_side if argument.startswith("loop_") else _plain_side
        step, optimizer, whether = make(net, argument, graph)
        nets.append(net)
        steps.append(step)
        captured.append(whether)
        schedules.append(minires.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS))
    row: Row = {"setup": argument, "steps": STEPS, "first_different": None, "captured": False}
    for number in range(STEPS + _WARM):
        numbers, losses = minires.get_rng_state(), []
        for step, schedule in zip(steps, schedules, strict=True):
            minires.set_rng_state(numbers)  # both drop the same
            losses.append(step(*batches[number % len(batches)]))
            schedule.step()
        if losses[0] != losses[1] or (number % 100 == 0 and not _same(*nets)):
            row["first_different"] = number
            break
    row |= {"captured": captured[1](), "weights_equal": _same(*nets)}
    yield row
    if row["first_different"] is not None or not row["weights_equal"] or not row["captured"]:
        raise RuntimeError(f"replays are not what steps without a graph are: {row}")


Side = tuple[
    Callable[..., Any], Any, Callable[[], bool]
]  # a step, whose result can be compared; its optimizer; captured?


def _plain_side(net: Any, argument: str, graph: bool) -> Side:
    step, optimizer = training_step(net, "amp" in argument, graph)

    def compared(*batch: Any) -> bytes:
        return step(*batch).array.get().tobytes()

    return compared, optimizer, lambda: getattr(step, "captured", False)


def _loop_side(net: Any, argument: str, graph: bool) -> Side:
    from minires.train.optimizers import make_optimizer
    from minires.train.recipe import Recipe
    from minires.train.step import TrainStep

    precision: Any = argument.removeprefix("loop_")
    recipe = Recipe(device="cuda", precision=precision, cuda_graphs=graph, clip=5.0, label_smoothing=0.1)
    optimizer = make_optimizer(recipe, net)
    step = TrainStep(recipe, net, optimizer, note=_refuse)

    def compared(*batch: Any) -> str:
        return repr((step(0, *batch), step.scaler.get_scale()))

    return compared, optimizer, lambda: step.graph is not None and step.graph.captured


def _same(a: Any, b: Any) -> bool:
    """Whether two networks hold the same bits."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(x.cpu().numpy().tobytes() == y.cpu().numpy().tobytes() for x, y in pairs)
