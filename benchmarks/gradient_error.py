"""What rounding does to the gradients of a deep network, layer by layer: `python -m benchmarks gradient-error`.

The gradients of one training step (forward and backward, training mode) in float32, with Winograd's convolutions and
without (`minires.exact()`), in bfloat16 (`minires.autocast`), and PyTorch's beside them, each against minires' own in
float64: |g - g64| / |g64| of every convolution's filters, Euclidean norms. PyTorch's float64 gradients must be the same
as ours to 1e-9 before anything is reported. A ReLU whose input is almost 0 goes either way, and what follows is another
gradient: one such ReLU lifts the error of all layers before it from 1e-6 to 1e-3, whoever computes. The larger error
of Winograd's convolutions makes it more frequent.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .contestants import fill, missing
from .provenance import RESULTS, read, write

_PEER = "torch"
_SAME = 1e-9  # float64 against float64: of the norm
_STYLES = {  # legible in grey
    "minires": ("black", "-"),
    "minires exact": ("black", ":"),
    "minires bf16": ("black", "--"),
    "torch": ("0.6", "-"),
    "torch bf16": ("0.6", "--"),
}
Gradients = dict[str, np.ndarray]


def gradient_error(
    model: str = "resnet56",
    /,
    *,
    batch: int = 16,
    size: int = 32,
    draws: int = 9,
    peer: bool = True,
    output: Path | None = None,
) -> None:
    """Measure the error of every layer's gradient against float64, and draw it over depth.

    Parameters
    ----------
    model
        Its name.
    batch
        Images of a step.
    size
        Height and width of the images, which are noise.
    draws
        So many batches; the median of their errors counts.
    peer
        PyTorch too, where it is installed.
    output
        The CSV file to write, instead of one named after this machine in benchmarks/results; the picture lies beside.
    """
    from minires.kernels.cpu.jit import get_num_threads  # pyright: ignore[reportMissingImports]

    if min(batch, size, draws) < 1:
        raise ValueError(f"batch={batch}, size={size} and draws={draws} must be at least 1")
    lacking = missing(_PEER) if peer else ""
    if lacking:
        print(f"{_PEER}: skipped, {lacking} not installed")
    errors: dict[str, list[list[float]]] = {}
    names: list[str] = []
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        x, labels = rng.standard_normal((batch, 3, size, size)), rng.integers(0, 10, batch)
        wanted = _minires(model, x, labels, "float64", "exact")
        names = [name for name, g in wanted.items() if g.ndim == 4]
        for variant, gradients in _variants(model, x, labels, peer and not lacking, wanted):
            errors.setdefault(variant, []).append([_error(gradients[name], wanted[name]) for name in names])
    rows = [
        dict(model=model, batch=batch, size=size, draws=draws, variant=variant, depth=i + 1, layer=name)
        | dict(error=f"{median:.3e}", least=f"{least:.3e}", most=f"{most:.3e}")
        for variant, found in errors.items()
        for i, (name, median, least, most) in enumerate(
            zip(names, np.median(found, 0), np.min(found, 0), np.max(found, 0), strict=True)
        )
    ]
    print(f"{model}, {batch} images of {size}x{size}, relative error of the filters' gradients, median of {draws}:")
    print("variant           first layer   middle     last    median")
    for variant, found in errors.items():
        e = np.median(found, 0)
        print(f"{variant:<16}  {e[0]:>11.1e}  {e[len(e) // 2]:>7.1e}  {e[-1]:>7.1e}  {np.median(e):>8.1e}")
    group = ("model", "batch", "size")
    path = write("gradient-error", rows, get_num_threads(), output, group)
    picture = path.with_suffix(".png")
    draw_errors([row for row in read(path) if row["model"] == model], picture)
    print(f"written to {path} and {picture.name if path.parent == RESULTS else picture}")


def _variants(
    model: str, x: np.ndarray, labels: np.ndarray, peer: bool, wanted: Gradients
) -> list[tuple[str, Gradients]]:
    found = [
        ("minires", _minires(model, x, labels, "float32")),
        ("minires exact", _minires(model, x, labels, "float32", "exact")),
        ("minires bf16", _minires(model, x, labels, "float32", "bf16")),
    ]
    if peer:
        theirs = _torch(model, x, labels, "float64")
        for name, gradient in wanted.items():
            if not _error(theirs[name], gradient) < _SAME:
                raise RuntimeError(f"{name}: PyTorch's gradient in float64 is another: nothing is reported")
        found += [("torch", _torch(model, x, labels, "float32")), ("torch bf16", _torch(model, x, labels, "bfloat16"))]
    return found


def _minires(name: str, x: np.ndarray, labels: np.ndarray, dtype: str, how: str = "") -> Gradients:
    import minires
    from minires.models import create_model
    from minires.ops import cross_entropy

    ways: dict[str, Callable[[], Any]] = {
        "": contextlib.nullcontext,
        "exact": minires.exact,
        "bf16": lambda: minires.autocast("cpu", dtype=minires.bfloat16),
    }
    net = create_model(name)
    fill((key, p.array) for key, p in net.named_parameters())
    net.to(dtype=dtype)
    with ways[how]():
        loss = cross_entropy(net(minires.from_numpy(x.astype(dtype))), minires.from_numpy(labels))
    with minires.exact() if how == "exact" else contextlib.nullcontext():
        loss.backward()
    return {key: p.grad.array.astype(np.float64) for key, p in net.named_parameters() if p.grad is not None}


def _torch(name: str, x: np.ndarray, labels: np.ndarray, dtype: str) -> Gradients:
    from .torch_resnet import resnet

    torch = importlib.import_module("torch")
    stored = torch.float64 if dtype == "float64" else torch.float32
    net = resnet(torch, name)
    fill((key, p.detach().numpy()) for key, p in net.named_parameters())
    net.to(stored)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        out = net(torch.from_numpy(x).to(stored))
        loss = torch.nn.functional.cross_entropy(out, torch.from_numpy(labels))
    loss.backward()
    return {key: p.grad.double().numpy() for key, p in net.named_parameters()}


def _error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def draw_errors(rows: list[dict[str, str]], output: Path) -> None:
    """Draw the rows of one model: error over depth, a line a variant, the median of the draws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for variant, (color, style) in _STYLES.items():
        own = [row for row in rows if row["variant"] == variant]
        if own:
            depth = [int(row["depth"]) for row in own]
            axes.plot(depth, [float(row["error"]) for row in own], style, color=color, label=variant)
    where = rows[0]
    axes.set(yscale="log", xlabel="convolution, from the image on", ylabel="|g - g64| / |g64| of its filters")
    axes.set_title(
        f"Error of the gradients of {where['model']}: {where['batch']} images of {where['size']}x{where['size']}, "
        f"median of {where['draws']} draws",
        fontsize=11,
    )
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=len(_STYLES), fontsize=9, frameon=False)
    figure.savefig(output, dpi=150)
