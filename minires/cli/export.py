"""`minires export`: a trained network as a file for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from .values import Whole

if TYPE_CHECKING:
    from ..train.pretrained import Pretrained

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
    from ..train.pretrained import open_pretrained

    if (run is None) == (weights is None):
        raise ValueError("give either a run folder or --weights (a file, or the name of published weights)")
    path = Path(out)
    kind = format or _format_of(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} for --out {out}")
    found = open_pretrained(str(run or weights))
    network, name = found.build(model or ""), model or found.model
    wrote = f"wrote {path}: the {name} of {found.source}"
    if kind == "onnx":
        size = image_size if image_size is not None else found.image_size or network.image_size
        print(wrote + _write_onnx(network, path, size, fold_bn, _notes(found, name)))
    elif kind == "torch":
        write_torch_checkpoint(path, network.state_dict())
        print(f"{wrote}; torch.load({path.name!r}, weights_only=True) opens it")
    else:
        save(network.state_dict(), path, _notes(found, name))
        print(wrote)


def _notes(found: Pretrained, model: str) -> dict[str, str]:
    """What goes into the file's metadata, as JSON where it is no text."""
    kept = {name: getattr(found, name) for name in ("classes", "mean", "std", "image_size")}
    return {"model": model, **{name: json.dumps(value, ensure_ascii=False) for name, value in kept.items() if value}}


def _write_onnx(network: Any, path: Path, size: int, fold_bn: bool, notes: dict[str, str]) -> str:
    """Write, compare where onnxruntime is installed, and say what was done."""
    from ..models.export import compare_with_onnxruntime, write_onnx

    write_onnx(network, path, image_size=size, fold_bn=fold_bn, notes=notes)
    channels, classes = network.conv1.weight.shape[1], network.fc.weight.shape[0]
    text = f", images (N, {channels}, {size}, {size}) float32 -> logits (N, {classes}); checked by onnx.checker"
    try:
        difference, largest = compare_with_onnxruntime(network, path)
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
