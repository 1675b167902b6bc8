"""What pretraining is worth where images are few: `python -m benchmarks transfer`.

For each seed: a network learns 7 of the 10 classes of CIFAR-10, and is then to tell the other 3 apart, of which it
gets 50 images each. Beside it, on the same 150 images: the same network from scratch (for twice as many epochs, at a
learning rate that suits it), a linear probe on the pretrained features, and one on raw pixels (with the best of several
L2 penalties by the test images, so that it is rather too good). All are judged on the 3 classes' test images.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from statistics import mean
from typing import Any
from zlib import crc32

import numpy as np
from minires.kernels.cpu.jit import get_num_threads  # pyright: ignore[reportMissingImports]

from minires.data import open_dataset
from minires.data.archive import members
from minires.train import load_recipe, train
from minires.train.finetune import finetune
from minires.train.probe import fit_head

from .provenance import write

NEW, SHOTS = 3, 50  # classes to learn, and images of each
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
METHODS = ("scratch", "pixels", "probe", "finetuned")


def transfer(
    *,
    data: Path | None = None,
    seeds: int = 3,
    epochs: int = 3,
    quick: bool = False,
    output: Path | None = None,
) -> int:
    """Compare fine-tuning with training from scratch and with linear probes, on few images of unseen classes.

    Exit code 1 where fine-tuning is not better than training from scratch by at least 10 points, or not better than
    the probe on raw pixels, on average over the seeds.

    Parameters
    ----------
    data
        An archive of train/CLASS/* and test/CLASS/*; by default cifar10-jpg.tar.xz in $MINIRES_DATA.
    seeds
        How many: each draws its 3 classes, its 150 images and the weights.
    epochs
        Of pretraining.
    quick
        A smoke test: one seed, one epoch, few images; the exit code is then 0 whatever comes out.
    output
        Results file; by default benchmarks/results/transfer-CPU-THREADSt.csv.
    """
    if data is None:
        if not (folder := os.environ.get("MINIRES_DATA")):
            raise ValueError("say where the images are: --data ARCHIVE, or set MINIRES_DATA")
        data = Path(folder, "cifar10-jpg.tar.xz")
    files = {member.name: member.read() for member in members(data)}
    if quick:
        files = {name: content for name, content in files.items() if crc32(name.encode()) % 50 == 0}
    rows = []
    for seed in range(1 if quick else seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(one_seed(Path(folder), files, seed, 1 if quick else epochs, quick))
        row = rows[-1]
        print(f"seed {seed} ({row['new_classes']}): " + ", ".join(f"{name} {row[name]:.2%}" for name in METHODS))
    means = {name: mean(row[name] for row in rows) for name in METHODS}
    print("mean: " + ", ".join(f"{name} {share:.2%}" for name, share in means.items()))
    over = {name: 100 * (means["finetuned"] - means[name]) for name in METHODS[:3]}
    print("fine-tuned is better by " + ", ".join(f"{gain:.1f} points than {name}" for name, gain in over.items()))
    print(f"results: {write('transfer', rows, get_num_threads(), output)}")
    return 0 if quick or (over["scratch"] >= 10 and over["pixels"] > 0) else 1


def one_seed(folder: Path, files: Mapping[str, bytes], seed: int, epochs: int, quick: bool) -> dict[str, Any]:
    """The share of the new classes' test images that each method gets right, and how it came about."""
    rng, parts = np.random.default_rng(seed), [PurePosixPath(name).parts for name in files]
    classes = sorted({p[-2] for p in parts})
    new = set(rng.choice(classes, NEW, replace=False).tolist())
    old_files = [name for name, p in zip(files, parts, strict=True) if p[-2] not in new]
    few = [name for name, p in zip(files, parts, strict=True) if p[-2] in new and p[-3] == "test"]
    for label in sorted(new):
        train_files = sorted(n for n, p in zip(files, parts, strict=True) if p[-3:-1] == ("train", label))
        few += rng.choice(train_files, min(SHOTS, len(train_files)), replace=False).tolist()
    known = _archive(folder / "known.tar", old_files, files)
    unseen = _archive(folder / "unseen.tar", few, files)

    begun = time.perf_counter()
    small: dict[str, Any] = {"batch_size": 16} if quick else {}
    common = {"dataset": str(known), "epochs": epochs, "seed": seed, "out": str(folder / "known"), **small}
    pretrained = train(load_recipe("cifar10-short", common))
    seconds = time.perf_counter() - begun

    target = {"dataset": str(unseen), "seed": seed, "batch_size": 10, "shift": 4, "flip": True}
    target |= {"image_size": 32, "eval_every": 1000, "weight_decay": 5e-4}  # judged at the end alone
    length = 1 if quick else 30
    scratch = train(
        load_recipe("cifar10-short", {**target, "epochs": 2 * length, "lr": 0.05, "out": str(folder / "scratch")})
    )
    weights = str(folder / "known")
    tuned = finetune(weights, **target, epochs=length, lr=0.01, out=str(folder / "finetuned"))
    probe = finetune(weights, dataset=str(unseen), batch_size=10, probe=True, weight_decay=1e-2, out=f"{folder}/probe")
    return {
        "seed": seed,
        "new_classes": " ".join(sorted(new)),
        "pretrained_epochs": epochs,
        "pretrained_accuracy": pretrained.test_accuracy,
        "scratch": scratch.test_accuracy,
        "pixels": _pixels(unseen),
        "probe": probe.test_accuracy,
        "finetuned": tuned.test_accuracy,
        "pretraining_seconds": round(seconds, 1),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def _archive(path: Path, names: list[str], files: Mapping[str, bytes]) -> Path:
    """A .tar of these files, as they are."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            tar.addfile(info, io.BytesIO(files[name]))
    return path


def _pixels(archive: Path) -> float:
    """The share of test images that a linear head on pixels gets right, at the best of the penalties."""
    parts = (open_dataset("folder", archive, train, image_size=32) for train in (True, False))
    (x, t), (x_test, t_test) = ((d.images.reshape(len(d), -1).astype(np.float32) / 255, d.labels) for d in parts)
    shares = []
    for l2 in PENALTIES:
        weight, bias = fit_head(x, t, NEW, l2)
        shares.append(float(((x_test @ weight.T + bias).argmax(1) == t_test).mean()))
    return max(shares)
