"""Models by name: `create_model("resnet20", num_classes=10)`, `list_models("resnet*")`."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .. import interop
from ..engine import Tensor
from .blocks import Block
from .resnet import ResNet
from .weights import options_of

_BUILDERS: dict[str, Callable[..., ResNet]] = {}
_SHAPES: dict[str, tuple[type[Block], tuple[int, ...], tuple[int, ...]]] = {}
_OPTIONS = [p.name for p in inspect.signature(ResNet).parameters.values() if p.kind is p.KEYWORD_ONLY]


def register(
    name: str,
    note: str,
    block: type[Block],
    depths: Sequence[int],
    widths: Sequence[int],
    fixed: Iterable[str] = (),
    **defaults: Any,
) -> Callable[..., ResNet]:
    """Enter `ResNet(block, depths, widths, **defaults)` under `name`, and return the function that builds it.

    note: one line for the function's docstring. defaults: where this model differs from `ResNet`'s own. fixed: those
    of them that the name decides, so that a caller cannot change them.
    """
    options = [option for option in _OPTIONS if option not in fixed]

    def build(num_classes: int | None = None, in_channels: int = 3, **changes: Any) -> ResNet:
        for option in changes:
            if option not in options:
                raise ValueError(
                    f"{name} has no option {option!r}{_near(option, options)}; it has {', '.join(options)}"
                )
        given = {} if num_classes is None else {"num_classes": num_classes}
        return ResNet(block, depths, widths, **{**defaults, **changes, **given, "in_channels": in_channels})

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{note} Options: those of `ResNet`; num_classes=None means as in the paper."
    _BUILDERS[name] = build
    _SHAPES[name] = (block, tuple(depths), tuple(widths))
    return build


def create_model(
    name: str,
    num_classes: int | None = None,
    in_channels: int | None = None,
    *,
    weights: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    **options: Any,
) -> ResNet:
    """Build the model of that name, with weights newly drawn, or with `weights`.

    num_classes: length of its output; None means as in the weights, else as in the paper (1000 for ImageNet, 10 for
    CIFAR-10). in_channels: channels of the images; None means as in the weights, else 3. weights: a file, the name of
    published weights (`list_weights`), or a state dict; what its shapes say of the options need not be said again.
    options: `ResNet`'s (stem, shortcut, variant, zero_init_residual, drop_skip).
    Raises ValueError for a name, number or option that cannot be, and says which can; for weights as
    `minires.interop.load_weights` does.
    """
    if name not in _BUILDERS:
        raise ValueError(f"no model is named {name!r}{_near(name, _BUILDERS)}; there are {', '.join(list_models())}")
    if weights is None:
        return _BUILDERS[name](num_classes, 3 if in_channels is None else in_channels, **options)
    state = interop.read_weights(weights)
    given = {"num_classes": num_classes, "in_channels": in_channels, **options}
    said = options_of({ours: state[theirs] for theirs, ours in interop.our_names(state).items()})
    model = _BUILDERS[name](**{**said, **{option: value for option, value in given.items() if value is not None}})
    interop.load_weights(model, state, source=None if isinstance(weights, Mapping) else str(weights))
    return model


def list_models(pattern: str = "*") -> list[str]:
    """The names of all models, or of those that match a shell pattern such as "resnet*" or "*110"."""
    return [name for name in _BUILDERS if fnmatch.fnmatchcase(name, pattern)]


def guess_model(state: Mapping[str, Tensor]) -> str | None:
    """The name of the model whose weights a state dict under our names holds, None where it is none of `list_models`.

    Where two models have the same weights, the residual network and not its plain twin.
    """
    depths, widths = [], []
    while (first := f"layer{len(depths) + 1}.0.conv1.weight") in state:
        blocks = {name.split(".")[1] for name in state if name.startswith(f"layer{len(depths) + 1}.")}
        depths.append(len(blocks))
        widths.append(state[first].shape[0])
    for name, (block, *shape) in _SHAPES.items():
        alike = block.preact == ("bn.weight" in state) and (block.expansion > 1) == ("layer1.0.conv3.weight" in state)
        if alike and shape == [tuple(depths), tuple(widths)]:
            return name
    return None


def _near(word: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(known))
    return f" (did you mean {' or '.join(near)}?)" if near else ""
