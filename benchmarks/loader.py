"""Images per second of the loader, alone and beside a training step: `python -m benchmarks.loader`.

Alone: whole batches from memory (Augment), and images decoded one by one (JPEG files, crop, flip). Beside a step of
training: how long the step takes, and how long it waited for its batch.
"""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import cyclopts
import numpy as np
from minires.kernels.cpu.jit import get_num_threads  # pyright: ignore[reportMissingImports]
from minires.kernels.timing import timing  # pyright: ignore[reportMissingImports]

import minires
from minires.data import DataLoader, Dataset, ImageDataset, transforms
from minires.data.decode import open_image

from .provenance import write

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SETUPS = ((0, "thread"), (1, "thread"), (2, "thread"), (1, "process"), (2, "process"))
CLASSES = tuple("0123456789")


class JpegFiles(Dataset):
    """JPEG files in memory, decoded and augmented one by one, as from a folder."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        from PIL import Image

        size = images.shape[1]
        steps = [transforms.RandomCrop(size, size // 8), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])
        self.files, self.labels = [], labels.tolist()
        for image in images:
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "JPEG")
            self.files.append(stream.getvalue())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return self.transform(open_image(self.files[index], "a file in memory")), self.labels[index]


def loader(
    model: str = "resnet20",
    /,
    *,
    batch: int = 128,
    size: int = 32,
    images: int = 5120,
    steps: int = 10,
    output: Path | None = None,
) -> None:
    """Time the loader alone, then beside training steps.

    Parameters
    ----------
    model
        Name of the model that is trained.
    batch
        Images per batch.
    size
        Their height and width.
    images
        How many images an epoch has; the loader alone is timed over one, after a first batch that is not counted.
    steps
        Training steps per measurement, after a first one that is not counted.
    output
        The CSV file to write, instead of one named after this machine in benchmarks/results.
    """
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, size, size, 3), dtype=np.uint8)
    labels = rng.integers(0, len(CLASSES), images)
    augment = transforms.Augment(MEAN, STD, padding=size // 8, flip=True, cutout=size // 4)
    sources = {
        "memory": ImageDataset(pixels, labels, CLASSES, transform=augment),
        "jpeg": JpegFiles(pixels, labels),
    }
    rows = []
    train = _Trainer(model)
    for source, dataset in sources.items():
        for workers, kind in SETUPS:
            options: dict[str, Any] = {"num_workers": workers, "workers": kind, "shuffle": True, "drop_last": True}
            alone = _waits(DataLoader(dataset, batch, generator=0, **options), None, images // batch - 1)
            each = sum(alone) / len(alone)  # the mean: workers bring batches in bursts
            beside = DataLoader(dataset, batch, generator=0, **options)
            whole: list[float] = []
            waited = timing(_waits(beside, train, steps, whole))
            step = timing(whole)
            name = f"{workers} {kind}" if workers else "the loop itself"
            row = dict(model=model, batch=batch, size=size, source=source, workers=workers, kind=kind)
            row |= dict(batches=len(alone), ms_per_batch=f"{each * 1e3:.2f}", steps=step.n)
            row |= dict(step_ms=f"{step.median * 1e3:.1f}", waited_ms=f"{waited.median * 1e3:.2f}")
            rows.append(row)
            print(
                f"{source:7} {name:16} {each * 1e3:8.2f} ms a batch, {batch / each:9.0f} images/s alone; "
                f"a step with it {step.median * 1e3:7.1f} ms, of which it waited {waited.median * 1e3:6.2f}"
            )
    print(f"written to {write('loader', rows, get_num_threads(), output)}")


class _Trainer:
    """A model and its optimizer; calling it with a batch trains a step."""

    def __init__(self, model: str):
        minires.manual_seed(0)
        self.model = minires.models.create_model(model, num_classes=len(CLASSES))
        self.optimizer = minires.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def __call__(self, images: Any, labels: Any) -> None:
        self.optimizer.zero_grad()
        minires.nn.functional.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()


def _waits(data: DataLoader, train: Any, count: int, whole: list[float] | None = None) -> list[float]:
    """Seconds until each of `count` batches was there; `whole` gets those of batch and training together."""
    waits, batches = [], iter(data)
    for i in range(count + 1):
        start = time.perf_counter()
        batch = next(batches)
        ready = time.perf_counter()
        if train is not None:
            train(*batch)
        if i:  # the first one starts the workers and compiles the kernels
            waits.append(ready - start)
            if whole is not None:
                whole.append(time.perf_counter() - start)
    return waits


if __name__ == "__main__":
    cyclopts.run(loader)
