"""Weights and what belongs to them: the model's name, its classes, the images that it expects.

    network = open_network("runs/digits-...")      a run folder knows it all, and what was exported from it much
    network = open_network("resnet20.th")          any other file only what its shapes say, unless its hash is known

A network gives sensible outputs only for images that are normalised as those that it learned from, so mean and std
travel with the weights.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..device import CPU, array_module
from ..device import device as as_device
from ..engine import Tensor
from ..interop import our_names, read_weights
from ..interop.weights import resolve
from ..jit import trace
from ..models import create_model, get_weights, guess_model, list_models, list_weights
from ..nn import Module, fuse_for_inference
from ..nn.module import StateDictError
from ..serialization import load_arrays
from .run_folder import recipe_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Pretrained:
    """Weights as they were found. state: Tensors by name. source: where, for people. model, classes, mean, std,
    image_size, resize (before the middle is cropped to image_size): empty or 0 where nothing says. refusal: why an
    image alone cannot be brought to them, empty where it can."""

    state: Mapping[str, Tensor]
    source: str
    model: str = ""
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    image_size: int = 0
    resize: int = 0
    refusal: str = ""

    @property
    def outputs(self) -> int:
        """How many classes the weights tell apart: the rows of the one matrix in a residual network."""
        matrices = [t for t in self.state.values() if t.ndim == 2]
        if len(matrices) != 1:
            raise ValueError(f"{self.source} are not the weights of a ResNet: {len(matrices)} matrices, not one")
        return matrices[0].shape[0]

    @property
    def channels(self) -> int:
        """How many channels their images have: no filters have fewer than the first."""
        filters = [t for t in self.state.values() if t.ndim == 4]
        if not filters:
            raise ValueError(f"{self.source} are not the weights of a ResNet: there are no filters among them")
        return min(t.shape[1] for t in filters)

    def build(self, model: str = "") -> Any:
        """The network with these weights. model: its name, where they do not say it themselves. ValueError where the
        weights are not that network's."""
        name = model or self.model
        if not name:
            raise ValueError(f"whose weights are {self.source}? Name the model (--model resnet18)")
        try:
            return create_model(name, weights=self.state)
        except StateDictError as error:
            why = textwrap.shorten(str(error), 300, placeholder=" ...")  # the names of all weights, at worst
            raise ValueError(f"{self.source} do not fit {name}: {why}") from error


@dataclass(frozen=True)
class Network:
    """A trained network in evaluation mode, and how images come to it: RGB or grey by its channels, the shorter side
    resized to `resize`, the middle cropped to image_size, in [0, 1], minus mean, over std. classes: names of its
    outputs; named: whether they are the weights' own, not "class 0" and so on."""

    model: Any
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    channels: int
    source: str
    resize: int
    named: bool


def open_network(
    weights: str | Path,
    model: str = "",
    *,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    image_size: int = 0,
    device: Any = "cpu",
    note: Callable[[str], Any] = lambda text: None,
) -> Network:
    """The network of a run folder, of a file, or of published weights by their name.

    model, mean, std, image_size: go before what the weights say; needed where they say nothing. note: called with a
    line where something is taken for granted. Raises ValueError or OSError in one line.
    """
    where = as_device(device)
    array_module(where)  # raises where there is no such device
    found = open_pretrained(weights)
    network = found.build(model).to(where).eval()
    mean, std = normalization(found, mean, std, note)
    classes = found.classes or tuple(f"class {i}" for i in range(found.outputs))
    named = bool(found.classes)
    size = image_size or found.image_size or network.image_size
    resize = found.resize if size == found.image_size else 0
    return Network(network, classes, mean, std, size, found.channels, found.source, max(size, resize), named)


def for_inference(model: Module) -> Module:
    """What gives the model's outputs, up to rounding, in the least time: on the CPU a copy whose batch normalisations
    are folded into its convolutions, traced, elsewhere the model itself."""
    on_cpu = all(p.device == CPU for p in model.parameters())
    return trace(fuse_for_inference(model), check_trace=False) if on_cpu else model  # our models compute by ops alone


def normalization(
    found: Pretrained, mean: Sequence[float], std: Sequence[float], note: Callable[[str], Any]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) for images of these weights: as given, as they say, or, with a note, ImageNet's.
    ValueError where that is not how their images are normalised."""
    if bool(mean) != bool(std):
        raise ValueError("mean and std go together: give both (--mean 0.5 0.5 0.5 --std 0.25 0.25 0.25)")
    if found.refusal:
        raise ValueError(found.refusal)
    if not mean and not found.mean:
        if found.channels != 3:
            raise ValueError(f"{found.source} do not say how images are normalised; give mean and std (--mean, --std)")
        note(
            f"{found.source} do not say how images are normalised: taking ImageNet's mean {_numbers(IMAGENET_MEAN)} "
            f"and std {_numbers(IMAGENET_STD)}, as most do; --mean and --std change it"
        )
        return IMAGENET_MEAN, IMAGENET_STD
    mean, std = (tuple(mean), tuple(std)) if mean else (found.mean, found.std)
    if not len(mean) == len(std) == found.channels:
        raise ValueError(f"mean={mean} and std={std} do not fit the {found.channels} channels of {found.source}")
    return mean, std


def open_pretrained(weights: str | Path) -> Pretrained:
    """Read a run folder, a file of weights, or published weights by their name. Raises as `open_network` does."""
    path = Path(weights).expanduser()
    if (path / "recipe.toml").is_file():
        return _of_run(path, path / "model.safetensors")
    if path.is_dir():
        raise ValueError(f"weights={str(weights)!r} is a folder, but not of a run: it has no recipe.toml")
    file = resolve(path)
    for folder in (file.parent, file.parent.parent):  # a run's, or its checkpoints'
        if (folder / "recipe.toml").is_file() and (folder / "summary.json").is_file():
            return _of_run(folder, file)
    state = read_weights(file)
    state = {ours: state[theirs] for theirs, ours in our_names(state).items()}
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    for about in map(get_weights, list_weights()):
        if digest.startswith(about.sha256):
            scale: Any = {"mean": about.mean, "std": about.std, "image_size": about.image_size}
            what = f"{weights} ({about.name})" if about.name != str(weights) else about.name
            return Pretrained(state, what, about.model, about.classes, resize=about.resize or 0, **scale)
    notes = _notes(file)
    return Pretrained(state, str(weights), **{"model": guess_model(state) or "", **notes})


def _notes(file: Path) -> dict[str, Any]:
    """What `minires export` wrote into the head of a safetensors file: model, classes, mean, std, image_size."""
    if file.suffix != ".safetensors":
        return {}
    said = load_arrays(file)[1]
    try:
        kept: dict[str, Any] = {n: tuple(json.loads(said[n])) for n in ("classes", "mean", "std") if n in said}
        if "image_size" in said:
            kept["image_size"] = int(said["image_size"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: its head says {', '.join(said)}, but not as lists and a size: {error}") from error
    return {**kept, **({"model": said["model"]} if said.get("model") in list_models() else {})}


def _of_run(folder: Path, file: Path) -> Pretrained:
    recipe, summary = recipe_of(folder), summary_of(folder)
    if not summary or not file.is_file():
        raise FileNotFoundError(f"{folder} is a run that has not ended: go on with it, or give its model.safetensors")
    about: dict[str, Any] = {name: tuple(summary[name]) for name in ("classes", "mean", "std")}
    if recipe.normalize != "channel":
        about["refusal"] = f"{folder} normalises by a mean image, which its weights alone do not tell"
    source = str(folder if file.name == "model.safetensors" else file)
    return Pretrained(read_weights(file), source, recipe.model, image_size=recipe.image_size, **about)


def summary_of(folder: Path) -> dict[str, Any]:
    """What summary.json of a run says, {} where the run has not ended."""
    path = folder / "summary.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not {"classes", "mean", "std"} <= found.keys():
            raise ValueError("it lacks classes, mean or std")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove it to evaluate without it") from error
    return found


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
