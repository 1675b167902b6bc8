"""Activation checkpointing: forward keeps a part's input and nothing else; backward runs the part again.

    plain         x -> [a -> b -> c] -> y     a, b and c are kept for backward
    checkpointed  x -> [           ] -> y     x is kept; when y's gradient comes, a, b and c are made again

A part is computed forward twice and backward once: about a third more work in a training step. n parts with k
activations each keep n + k activations at most, in place of n * k.

The gradients are equal to the plain ones bit for bit, whatever else uses the same inputs and parameters. Forward runs
the part without a graph and makes one node. When backward comes to that node, it runs the part again with a graph
whose ends are the true inputs and parameters, puts the new graph in the place of the node's inputs, and hands dy on to
it: the walk goes on through nodes that were made last and so come next, in the order in which the plain graph's would
have come. Nothing is walked twice or summed apart, and hooks see each op's backward in its module.

What forward has done besides is not done again: buffers (running statistics) keep what the first run left in them, and
random numbers are drawn once more from where the first run began, so that dropout drops the same.

Source: Chen et al. 2016, "Training deep nets with sublinear memory cost" (arXiv:1604.06174).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ..engine import Function, Tensor, Vertex, no_grad, set_grad_enabled, state
from ..random import get_rng_state, set_rng_state
from .module import Module


def checkpoint(function: Callable[..., Tensor], *inputs: Tensor | None, modules: Iterable[Module] | None = None) -> Any:
    """`function(*inputs)`, a Tensor, without what it keeps for backward: that is made again when backward needs it.

    function: a Module, a method of one, or a function of tensors. modules: the modules whose parameters and buffers it
    uses; found by themselves in the first two cases, to be named for other functions (`modules=[]` if there are none).
    It must do the same when it runs again: keep to the same kernels (`dispatch.use_kernels`) in backward, and mind that
    forward hooks fire twice. With `retain_graph=True` what was made again is kept. Raises TypeError where the modules
    cannot be known, for an input that is no Tensor and for another result than one Tensor; RuntimeError in backward,
    where an input or a parameter was written into after forward, or a module was switched to train() or eval().
    """
    owner = getattr(function, "__self__", function)
    if modules is None and not isinstance(owner, Module):
        name = getattr(function, "__name__", type(function).__name__)
        raise TypeError(f"checkpoint cannot see which modules {name!r} uses: name them, checkpoint(..., modules=[...])")
    for x in inputs:
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"checkpoint: an input is {type(x).__name__}, not a Tensor; bind it with functools.partial")
    used = [owner] if modules is None else list(modules)
    parameters = [p for module in used for p in module.parameters()]
    tensors = [*inputs, *parameters]
    if not state.grad_enabled or not any(t.requires_grad for t in tensors if t is not None):
        return function(*inputs)
    return Checkpoint.apply(*tensors, function=function, modules=used, count=len(inputs))


class Checkpoint(Function):
    """y = function(inputs). The tensors are the inputs, `count` of them, and then the parameters."""

    @staticmethod
    def forward(ctx, *arrays, function, modules, count):
        ctx.numbers, ctx.modes, ctx.rebuilt = get_rng_state(), _modes(modules), False
        ctx.fuse, ctx.autocast = state.fuse, state.autocast
        with no_grad():
            y = function(*(None if a is None else Tensor(a) for a in arrays[:count]))
        if not isinstance(y, Tensor):
            raise TypeError(f"checkpoint needs a function that returns one Tensor, not {type(y).__name__}")
        ctx.save_for_backward(*arrays)  # the parameters lie there anyway: they are named so that a write is noticed
        return y.array

    @staticmethod
    def backward(ctx, dy):
        if not ctx.rebuilt:  # the first time, under retain_graph
            root = _again(ctx)
            ctx.inputs, ctx.input_shapes, ctx.rebuilt = (root,), (dy.shape,), True
        return (dy,)


def _again(ctx: Any) -> Vertex | None:
    """Run the function a second time, with a graph; the vertex of its result, None where nothing needs a gradient."""
    function, modules, count = (ctx.params[name] for name in ("function", "modules", "count"))
    if ctx.modes != _modes(modules):
        raise RuntimeError("checkpoint: a module was switched by train() or eval() between forward and backward")
    inputs = [_attached(a, v) for a, v in zip(ctx.saved_for_backward or (), ctx.inputs[:count], strict=False)]
    with _as_then(ctx), _buffers_kept(modules), set_grad_enabled(True):
        y = function(*inputs)
    return (y.node or y) if y.requires_grad else None


def _attached(array: Any, vertex: Vertex | None) -> Tensor | None:
    """The input as it was: in its place in the graph."""
    if isinstance(vertex, Tensor):
        return vertex
    return None if array is None else Tensor(array, vertex is not None, vertex)


def _modes(modules: Sequence[Module]) -> list[bool]:
    return [below.training for module in modules for below in module.modules()]


@contextlib.contextmanager
def _as_then(ctx: Any) -> Iterator[None]:
    """Within it, the running module, the precision and the random numbers are those of the forward pass."""
    outer, numbers = (state.scope, state.fuse, state.autocast), get_rng_state()
    state.scope, state.fuse, state.autocast = ctx.scope, ctx.fuse, ctx.autocast
    set_rng_state(ctx.numbers)
    try:
        yield
    finally:
        state.scope, state.fuse, state.autocast = outer
        set_rng_state(numbers)


@contextlib.contextmanager
def _buffers_kept(modules: Sequence[Module]) -> Iterator[None]:
    """Within it, buffers may be written into; afterwards they are what they were."""
    before = [(b, b.array.copy(), b.version[0]) for module in modules for b in module.buffers()]
    try:
        yield
    finally:
        for buffer, array, version in before:
            buffer.array[...] = array
            buffer.version[0] = version
