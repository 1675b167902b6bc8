"""`minires predict`: what a network says of images."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from .errors import say
from .values import Whole

_MANY = {"consume_multiple": True, "negative_iterable": ()}


def predict(
    images: Annotated[list[str], Parameter(allow_leading_hyphen=False)],
    /,
    *,
    weights: str,
    model: str = "",
    top: Whole = 5,
    json: bool = False,
    grad_cam: Path | None = None,
    batch_size: Whole = 64,
    image_size: Whole | None = None,
    mean: Annotated[tuple[float, ...], Parameter(**_MANY)] = (),
    std: Annotated[tuple[float, ...], Parameter(**_MANY)] = (),
    device: str = "cpu",
    threads: Whole = 0,
) -> int:
    """The most likely classes of image files.

    minires predict photo.jpg folder "more/*.png" --weights runs/NAME

    Exit code 0 where all images were read, 1 where some were not, 2 where none was.

    Parameters
    ----------
    images
        Files, folders (with all below) and patterns.
    weights
        A run folder, a file of weights, or the name of published ones.
    model
        The model's name, where the weights do not say it.
    top
        How many classes to show for each image.
    json
        Print one JSON object instead of a table.
    grad_cam
        A folder for pictures of where the network looked for what its first answer is (Grad-CAM).
    batch_size
        Images at once.
    image_size
        Height and width that images are resized to, in pixels, if not as the weights say.
    mean
        Mean per channel to normalise by, if not as the weights say.
    std
        The deviation that goes with --mean.
    device
        'cpu', 'cuda' or 'cuda:N'.
    threads
        CPU threads of the kernels; 0: all.
    """
    from ..train.prediction import find_images
    from ..train.prediction import predict as predict_files
    from ..train.pretrained import open_network

    files = find_images(images)
    if threads:
        from minires.kernels.cpu.jit import set_num_threads  # pyright: ignore[reportMissingImports]

        set_num_threads(threads)
    network = open_network(weights, model, mean=mean, std=std, image_size=image_size or 0, device=device, note=say)
    found = list(predict_files(network, files, top, batch_size, grad_cam))
    failed = [prediction for prediction in found if prediction.error]
    for prediction in failed:
        say(f"error: {prediction.error}")
    if json:
        print(jsonlib.dumps({"weights": weights, "images": [_plain(p) for p in found]}, ensure_ascii=False))
    else:
        _print_table([p for p in found if not p.error])
        if grad_cam is not None and len(failed) < len(found):
            print(f"where it looked: {grad_cam}{'' if str(grad_cam).endswith('/') else '/'}*.png")
    if failed and len(found) > 1:
        say(f"{len(failed)} of {len(found)} images could not be read")
    return 0 if not failed else 1 if len(failed) < len(found) else 2


def _plain(prediction: Any) -> dict[str, Any]:
    """As JSON holds it."""
    if prediction.error:
        return {"file": prediction.file, "error": prediction.error}
    top = [{"class": name, "probability": share} for name, share in prediction.top]
    overlay = {"grad_cam": prediction.overlay} if prediction.overlay else {}
    return {"file": prediction.file, "top": top, **overlay}


def _print_table(found: list[Any]) -> None:
    """A line per image: its classes with their probabilities."""
    if not found:
        return
    cells = [[p.file, *(text for name, share in p.top for text in (name, f"{share:.1%}"))] for p in found]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        words = [cell.rjust(w) if i and i % 2 == 0 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))]  # noqa: B905
        print("  ".join(words))
