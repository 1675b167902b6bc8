"""The units of work of `gpu_report`: each a generator of rows, run in a process of its own on a machine with a GPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from minires.kernels import registry  # pyright: ignore[reportMissingImports]
from minires.kernels.checking import Trial, check_case, dtypes_of  # pyright: ignore[reportMissingImports]
from minires.kernels.timing import timing  # pyright: ignore[reportMissingImports]

from .cudnn_peer import cudnn_conv
from .gpu_blocks import BLOCKS, blocks

Row = dict[str, Any]
_L2 = 256 << 20  # bytes written between calls: more than any second-level cache
_LEARNING: dict[str, Any] = dict(lr=0.1, momentum=0.9, weight_decay=1e-4)

# Convolutions of ResNet-50 at batch 256 and of ResNet-20 at batch 128: C, H = W, K, R = S, stride.
RESNET50 = {
    "stem": (3, 224, 64, 7, 2),
    "reduce56": (256, 56, 64, 1, 1),
    "same56": (64, 56, 64, 3, 1),
    "expand56": (64, 56, 256, 1, 1),
    "down28": (128, 56, 128, 3, 2),
    "same28": (128, 28, 128, 3, 1),
    "expand28": (128, 28, 512, 1, 1),
    "project28": (256, 56, 512, 1, 2),
    "same14": (256, 14, 256, 3, 1),
    "expand14": (256, 14, 1024, 1, 1),
    "same7": (512, 7, 512, 3, 1),
    "expand7": (512, 7, 2048, 1, 1),
}
RESNET20 = {"cifar16": (16, 32, 16, 3, 1), "cifar32": (32, 16, 32, 3, 1), "cifar64": (64, 8, 64, 3, 1)}
BATCH = {**dict.fromkeys(RESNET50, 256), **dict.fromkeys(RESNET20, 128)}


@dataclass(frozen=True)
class Section:
    """arguments() of the units; run(argument) yields rows; seconds that one may take."""

    arguments: Callable[[], list[str]]
    run: Callable[[str], Iterator[Row]]
    seconds: float


def run_unit(name: str) -> Iterator[Row]:
    """The rows of the unit "section/argument"."""
    section, _, argument = name.partition("/")
    yield from SECTIONS[section].run(argument)


def gpu_name() -> str:
    """The name of the GPU; RuntimeError says what is missing where there is none."""
    from minires.device import array_module, device

    xp: Any = array_module(device("cuda"))
    return xp.cuda.runtime.getDeviceProperties(0)["name"].decode()


def _kernel_names() -> list[str]:
    return [f"{k.problem.name}:{k.name}" for k in registry.kernels(device="cuda")]


def _kernel(name: str) -> Any:
    problem, _, own = name.partition(":")
    return next(k for k in registry.kernels(problem, "cuda") if k.name == own)


def _test_cases(kernel: Any) -> list[Any]:
    return [case for case in kernel.problem.cases if "test" in case.tags]


def conformance(argument: str) -> Iterator[Row]:
    """The kernel's results on the GPU beside the interpreter's: cases that are equal bit for bit, and the largest
    difference of the others, in units of the bound."""
    from minires.kernels.cuda.gpu import from_host  # pyright: ignore[reportMissingImports]

    kernel = _kernel(argument)
    there = from_host(kernel)
    for dtype in dtypes_of(kernel):
        equal = cases = 0
        worst = 0.0
        for case in _test_cases(kernel):
            trial = Trial(kernel.problem, case, dtype)
            if trial.suits(kernel):
                real, interpreted = trial.run(there, "channels_last"), trial.run(kernel, "channels_last")
                cases += 1
                same = all(map(_same, real, interpreted))
                equal += same
                if not same:
                    worst = max(worst, trial.compare(real, kernel))
        yield {"kernel": argument, "dtype": dtype, "cases": cases, "bitwise_equal": equal, "worst_eps": worst}


def _same(a: Any, b: Any) -> bool:
    return a is b or np.asarray(a).tobytes() == np.asarray(b).tobytes()


def check(argument: str) -> Iterator[Row]:
    """The kernel on the GPU against its definition, in every dtype and layout; raises where it is wrong."""
    from minires.kernels.cuda.gpu import from_host  # pyright: ignore[reportMissingImports]

    kernel = from_host(_kernel(argument))
    results = [result for case in _test_cases(kernel) for result in check_case(kernel, case)]
    wrong = [result for result in results if not result.ok]
    worst = max((result.worst for result in results if result.ok), default=0.0)
    yield {"kernel": argument, "checks": len(results), "wrong": len(wrong), "worst_eps": round(worst, 3)}
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(results)} checks fail, the first: {wrong[0]}")


DIRECTIONS = ("fprop", "dgrad", "wgrad")


def _layer_names() -> list[str]:
    return [
        f"{layer}:{direction}:{dtype}"
        for dtype in ("float32", "bfloat16")
        for layer in (*RESNET50, *RESNET20)
        for direction in DIRECTIONS
    ]


def layers(argument: str) -> Iterator[Row]:
    """A convolution by every kernel of ours from step 3 on, and by cuDNN's plans; each is compared with step 3's result
    before it is timed."""
    layer, direction, dtype = argument.split(":")
    if dtype == "float32":
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # fp32 means fp32 on both sides
    cupy: Any = importlib.import_module("cupy")
    n, (c, size, k, taps, stride) = BATCH[layer], (RESNET50 | RESNET20)[layer]
    arrays, params, flops = _conv_inputs(cupy, direction, dtype, n, c, size, k, taps, stride)
    calls: dict[str, Callable[[], Any]] = {}
    allowed: dict[str, float] = {}
    for kernel in registry.kernels(f"conv2d_{direction}", "cuda"):
        if kernel.step >= 3 and kernel.takes(*arrays, **params):
            allowed[kernel.name] = max(1e-4, kernel.error_factor * 2.0**-22)
            calls[kernel.name] = lambda kernel=kernel: kernel(*arrays, **params)
    wanted = next(iter(calls.values()))()
    scale = float(cupy.abs(wanted.astype("float32")).max())
    plans, reason = cudnn_conv(cupy, direction, dtype, arrays, params)
    errors = {}
    for name, call in list((calls | plans).items()):
        off = float(cupy.abs(call().astype("float32") - wanted.astype("float32")).max()) / scale
        errors[name] = off
        if not off < (0.02 if dtype == "bfloat16" else allowed.get(name, 1e-4)):
            calls.pop(name, None)
            plans.pop(name, None)
            yield {"layer": layer, "direction": direction, "dtype": dtype, "kernel": name, "wrong_by": off}
    times = on_gpu(cupy, calls | plans, seconds=2.0)
    best = min((t.median for name, t in times.items() if name in plans), default=None)
    for name, t in sorted(times.items(), key=lambda item: item[1].median)[:8]:
        row = {"layer": layer, "direction": direction, "dtype": dtype, "kernel": name, "n": t.n}
        row |= {"median_us": round(t.median * 1e6, 2), "p20_us": round(t.p20 * 1e6, 2), "p80_us": round(t.p80 * 1e6, 2)}
        row |= {"tflop_per_s": round(flops / t.median / 1e12, 2), "relative_difference": float(f"{errors[name]:.2g}")}
        yield row | {"cudnn_best_over_this": None if best is None else round(best / t.median, 3), "cudnn": reason}


def _conv_inputs(cupy: Any, direction: str, dtype: str, n: int, c: int, size: int, k: int, taps: int, stride: int):
    """(arrays, params, flops), activations channels-last in memory, random and of a size that keeps sums near 1."""
    pad, rng = taps // 2, cupy.random.default_rng(0)
    p = (size + 2 * pad - taps) // stride + 1

    def draw(*shape: int, scale: float = 1.0) -> Any:
        values = (scale * rng.standard_normal(shape, dtype=np.float32)).astype(np.dtype(dtype))
        return values.transpose(0, 3, 1, 2)

    x, dy = (lambda: draw(n, size, size, c)), (lambda: draw(n, p, p, k))
    w = cupy.ascontiguousarray(draw(k, taps, taps, c, scale=(c * taps * taps) ** -0.5))
    geometry = dict(stride=(stride, stride), padding=(pad, pad), dilation=(1, 1), groups=1)
    flops = 2 * n * p * p * k * c * taps * taps
    if direction == "fprop":
        return (x(), w), geometry, flops
    if direction == "dgrad":
        return (dy(), w), geometry | dict(input_hw=(size, size)), flops
    return (x(), dy()), geometry | dict(kernel_hw=(taps, taps)), flops


def on_gpu(cupy: Any, calls: dict[str, Callable[[], Any]], seconds: float, least: int = 5) -> dict[str, Any]:
    """Seconds per call by events on the GPU, round by round, each after the second-level cache was overwritten."""
    waste = cupy.empty(_L2, cupy.uint8)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    cupy.cuda.Device().synchronize()
    stop = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < stop:
        for name, call in calls.items():
            waste.fill(rounds & 255)
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record()
            call()
            end.record()
            end.synchronize()
            samples[name].append(cupy.cuda.get_elapsed_time(begin, end) / 1e3)
        rounds += 1
    return {name: timing(s) for name, s in samples.items()}


TRAINING = {"resnet20:128": 32, "resnet20:512": 32, "resnet18:256": 224, "resnet50:64": 224, "resnet50:256": 224}
LIBRARIES = (
    "minires",
    "minires_amp",
    "minires_amp_graph",
    "minires_amp_one_op_graph",
    "torch",
    "torch_amp",
    "torch_amp_compiled",
)


def training(argument: str) -> Iterator[Row]:
    """Images per second of training steps of one library: forward, backward, SGD, on images that are on the GPU.

    amp: bfloat16 by autocast. graph: the step replayed as a CUDA graph. one_op: the blocks' convolutions with their
    BatchNorms as one op."""
    library, model, batch = argument.split(":")
    ours = library.startswith("minires")
    if not ours and importlib.util.find_spec("torch") is None:
        yield {"library": library, "model": model, "skipped": "PyTorch is not installed"}
        return
    size, n = TRAINING[f"{model}:{batch}"], int(batch)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((n, 3, size, size)).astype(np.float32)
    labels = rng.integers(0, 10, n)
    step, wait, version = (_our_step if ours else _torch_step)(library, model, images, labels)
    losses = [float(step()) for _ in range(3)]
    wait()
    samples = []
    stop = time.perf_counter() + 10
    while len(samples) < 5 or time.perf_counter() < stop:
        begin = time.perf_counter()
        for _ in range(5):
            loss = step()
        wait()
        samples.append((time.perf_counter() - begin) / 5)
    t = timing(samples)
    row = {"library": library, "model": model, "batch": n, "n": t.n, "images_per_s": round(n / t.median, 1)}
    yield row | {"first_losses": [round(v, 4) for v in losses], "last_loss": round(float(loss), 4), "version": version}


def _our_step(library: str, model: str, images: np.ndarray, labels: np.ndarray):
    import minires

    cupy: Any = importlib.import_module("cupy")
    minires.manual_seed(0)
    options: dict[str, Any] = dict(num_classes=10 if model == "resnet20" else 1000, one_op_blocks="one_op" in library)
    net = minires.models.create_model(model, **options).to("cuda")
    optimizer = minires.optim.SGD(net.parameters(), **_LEARNING)
    x, target = minires.from_numpy(images).to("cuda"), minires.from_numpy(labels).to("cuda")

    def step(x: Any, target: Any) -> Any:
        optimizer.zero_grad()
        with minires.autocast("cuda", dtype=minires.bfloat16, enabled="amp" in library):
            loss = minires.nn.functional.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        return loss

    run = minires.cuda.make_graphed_step(step) if library.endswith("graph") else step
    return lambda: run(x, target).array, cupy.cuda.Device().synchronize, importlib.metadata.version("minires")


def _torch_step(library: str, model: str, images: np.ndarray, labels: np.ndarray):
    from .torch_resnet import resnet

    torch: Any = importlib.import_module("torch")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    net = resnet(torch, model)
    net = net.cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), **_LEARNING)
    x = torch.from_numpy(images).cuda().to(memory_format=torch.channels_last)
    target, run = torch.from_numpy(labels).cuda(), net
    if library.endswith("compiled"):
        run = torch.compile(net, mode="max-autotune")

    def step() -> Any:
        with torch.autocast("cuda", torch.bfloat16, enabled="amp" in library):
            loss = torch.nn.functional.cross_entropy(run(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, torch.cuda.synchronize, torch.__version__


def end_to_end(argument: str) -> Iterator[Row]:
    """`minires train` of a shipped recipe on the GPU; the images come from $MINIRES_DATA, decoded first."""
    from minires.train.loop import train
    from minires.train.recipe import load_recipe

    recipe, seed = argument.split(":")
    data = Path(os.environ.get("MINIRES_DATA", ".")) / "cifar10-jpg.tar.xz"
    if not data.exists():
        yield {"recipe": recipe, "skipped": "MINIRES_DATA names no folder with cifar10-jpg.tar.xz"}
        return
    out = Path(os.environ.get("MINIRES_RUNS", "runs")) / f"gpu-report-{recipe}-{seed}-{os.getpid()}"
    changes = dict(dataset="folder", data_dir=str(data), device="cuda", seed=int(seed), out=str(out))
    summary = train(load_recipe(recipe, changes))
    row = {"recipe": recipe, "seed": int(seed), "test_accuracy": summary.test_accuracy, "seconds": summary.seconds}
    yield row | {"images_per_s": summary.images_per_second, "steps": summary.steps}


def _training_names() -> list[str]:
    return [f"{library}:{setup}" for setup in TRAINING for library in LIBRARIES]


SECTIONS = {
    "conformance": Section(_kernel_names, conformance, 300),
    "check": Section(_kernel_names, check, 120),
    "blocks": Section(lambda: list(BLOCKS), blocks, 240),
    "layers": Section(_layer_names, layers, 90),
    "training": Section(_training_names, training, 240),
    "end_to_end": Section(lambda: ["cifar10-short:0", "cifar10-short:1"], end_to_end, 900),
}

__all__ = ["SECTIONS", "Section", "gpu_name", "on_gpu", "run_unit"]
