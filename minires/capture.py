"""Looking into a network, and changing it while it runs: named activations and gradients, patching, ablation.

    with capture(model, "layer2.0.conv1", "layer1.*", grads=True) as cache:
        loss_of(model(x)).backward()
    cache["layer2.0.conv1"].output, cache["layer2.0.conv1"].grad

A name is a module's, as in `named_modules()`, and means its output. Inside a module, "module/Op" means the output of
an op that ran in it, by the name of its Function: "layer1.0/Add", and for the outermost module "/Add". Both may hold
the wildcards of `fnmatch` (*, ?, [abc]; * also matches dots).

A residual block ends in one fused op, `bn2(out, add=skip, relu=True)`, so the output of "layer1.0.bn2" is the block's
output. Where a name with "/" is asked for, ops run unfused within the `with`: then "layer1.0.bn2/BatchNorm" is the
residual branch F(x) before the skip is added, and "layer1.0.bn2/Add" is F(x) + x before the ReLU.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from .device import namespace_of
from .engine import Node, Tensor
from .hooks import Hook
from .hooks.base import module_path
from .state import Scope, unfused


class Captured:
    """What was seen under one name. outputs, grads: one per call, in order of the calls; a grad is None until
    backward has reached it. All are outside the graph and share memory with what they show: copy before writing."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.grads: list[Tensor | None] = []

    @property
    def output(self) -> Tensor:
        """The output of the last call."""
        return self.outputs[-1]

    @property
    def grad(self) -> Tensor | None:
        """The gradient of the last call's output."""
        return self.grads[-1]

    def _add(self, output: Tensor) -> int:
        self.outputs.append(output.detach())
        self.grads.append(None)
        return len(self.grads) - 1


class Cache(dict[str, Captured]):
    """Captured values by name, in the order in which they were first seen; KeyError names what is there instead."""

    def __missing__(self, name: str) -> Captured:
        raise KeyError(f"nothing was captured under {name!r}{_near(name, list(self))}")


@contextlib.contextmanager
def capture(model: Any, *names: str, grads: bool = False) -> Iterator[Cache]:
    """Within it, keep what the named modules and ops put out; with `grads` also the gradients of that, from backward.

    model: an `nn.Module`; names: see the page's head. The gradient is that of the loss with respect to the output,
    all its uses summed. Backward must run within the `with`. Raises KeyError with near matches for a name that no
    module has; names of ops are known only when they run, so for them `cache[name]` raises it.
    """
    modules = dict(model.named_modules())
    cache, ops = Cache(), [name for name in names if "/" in name]
    selected = {name: None for pattern in names if "/" not in pattern for name in _matching(pattern, modules)}
    with contextlib.ExitStack() as stack:
        for name in selected:
            stack.enter_context(modules[name].register_forward_hook(_Watch(name, cache, grads, stack)))
        if ops:
            stack.enter_context(unfused())
            stack.enter_context(_OpWatch(model, ops, cache, grads))
        yield cache


class _Watch:
    """A forward hook that keeps the output."""

    def __init__(self, name: str, cache: Cache, grads: bool, stack: contextlib.ExitStack):
        self.name, self.cache, self.grads, self.stack = name, cache, grads, stack

    def __call__(self, module: Any, args: tuple, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(f"cannot capture {self.name!r}: it returns a {type(output).__name__}, not one Tensor")
        captured = self.cache.setdefault(self.name, Captured())
        call = captured._add(output)
        if self.grads and output.requires_grad:
            keep = functools.partial(captured.grads.__setitem__, call)
            self.stack.enter_context(output.register_hook(keep))


class _OpWatch(Hook):
    """An engine hook that keeps outputs of ops by "module/Op"."""

    def __init__(self, model: Any, patterns: Sequence[str], cache: Cache, grads: bool):
        self.model, self.patterns, self.cache, self.grads = model, patterns, cache, grads
        self._calls: dict[Node, tuple[Captured, int]] = {}

    def forward_post(self, node: Node, arrays: Sequence[Any], y: Any) -> None:
        path = _path_within(self.model, node.scope)
        name = f"{path}/{node.name}"
        if path is not None and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns):
            captured = self.cache.setdefault(name, Captured())
            call = captured._add(Tensor(y))
            if self.grads and any(node.needs_grad):
                self._calls[node] = captured, call

    def backward_pre(self, node: Node, dy: Any) -> None:
        if node in self._calls:
            captured, call = self._calls[node]
            captured.grads[call] = Tensor(dy)


@contextlib.contextmanager
def patch(model: Any, outputs: Mapping[str, Any]) -> Iterator[None]:
    """Within it, the named modules put out something else: activation patching.

    outputs: by name (wildcards allowed) a function `fn(output) -> Tensor or array`, or a Tensor or array. What is
    put in must have the shape of what it replaces (ValueError). Gradients flow through a function made of ops, and
    stop at an array.

        with patch(model, {"layer1.0": clean["layer1.0"].output}):
            y = model(corrupted)
    """

    def replacing(name: str, new: Any) -> Callable:
        def hook(module: Any, args: tuple, output: Tensor) -> Tensor:
            return _fitting(name, new(output) if callable(new) else new, output)

        return hook

    modules = dict(model.named_modules())
    chosen = {name: new for pattern, new in outputs.items() for name in _matching(pattern, modules)}
    with contextlib.ExitStack() as stack:
        for name, new in chosen.items():
            stack.enter_context(modules[name].register_forward_hook(replacing(name, new)))
        yield


@contextlib.contextmanager
def ablate(model: Any, *names: str, to: Literal["zero", "identity", "mean"] = "zero") -> Iterator[None]:
    """Within it, the named modules (wildcards allowed) are taken out.

    to: "zero" puts out zeros; "mean" each channel's mean over the batch (and positions); gradients stop at both.
    "identity" hands on the input: of a residual block that leaves the skip alone (the lesions of Veit et al. 2016,
    arXiv:1605.06431). ValueError where the input's shape is not the output's.
    """
    if to not in ("zero", "identity", "mean"):
        raise ValueError(f"to={to!r} must be 'zero', 'identity' or 'mean'")

    def without(name: str) -> Callable:
        def hook(module: Any, args: tuple, output: Tensor) -> Tensor:
            y = output.array
            if to == "identity":
                return _fitting(name, args[0], output)
            if to == "zero":
                return Tensor(namespace_of(y).zeros_like(y))
            mean = y.mean(tuple(i for i in range(y.ndim) if i != 1), keepdims=True)
            return Tensor(namespace_of(y).zeros_like(y) + mean)

        return hook

    modules = dict(model.named_modules())
    with contextlib.ExitStack() as stack:
        for name in {name: None for pattern in names for name in _matching(pattern, modules)}:
            stack.enter_context(modules[name].register_forward_hook(without(name)))
        yield


def _matching(pattern: str, modules: Mapping[str, Any]) -> list[str]:
    found = [pattern] if pattern in modules else fnmatch.filter((name for name in modules if name), pattern)
    if not found:
        raise KeyError(f"no module is named {pattern!r}{_near(pattern, [name for name in modules if name])}")
    return found


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or list(known[:5])
    return f"; near: {', '.join(map(repr, near))}" if near else ""


def _fitting(name: str, new: Any, output: Tensor) -> Tensor:
    if not isinstance(new, Tensor):
        new = Tensor(namespace_of(output.array).asarray(new, output.dtype))
    if new.shape != output.shape:
        raise ValueError(f"{name!r} puts out shape {output.shape}, its replacement has shape {new.shape}")
    return new


def _path_within(model: Any, scope: Scope | None) -> str | None:
    """The module of `scope` as `model` names it, "" for `model`; also where `model` runs inside another module."""
    inner: list[Scope] = []
    while scope is not None and scope.module is not model:
        inner.append(scope)
        scope = scope.parent
    if scope is None:
        return None
    chain: Scope | None = Scope(model, None)
    for link in reversed(inner):
        chain = Scope(link.module, chain)
    return module_path(chain) if inner else ""
