"""Grad-CAM: where in an image a network saw what speaks for a class.

    A (N, K, h, w)   what a layer puts out                    y_c   the logit of class c
    a_k = mean over h, w of dy_c / dA_k                       how much map k speaks for c
    map = relu(sum over k of a_k A_k)                         (N, h, w), scaled to at most 1

Source: Selvaraju et al. 2017 (arXiv:1610.02391), eq. 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .capture import patch
from .device import CPU, to_device
from .engine import Tensor


def grad_cam(model: Any, images: Tensor, classes: Sequence[int] | None = None, layer: str = "") -> np.ndarray:
    """The map (N, h, w) float32, from 0 to 1, of every image (N, C, H, W); zeros where nothing speaks for the class.

    model: an `nn.Module` that gives logits (N, classes); it runs in evaluation mode. classes: whose logit it is about,
    one number per image; by default the largest one's. layer: a module's name; by default the last layer of blocks of
    a ResNet. h and w are that layer's: 8x8 for 32x32 images in the CIFAR networks, 7x7 for 224x224 in the others.
    Raises KeyError with near matches for a name that no module has, ValueError for classes that do not fit.
    """
    kept: list[Tensor] = []

    def cut(output: Tensor) -> Tensor:
        """The graph begins here: backward need not reach further down."""
        kept.append(Tensor(output.array, requires_grad=True))
        return kept[-1]

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in wanted:
            p.requires_grad_(False)
        with patch(model, {layer or model.layer_names[-1]: cut}):
            logits = model(images)
        n, k = logits.shape
        chosen = logits.array.argmax(1) if classes is None else np.asarray(classes)
        if chosen.shape != (n,) or not ((chosen >= 0) & (chosen < k)).all():
            raise ValueError(f"classes={classes!r} must be {n} numbers from 0 to {k - 1}, one per image")
        logits[np.arange(n), to_device(chosen, CPU)].sum().backward()  # images do not mix in evaluation mode
    finally:
        for p in wanted:
            p.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
    a, slope = (to_device(array, CPU) for array in (kept[0].array, kept[0].grad.array))  # type: ignore[union-attr]
    maps = np.maximum(np.einsum("nk,nkhw->nhw", slope.mean((2, 3)), a), 0)
    return maps / np.maximum(maps.max((1, 2), keepdims=True), np.finfo(maps.dtype).tiny)
