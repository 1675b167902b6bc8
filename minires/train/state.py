"""What a checkpoint holds, and how a run takes it up again."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minires.kernels.cpu.jit import get_num_threads, source_hash  # pyright: ignore[reportMissingImports]

from .. import dispatch
from ..device import CPU, namespace_of, to_device
from ..engine import Tensor
from ..random import get_rng_state, set_rng_state
from .checkpoint import Checkpoint
from .recipe import FREE, Recipe
from .run_folder import recipe_of

if TYPE_CHECKING:
    from .loop import Run

_LENGTH = ("epochs", "steps")


def capture(run: Run) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, rest) of a run that is between two steps: all that decides how it goes on, and on what it ran."""
    numbers: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    parts = {"model": run.model.state_dict()}
    parts.update({f"optimizer.{i}": kept for i, kept in run.optimizer.state_dict()["state"].items()})
    parts.update({} if run.ema is None else {"ema": run.ema.state_dict()})
    for part, values in parts.items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                arrays[f"{part}/{name}"] = np.asarray(to_device(value.array, CPU), order="C")
            else:
                numbers[f"{part}/{name}"] = value
    rest = {
        "step": run.step,
        "epoch": run.epoch,
        "batch": run.batch,
        "recorded": run.recorded,
        "best": run.best,
        "numbers": numbers,
        "random": get_rng_state(),
        "mean": run.mean.state(),
        "watch": run.watch.state(),
        "scaler": run.train_step.scaler.state_dict(),
        "seconds": run.seconds,
        "seed": run.recipe.seed,
        "recipe": dataclasses.asdict(run.recipe),
        "data": run.images.fingerprint,
        "plan": dispatch.plan(),
        "versions": versions(),
        "threads": threads(),
    }
    return arrays, rest


def restore(run: Run, checkpoint: Checkpoint, note: Callable[[str], Any]) -> None:
    """Put a new run where the checkpoint was taken. ValueError where it was of other data, of another recipe, or is
    further than the run shall go; a line of `note` where versions or thread counts were others."""
    arrays, rest = checkpoint
    if rest["data"] != run.images.fingerprint:
        raise ValueError(f"the images are not the ones that {run.folder.path} was trained on")
    _check_recipe(run, rest["recipe"])
    if rest["step"] > run.total:
        raise ValueError(f"{run.folder.path} is at step {rest['step']} already, beyond the {run.total} asked for")
    _warn(rest, note)
    missing = dispatch.restore_plan(rest["plan"])
    if missing:
        note(f"warning: kernels of the run that are not here, others take their place: {', '.join(missing)}")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in {**{k: Tensor(a) for k, a in arrays.items()}, **rest["numbers"]}.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    run.model.load_state_dict(parts["model"])
    state = {int(part[10:]): kept for part, kept in parts.items() if part.startswith("optimizer.")}
    params = [p for group in run.optimizer.param_groups for p in group["params"]]
    for i, kept in state.items():
        kept.update({name: _like(params[i], value) for name, value in kept.items() if isinstance(value, Tensor)})
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})
    if run.ema is not None:
        run.ema.load_state_dict(parts["ema"])
    run.step, run.epoch, run.batch, run.recorded = (rest[name] for name in ("step", "epoch", "batch", "recorded"))
    run.best, run.saved, run.seconds_before = tuple(rest["best"]), rest["step"], rest["seconds"]
    run.schedule.load_state_dict({"last_epoch": run.step})
    run.mean.load_state(rest["mean"])
    run.watch.load_state(rest["watch"])
    run.train_step.scaler.load_state_dict(rest.get("scaler", {}))  # not in checkpoints from before there was precision
    set_rng_state(rest["random"])


def resumed_recipe(path: Path, changes: Mapping[str, Any], extend: bool) -> Recipe:
    """The recipe of the run folder with the changes; ValueError naming one that would change the result.

    epochs and steps may change with `extend`, which is refused without such a change.
    """
    old = recipe_of(path)
    new = dataclasses.replace(old, **{**changes, "out": ""})
    if "out" in changes:
        raise ValueError(f"out={changes['out']!r} does not go with a resumed run, which goes on in {str(path)!r}")
    for field in dataclasses.fields(Recipe):
        before, now = getattr(old, field.name), getattr(new, field.name)
        if before == now or field.name in FREE:
            continue
        if field.name not in _LENGTH:
            raise ValueError(f"{field.name}={now!r} differs from the run's {before!r}; a resumed run cannot change it")
        if not extend:
            raise ValueError(
                f"{field.name}={now!r} differs from the run's {before!r}; with --extend it is taken, "
                "and the learning rates to come change with it"
            )
    lengthened = any(getattr(old, name) != getattr(new, name) for name in _LENGTH)
    if extend and not lengthened:
        raise ValueError("--extend needs --epochs or --steps with another value than the run's")
    if (path / "summary.json").is_file() and not lengthened:
        raise ValueError(f"{str(path)!r} is complete; to train on, give --epochs N --extend")
    return new


def _check_recipe(run: Run, then: Mapping[str, Any]) -> None:
    """ValueError where the recipe's file was changed by hand since the checkpoint."""
    for field in dataclasses.fields(Recipe):
        now = getattr(run.recipe, field.name)
        before = then.get(field.name, now)
        before = tuple(before) if isinstance(before, list) else before
        if now != before and field.name not in {*FREE, *_LENGTH, "name", "expected"}:
            where = run.folder.path / "recipe.toml"
            raise ValueError(f"{field.name}={now!r} in {where}, but the checkpoint was made with {before!r}")


def versions() -> dict[str, str]:
    """What the run ran on: versions of Python and of the packages that compute, the platform, and kernels' source."""
    packages = {name: importlib.metadata.version(name) for name in ("minires", "numpy", "numba")}
    return {"python": platform.python_version(), **packages, "platform": platform.platform(), "kernels": source_hash()}


def threads() -> dict[str, int]:
    """How many threads the kernels use, and NumPy's BLAS, whose sums may depend on it."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return {
            "kernels": get_num_threads(),
            "blas": int(os.environ.get("OPENBLAS_NUM_THREADS") or os.cpu_count() or 1),
        }
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas" and "numpy" in pool["filepath"]]
    return {"kernels": get_num_threads(), "blas": pools[0]["num_threads"] if pools else 1}


def _warn(rest: Mapping[str, Any], note: Callable[[str], Any]) -> None:
    for what, before, now in (("versions", rest["versions"], versions()), ("threads", rest["threads"], threads())):
        odd = [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]
        if odd:
            note(f"warning: {what} changed since the checkpoint, the last bits may differ: {', '.join(odd)}")


def _like(p: Tensor, value: Tensor) -> Tensor:
    """The value, laid out in memory as the parameter is, so that kernels find the same strides as before."""
    if value.shape != p.shape:
        return value
    array = namespace_of(p.array).empty_like(p.array, dtype=value.dtype)
    array[...] = to_device(value.array, p.device)
    return Tensor(array)
