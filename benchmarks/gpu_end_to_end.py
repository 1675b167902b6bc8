"""Unit of `gpu_report`: a shipped recipe on CIFAR-10, from images to accuracy, by minires and by PyTorch.

PyTorch's side is a training loop as one would write it for a GPU: images as bytes on the GPU, cropped and mirrored
there by one gather per batch, channels-last, autocast to bfloat16, fused SGD, no wait for the GPU within an epoch;
`torch_compiled` compiles forward and loss by torch.compile with max-autotune, which replays CUDA graphs. Both sides
begin with the same weights and images, decoded before; the order of images and their augmentation are drawn by each
library's own generator. Seconds are those of the whole run: compilation, training, and the judgement of every epoch.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
LIBRARIES = ("minires", "torch_compiled", "torch")
RUNS = ("cifar10-short:0:bf16", "cifar10-short:1:bf16", "cifar10-short:2:bf16", "cifar10-short:0:fp32")
# The fields of a recipe that `torch_run` follows, or that change nothing in what it computes.
_FOLLOWED = "model dataset data_dir image_size shift flip epochs steps batch_size lr momentum nesterov weight_decay "
_FOLLOWED += "warmup label_smoothing seed device precision cuda_graphs workers eval_every out name expected"
_JUDGED = 2000  # test images per batch


def end_to_end_names() -> list[str]:
    return [f"{library}:{run}" for run in RUNS for library in LIBRARIES]


def end_to_end(argument: str) -> Iterator[Row]:
    """A row with the accuracy that the run ended with, the whole run's seconds, and those until an epoch was at least
    as accurate as the worst of the recipe's measured runs (None: never)."""
    from minires.train.images import open_images
    from minires.train.recipe import load_recipe

    library, name, seed, precision = argument.split(":")
    about = {"library": library, "recipe": name, "seed": int(seed), "precision": precision}
    data = Path(os.environ.get("MINIRES_DATA", ".")) / "cifar10-jpg.tar.xz"
    if not data.exists():
        yield about | {"skipped": "MINIRES_DATA names no folder with cifar10-jpg.tar.xz"}
        return
    if library != "minires" and importlib.util.find_spec("torch") is None:
        yield about | {"skipped": "PyTorch is not installed"}
        return
    out = Path(os.environ.get("MINIRES_RUNS", "runs")) / f"gpu-report-{argument.replace(':', '-')}-{os.getpid()}"
    changes: dict[str, Any] = dict(dataset="folder", data_dir=str(data), device="cuda", seed=int(seed), out=str(out))
    recipe = load_recipe(name, changes | dict(precision=precision, cuda_graphs=True))
    wanted = worst_expected(load_recipe(name).expected)
    begun = time.perf_counter()
    open_images(recipe)  # decodes, unless the cache has them; the run finds them there
    about |= {"wanted": wanted, "opening_seconds": round(time.perf_counter() - begun, 2)}
    yield about | (our_run(recipe, wanted) if library == "minires" else torch_run(recipe, wanted, library))


def worst_expected(text: str) -> float:
    """The share that the least accurate of a recipe's measured runs reached: "85.34 to 85.63 %" says 0.8534.

    ValueError where the recipe's `expected` names no such range.
    """
    found = re.search(r"(\d+\.\d+) to \d+\.\d+ %", text)
    if not found:
        raise ValueError(f"expected={text!r} names no range of accuracies, such as '85.34 to 85.63 %'")
    return float(found[1]) / 100


def our_run(recipe: Any, wanted: float) -> Row:
    """`minires train`, with CUDA graphs."""
    from minires.train.loop import train

    notes: list[str] = []
    epochs: list[tuple[float, float]] = []

    def on_epoch(record: Any) -> None:
        if record.test_accuracy is not None:
            epochs.append((record.seconds, record.test_accuracy))

    summary = train(recipe, on_epoch=on_epoch, on_note=notes.append)
    row = _row(summary.test_accuracy, summary.seconds, summary.first_step_seconds, summary.steps, epochs, wanted)
    return row | {"images_per_s": round(summary.images_per_second, 1), "notes": [n for n in notes if "graphs" in n]}


def _row(accuracy: float, seconds: float, first: float, steps: int, epochs: list, wanted: float) -> Row:
    reached = next((round(at, 2) for at, judged in epochs if judged >= wanted), None)
    row = {"test_accuracy": round(accuracy, 4), "seconds": round(seconds, 2), "seconds_to_wanted": reached}
    return row | {"first_step_seconds": round(first, 2), "steps": steps}


def torch_run(recipe: Any, wanted: float, library: str, progress: Any = None) -> Row:
    """The recipe in PyTorch, on the recipe's device. progress: called with the loss of every epoch.

    ValueError for a recipe with settings that this loop does not know.
    """
    torch: Any = importlib.import_module("torch")
    _refuse_unknown(recipe)
    begun = time.perf_counter()
    where = torch.device(recipe.device)
    if where.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 on both sides
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(recipe.seed)
    train, test = _on_device(torch, recipe, where)
    net = _network(torch, recipe, len(train.classes)).to(where, memory_format=torch.channels_last)
    mixed = recipe.precision == "bf16"

    def loss_of(images: Any, labels: Any) -> Any:
        with torch.autocast(where.type, torch.bfloat16, enabled=mixed):
            return torch.nn.functional.cross_entropy(net(images), labels, label_smoothing=recipe.label_smoothing)

    compute = torch.compile(loss_of, mode="max-autotune") if library.endswith("compiled") else loss_of
    settings = dict(lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay)
    optimizer = torch.optim.SGD(net.parameters(), **settings, fused=True)
    per_epoch = len(train.labels) // recipe.batch_size
    total = recipe.steps or recipe.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total, pct_start=round(recipe.warmup * total) / total, cycle_momentum=False
    )
    done, epoch, epochs, accuracy, first = 0, 0, [], 0.0, 0.0
    first_begun = time.perf_counter()
    while done < total:
        epoch += 1
        net.train()
        order, losses = torch.randperm(len(train.labels), device=where), torch.zeros((), device=where)
        for i in range(min(per_epoch, total - done)):
            rows = order[i * recipe.batch_size : (i + 1) * recipe.batch_size]
            loss = compute(train.augmented(rows, recipe.shift, recipe.flip), train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses += loss.detach()
            done += 1
            if done == 1:
                _wait(torch, where)
                first = time.perf_counter() - first_begun
        if done == total or epoch % recipe.eval_every == 0:
            accuracy = _judge(torch, net, test, where, mixed)
            epochs.append((time.perf_counter() - begun, accuracy))
        if progress is not None:
            progress(float(losses) / min(per_epoch, done))
    _wait(torch, where)
    row = _row(accuracy, time.perf_counter() - begun, first, done, epochs, wanted)
    return row | {"version": torch.__version__}


def _refuse_unknown(recipe: Any) -> None:
    for field in dataclasses.fields(recipe):
        if field.name not in _FOLLOWED.split() and getattr(recipe, field.name) != field.default:
            value = getattr(recipe, field.name)
            raise ValueError(f"{field.name}={value!r}: PyTorch's side of end_to_end has no such setting")


def _wait(torch: Any, where: Any) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize()


class _Data:
    """Images as bytes (N, H + 2 pad, W + 2 pad, C) with a black border, and labels, on the device."""

    def __init__(self, torch: Any, data: Any, where: Any, pad: int, mean: Any, std: Any):
        self.torch, self.pad, self.classes = torch, pad, data.classes
        images = np.pad(data.images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        self.images, self.labels = (torch.from_numpy(a).to(where) for a in (images, np.array(data.labels)))
        mean, std = (torch.tensor(v, dtype=torch.float32, device=where) for v in (mean, std))
        self.scale, self.shift = 1 / (255 * std), -mean / std
        self.side = torch.arange(data.images.shape[1], device=where)

    def augmented(self, rows: Any, shift: int, flip: bool) -> Any:
        """The batch (B, C, H, W) float32 of these rows, each in a window of its own, half of them mirrored."""
        torch, b = self.torch, len(rows)
        down, right = torch.randint(0, 2 * shift + 1, (2, b, 1), device=rows.device)
        mirrored = (torch.rand(b, 1, device=rows.device) < 0.5) & flip
        columns = torch.where(mirrored, self.side.flip(0), self.side)
        return self._taken(rows, self.side + down, columns + right)

    def plain(self, rows: Any) -> Any:
        """The batch of these rows as they are."""
        side = (self.side + self.pad).expand(len(rows), -1)
        return self._taken(rows, side, side)

    def _taken(self, rows: Any, down: Any, right: Any) -> Any:
        pixels = self.images[rows[:, None, None], down[:, :, None], right[:, None, :]]  # (B, H, W, C)
        return (pixels * self.scale + self.shift).permute(0, 3, 1, 2)


def _on_device(torch: Any, recipe: Any, where: Any) -> tuple[_Data, _Data]:
    """The recipe's images: those to train on, with room for their windows, and the test images."""
    from minires.train.images import open_images

    images = open_images(recipe)
    if len(images.train) < recipe.batch_size:
        raise ValueError(f"batch_size={recipe.batch_size} is more than the {len(images.train)} training images")
    padded = ((images.train, recipe.shift), (images.test, 0))
    train, test = (_Data(torch, data, where, pad, images.mean, images.std) for data, pad in padded)
    return train, test


def _network(torch: Any, recipe: Any, classes: int) -> Any:
    """PyTorch's network with the weights that a run of minires begins with."""
    from minires.train.start import new_model

    from .torch_resnet import resnet

    ours, _ = new_model(recipe, [str(i) for i in range(classes)], 3)
    net = resnet(torch, recipe.model)
    net.load_state_dict({name: torch.from_numpy(np.array(t.array)) for name, t in ours.state_dict().items()})
    return net


def _judge(torch: Any, net: Any, test: _Data, where: Any, mixed: bool) -> float:
    """The share of the test images that the network has right, in evaluation mode."""
    net.eval()
    right = torch.zeros((), dtype=torch.int64, device=where)
    with torch.inference_mode(), torch.autocast(where.type, torch.bfloat16, enabled=mixed):
        for rows in torch.arange(len(test.labels), device=where).split(_JUDGED):
            right += (net(test.plain(rows)).argmax(1) == test.labels[rows]).sum()
    return int(right) / len(test.labels)
