"""The names of weights in other frameworks and repositories, mapped onto ours, which are torchvision's.

    wrapped      {"state_dict": {...}, "epoch": 90}                     find_state_dict
    prefixed     module.conv1.weight, _orig_mod.conv1.weight            find_state_dict
    renamed      linear.weight, layer2.0.shortcut.0.weight              our_names

torchvision's and timm's ResNets have our names. Where the names come from: `module.` is DataParallel's, `_orig_mod.`
torch.compile's; `linear` and `shortcut` are those of the CIFAR networks that most repositories go back to.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..engine import Tensor
from ..serialization import CheckpointError

WRAPPERS = ("state_dict", "model_state_dict", "model", "network", "net", "weights")
AVERAGES = ("state_dict_ema", "model_ema", "model_ema_state_dict", "ema_state_dict", "ema")  # of weights, in training
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.", "backbone.")
_DEEPEST = 4  # wrappers within wrappers
_RENAMES = (
    (re.compile(r"^(linear|classifier|head\.fc|head)\."), "fc."),
    (re.compile(r"\.shortcut\."), ".downsample."),
)


def find_state_dict(checkpoint: Mapping[str, Any], part: str | None = None) -> dict[str, Tensor]:
    """The weights by name in what `minires.load` returned, without wrappers and without prefixes that all names have.

    part: the name of the entry that they are in, such as "model_ema"; by default the first of WRAPPERS that is there,
    else the first of AVERAGES, else the checkpoint itself. A checkpoint of a minires run has the parts "model" and
    "ema". What stands beside the Tensors (an epoch, a text) is left out. Raises CheckpointError where there are no
    Tensors by name, and names what there is; KeyError where there is no such part.
    """
    found: Any = checkpoint
    if part is not None and part not in checkpoint and not any(str(k).startswith(f"{part}/") for k in checkpoint):
        raise KeyError(f"there is no part {part!r}; there are {_some(checkpoint)}")
    for _ in range(_DEEPEST):
        inner = _wrapped(found, part)
        if inner is None:
            break
        found, part = inner, None
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor) and isinstance(name, str)}
    for counter in ("n_averaged", "ema_updates"):  # beside the weights of an average
        tensors.pop(counter, None)
    if not tensors:
        raise CheckpointError(f"there are no weights by name; there are {_some(found)}")
    while (prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None)) is not None:
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def our_names(names: Iterable[str], wanted: Collection[str] | None = None) -> dict[str, str]:
    """Our name for each of theirs. wanted: the names that a model has; others are then left as they are."""
    found = {}
    for name in names:
        ours = name
        for pattern, replacement in _RENAMES:
            ours = pattern.sub(replacement, ours)
        found[name] = ours if wanted is None or (name not in wanted and ours in wanted) else name
    return found


def _wrapped(found: Mapping[str, Any], part: str | None) -> Mapping[str, Any] | None:
    for name in (part,) if part is not None else (*WRAPPERS, *AVERAGES):
        if isinstance(inner := found.get(name), dict) and inner:
            return inner
        inner = {key.removeprefix(f"{name}/"): found[key] for key in found if str(key).startswith(f"{name}/")}
        if inner:
            return inner
    return None


def _some(names: Iterable[Any]) -> str:
    """A few of the names, for a message."""
    texts = [str(name)[:40] for name in names]
    return ", ".join(texts[:6]) + (f" and {len(texts) - 6} more" if len(texts) > 6 else "") or "none"
