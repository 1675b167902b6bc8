"""Images per second of a training step, beside PyTorch: each library in a process of its own, measured in turn.

All start from the same weights and images, and the losses of their first steps must agree before anything is timed.
"""

from __future__ import annotations

import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from minires.kernels.cpu.jit import get_num_threads  # pyright: ignore[reportMissingImports]
from minires.kernels.timing import timing  # pyright: ignore[reportMissingImports]

from .peers import load_torch
from .provenance import write

LEARNING: dict[str, Any] = dict(lr=0.1, momentum=0.9, weight_decay=1e-4)
_PAUSE = 0.5  # seconds in which the threads of the library measured before stop spinning
SETUPS = ("minires", "torch", "torch_channels_last")


def networks(
    model: str = "resnet20",
    /,
    *,
    batch: int = 128,
    size: int = 32,
    rounds: int = 10,
    steps: int = 5,
    output: Path | None = None,
) -> None:
    """Time a training step (forward, backward, SGD) of a network, float32, on the CPU.

    Parameters
    ----------
    model
        Name of the model; beside PyTorch only the CIFAR ResNets (resnet20, resnet32, ...).
    batch
        Images per step.
    size
        Their height and width.
    rounds
        How often each library is measured, in turn.
    steps
        Training steps per measurement.
    output
        The CSV file to write, instead of one named after this machine in benchmarks/results.
    """
    threads = get_num_threads()
    setups = SETUPS if load_torch(threads) is not None else SETUPS[:1]
    workers = {name: _Worker(name, model, batch, size, threads) for name in setups}
    try:
        losses = {name: worker.read() for name, worker in workers.items()}
        print("first losses: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
        if max(losses.values()) - min(losses.values()) > 1e-3:
            raise RuntimeError("the libraries do not compute the same network: nothing is timed")
        samples: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                samples[name].append(worker.measure(steps))
    finally:
        for worker in workers.values():
            worker.close()
    rows = []
    for name, seconds in samples.items():
        t = timing(seconds)
        speeds = {"median": batch / t.median, "p20": batch / t.p80, "p80": batch / t.p20}
        columns = {f"{which}_images_per_s": f"{speed:.1f}" for which, speed in speeds.items()}
        rows.append(dict(model=model, batch=batch, size=size, library=name, n=t.n) | columns)
        print(f"{name:22} {speeds['median']:8.1f} images/s  ({speeds['p20']:.1f} to {speeds['p80']:.1f})")
    print(f"written to {write('networks', rows, threads, output)}")


class _Worker:
    """A process that trains when told to, and sleeps in between."""

    def __init__(self, *arguments: object):
        command = [sys.executable, "-m", "benchmarks.networks", *map(str, arguments)]
        folder = Path(__file__).parent.parent
        self.process = subprocess.Popen(
            command, cwd=folder, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def read(self) -> float:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended: {' '.join(map(str, self.process.args))}")  # pyright: ignore
        return float(line)

    def measure(self, steps: int) -> float:
        """Seconds per step."""
        assert self.process.stdin is not None
        time.sleep(_PAUSE)
        print(steps, file=self.process.stdin, flush=True)
        return self.read()

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def _fill(parameters: Any) -> None:
    """The same parameters in every library: weights drawn from the parameter's name, biases 0."""
    for name, array in parameters:
        if name.endswith("bias"):
            array[...] = 0
        elif array.ndim > 1:
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            array[...] = rng.standard_normal(array.shape) * (2 / array[0].size) ** 0.5


def _minires_step(model_name: str, images: np.ndarray, labels: np.ndarray) -> Any:
    import minires

    model = minires.models.create_model(model_name, num_classes=10)
    _fill((name, p.array) for name, p in model.named_parameters())
    optimizer = minires.optim.SGD(model.parameters(), **LEARNING)
    x, target = minires.from_numpy(images), minires.from_numpy(labels)

    def step() -> float:
        loss = minires.nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _torch_step(torch: Any, model_name: str, images: np.ndarray, labels: np.ndarray, channels_last: bool) -> Any:
    from .torch_resnet import cifar_resnet

    model = cifar_resnet(torch, int(model_name.removeprefix("resnet")))
    _fill((name, p.detach().numpy()) for name, p in model.named_parameters())
    x, target = torch.from_numpy(images), torch.from_numpy(labels)
    if channels_last:
        model, x = (thing.to(memory_format=torch.channels_last) for thing in (model, x))
    optimizer = torch.optim.SGD(model.parameters(), **LEARNING)

    def step() -> float:
        loss = torch.nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _work(library: str, model: str, batch: int, size: int, threads: int) -> None:
    """Print the loss of the first step; then, for each number of steps on stdin, the seconds per step."""
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((batch, 3, size, size)).astype(np.float32), rng.integers(0, 10, batch)
    if library == "minires":
        step = _minires_step(model, images, labels)
    else:
        step = _torch_step(load_torch(threads), model, images, labels, library.endswith("channels_last"))
    print(step(), flush=True)
    step()
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        print((time.perf_counter() - start) / int(line), flush=True)


if __name__ == "__main__":
    _work(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
