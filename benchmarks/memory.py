"""What activation checkpointing saves in memory and costs in time, here and in PyTorch: `python -m benchmarks memory`.

Every row has a process of its own: its peak resident memory, and the seconds of a training step (forward, backward, SGD
with momentum), float32, on the CPU. The rows of a network take their steps in turn, so that a busy machine disturbs all
alike. The gradients of the first step must be the same in all rows of minires, bit for bit, before anything is timed.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .contestants import fill, missing
from .memory_use import peak_bytes, reset_peak, resident_bytes
from .provenance import write
from .worker import Worker, serve, take_channel

DEFAULT = ("resnet110:128:0,1,2,3", "resnet1202:32:0,1,5,10")
PEER = "torch_channels_last"
_MIB = 2**20
_HEAD = "model       batch  library              blocks again  peak MiB  of the step  of plain  s/step  of plain"


def memory(*cases: str, steps: int = 7, peer: bool = True, output: Path | None = None) -> None:
    """Measure training steps with and without activation checkpointing.

    Parameters
    ----------
    cases
        MODEL:BATCH:N,N,... where N is how many blocks at a time are computed again in backward; 0: none.
    steps
        Timed steps per row; one more comes before them.
    peer
        PyTorch (channels-last) too, where it is installed.
    output
        The CSV file to write, instead of one named after this machine in benchmarks/results.
    """
    from minires.kernels.timing import timing  # pyright: ignore[reportMissingImports]

    threads, files = 0, set()
    libraries = ["minires"]
    if peer and not (lacking := missing(PEER)):
        libraries.append(PEER)
    elif peer:
        print(f"{PEER}: skipped, {lacking} not installed")
    print(_HEAD)
    for case in cases or DEFAULT:
        model, batch, segments = _parsed(case)
        heads = [(library, segment) for library in libraries for segment in segments]
        workers = [
            Worker("benchmarks.memory", "--worker", library, model, batch, segment) for library, segment in heads
        ]
        try:
            gradients = [worker.read()["gradients"] for worker in workers]
            if len(set(gradients[: len(segments)])) > 1:
                raise RuntimeError(f"{case}: the gradients are not the same: nothing is measured")
            seconds: list[list[float]] = [[] for _ in workers]
            for _ in range(steps):
                for worker, spent in zip(workers, seconds, strict=True):
                    spent.append(worker.ask(do="step")["seconds"])
            found = [worker.ask(do="finish") for worker in workers]
        finally:
            for worker in workers:
                worker.close()
        plain: dict[str, tuple[float, float]] = {}  # by library: bytes and seconds without checkpointing
        rows = []
        for (library, segment), spent, answer in zip(heads, seconds, found, strict=True):
            threads, t = answer["threads"], timing(spent)
            step_bytes = answer["peak"] - answer["before"]
            if segment == 0:
                plain[library] = (step_bytes, t.median)
            of = plain.get(library)
            rows.append(
                dict(model=model, batch=batch, library=library, blocks_again=segment)
                | dict(peak_mib=round(answer["peak"] / _MIB, 1), step_mib=round(step_bytes / _MIB, 1))
                | dict(median_s=round(t.median, 4), p20_s=round(t.p20, 4), p80_s=round(t.p80, 4), n=t.n)
                | dict(memory_of_plain=round(step_bytes / of[0], 3) if of else "")
                | dict(time_of_plain=round(t.median / of[1], 3) if of else "")
            )
            print(_line(rows[-1]), flush=True)
        files.add(write("memory", rows, threads, output, group=("model", "batch")))
    print(f"written to {', '.join(map(str, files))}")


def _parsed(case: str) -> tuple[str, int, list[int]]:
    try:
        model, batch, segments = case.split(":")
        return model, int(batch), [int(segment) for segment in segments.split(",")]
    except ValueError:
        raise ValueError(f"case {case!r} must be MODEL:BATCH:N,N,..., such as {DEFAULT[0]}") from None


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['model']:<10}  {row['batch']:>5}  {row['library']:<19}  {row['blocks_again'] or '-':>12}"
        f"  {row['peak_mib']:>8,.0f}  {row['step_mib']:>11,.0f}  {row['memory_of_plain']:>8}"
        f"  {row['median_s']:>6.2f}  {row['time_of_plain']:>8}"
    )


def _work(channel: Any, library: str, model: str, batch: int, segment: int) -> None:
    """What a worker does. before: bytes resident before the first whole step, weights and optimizer included."""
    make = _minires if library == "minires" else _torch
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((batch, 3, 32, 32)).astype(np.float32), rng.integers(0, 10, batch)
    backward, update, gradients, threads = make(model, segment)
    backward(images[:2], labels[:2])  # compiles, or loads what was compiled
    update()  # makes the optimizer's buffers
    gc.collect()
    before = resident_bytes()
    reset_peak()
    backward(images, labels)
    digest = hashlib.sha256()
    for gradient in gradients():
        digest.update(gradient.tobytes())

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        if message["do"] == "finish":
            return {"peak": peak_bytes(), "before": before, "threads": threads}
        start = time.perf_counter()
        backward(images, labels)
        update()
        return {"seconds": time.perf_counter() - start}

    serve({"gradients": digest.hexdigest()}, answer, channel)


# Each makes (backward of a batch, update, gradients, number of threads).


def _minires(name: str, segment: int) -> tuple[Callable, Callable, Callable, int]:
    from minires.kernels.cpu.jit import get_num_threads  # pyright: ignore[reportMissingImports]

    import minires
    from minires.models import create_model
    from minires.ops import cross_entropy
    from minires.optim import SGD

    net = create_model(name, checkpoint_blocks=segment)
    fill((key, p.array) for key, p in net.named_parameters())
    parameters = list(net.parameters())
    optimizer = SGD(parameters, 0.1, momentum=0.9)

    def backward(images: np.ndarray, labels: np.ndarray) -> None:
        optimizer.zero_grad()
        cross_entropy(net(minires.from_numpy(images)), minires.from_numpy(labels)).backward()

    return backward, optimizer.step, lambda: [p.grad.array for p in parameters if p.grad is not None], get_num_threads()


def _torch(name: str, segment: int) -> tuple[Callable, Callable, Callable, int]:
    import importlib

    from .torch_resnet import resnet

    torch, again = importlib.import_module("torch"), importlib.import_module("torch.utils.checkpoint").checkpoint
    net = resnet(torch, name)
    fill((key, p.detach().numpy()) for key, p in net.named_parameters())
    net = net.to(memory_format=torch.channels_last)
    if segment:
        for layer in (net.layer1, net.layer2, net.layer3):
            blocks = list(layer)
            parts = [torch.nn.Sequential(*blocks[i : i + segment]) for i in range(0, len(blocks), segment)]
            layer.forward = functools.partial(_recomputed, again, parts)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)

    def backward(images: np.ndarray, labels: np.ndarray) -> None:
        optimizer.zero_grad()
        x = torch.from_numpy(images).to(memory_format=torch.channels_last)
        torch.nn.functional.cross_entropy(net(x), torch.from_numpy(labels)).backward()

    return backward, optimizer.step, lambda: [p.grad.numpy() for p in net.parameters()], torch.get_num_threads()


def _recomputed(again: Callable, parts: list[Any], x: Any) -> Any:
    for part in parts:
        x = again(part, x, use_reentrant=False)
    return x


if __name__ == "__main__":
    stream = take_channel()
    _, own, what, *rest = sys.argv[1:]
    _work(stream, own, what, *map(int, rest))
