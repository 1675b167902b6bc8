"""`minires export`: a trained network as a file for other programs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from .values import Whole

_SUFFIXES = {".onnx": "onnx", ".safetensors": "safetensors", ".pth": "torch", ".pt": "torch", ".bin": "torch"}
_AGREE = 1e-4  # of the largest logit


def export(
    run: str | None = None,
    /,
    *,
    out: str,
    weights: str | None = None,
    model: str | None = None,
    format: Literal["onnx", "safetensors", "torch"] | None = None,
    fold_bn: Annotated[bool, Parameter(negative="--keep-bn")] = True,
    image_size: Whole | None = None,
) -> None:
    """Write a trained network as ONNX, safetensors or a PyTorch checkpoint.

    minires export runs/NAME --out model.onnx
    minires export --weights resnet18.pth --out resnet18.safetensors

    Parameters
    ----------
    run
        A run folder; or give --weights.
    out
        The file to write. One that is there is replaced, once the new one is whole.
    weights
        A file (.safetensors, .pth, .pt, .th, .bin), the name of published weights, or a run folder.
    model
        Whose weights they are, where they do not tell: a name of `minires info`.
    format
        By default as OUT ends: .onnx, .safetensors, or .pth, .pt and .bin for PyTorch.
    fold_bn
        ONNX: make BatchNorms a part of the convolutions before them; --keep-bn leaves them.
    image_size
        ONNX: height and width of the images, if not as in training. Their number is free.
    """
    from ..interop import write_torch_checkpoint
    from ..serialization import save

    if (run is None) == (weights is None):
        raise ValueError("give either a run folder or --weights (a file, or the name of published weights)")
    path = Path(out)
    kind = format or _format_of(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} for --out {out}")
    found = _open(str(run or weights), model)
    if kind == "onnx":
        print(_write_onnx(found, path, fold_bn, image_size))
    elif kind == "torch":
        write_torch_checkpoint(path, found.network.state_dict())
        print(f"wrote {out}: the {found.name} of {found.source}; torch.load({path.name!r}, weights_only=True) opens it")
    else:
        save(found.network.state_dict(), path, found.notes)
        print(f"wrote {out}: the {found.name} of {found.source}")


@dataclass
class _Found:
    """A network, its name, where it comes from, the size of its images (None: as in the paper), and what is known of
    them and of the classes."""

    network: Any
    name: str
    source: str
    image_size: int | None = None
    notes: dict[str, str] = field(default_factory=dict)


def _open(weights: str, model: str | None) -> _Found:
    """The network of a run folder, a file, or published weights."""
    if Path(weights).is_dir():
        return _of_run(Path(weights), model)
    from .. import models
    from ..interop import our_names, read_weights

    state = read_weights(weights)
    state = {ours: state[theirs] for theirs, ours in our_names(state).items()}
    known = models.get_weights(weights) if weights in models.list_weights() and not Path(weights).exists() else None
    name = model or (known.model if known else models.guess_model(state))
    if name is None:
        raise ValueError(f"whose weights are {weights}? Name the model (--model resnet18); `minires info` lists them")
    network = models.create_model(name, weights=weights)
    if known is None:
        return _Found(network, name, weights, notes={"model": name})
    about = {"classes": known.classes, "mean": known.mean, "std": known.std}
    return _Found(network, name, weights, known.image_size, _notes(name, about))


def _of_run(folder: Path, model: str | None) -> _Found:
    from ..models import create_model
    from ..train.run_folder import recipe_of

    recipe = recipe_of(folder)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no model.safetensors yet; let the run finish an epoch")
    name = model or recipe.model
    network = create_model(name, weights=path)
    return _Found(network, name, str(folder), recipe.image_size or None, _notes(name, _summary(folder)))


def _summary(folder: Path) -> dict[str, Any]:
    """What summary.json of a run says, {} where the run has not ended."""
    path = folder / "summary.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; remove it to export without it") from error


def _notes(model: str, about: dict[str, Any]) -> dict[str, str]:
    """What goes into the file's metadata, as JSON where it is no text."""
    kept = {key: json.dumps(about[key], ensure_ascii=False) for key in ("classes", "mean", "std") if about.get(key)}
    return {"model": model, **kept}


def _write_onnx(found: _Found, path: Path, fold_bn: bool, image_size: int | None) -> str:
    """Write, compare where onnxruntime is installed, and say what was done."""
    from ..models.export import compare_with_onnxruntime, write_onnx

    size = image_size if image_size is not None else found.image_size or found.network.image_size
    write_onnx(found.network, path, image_size=size, fold_bn=fold_bn, notes=found.notes)
    channels, classes = found.network.conv1.weight.shape[1], found.network.fc.weight.shape[0]
    text = (
        f"wrote {path}: the {found.name} of {found.source}, images (N, {channels}, {size}, {size}) float32 -> logits "
        f"(N, {classes}); checked by onnx.checker"
    )
    try:
        difference, largest = compare_with_onnxruntime(found.network, path)
    except ImportError:
        return f"{text}, but not run: pip install onnxruntime to compare it with minires"
    if difference > _AGREE * largest:
        path.unlink()
        raise RuntimeError(
            f"onnxruntime's logits differ by {difference:.2g} (the largest is {largest:.3g}): not written"
        )
    return (
        f"{text}; onnxruntime's logits differ from minires's by at most {difference:.1g} (the largest is {largest:.3g})"
    )


def _format_of(path: Path) -> str:
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"--out {path} ends in none of {', '.join(_SUFFIXES)}: give --format onnx, safetensors or torch"
        )
    return _SUFFIXES[path.suffix]
