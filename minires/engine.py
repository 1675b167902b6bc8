"""The autograd engine: Tensor, Node, Function and the walk back. Everything it does is on this page.

An op is a `Function`. Applying it makes a `Node`, which remembers what its backward needs and where its inputs came
from. `backward` walks the nodes from the last made to the first: a node's inputs were always made before it, so when
a node's turn comes every path from the loss to it has delivered its share of the gradient. (Walking recursively
instead would count a residual block's input 2^n times over n blocks.) First order only: backward is of raw arrays.
"""

from __future__ import annotations

import heapq
import itertools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .device import device_of, namespace_of
from .handle import Handle
from .methods import Methods
from .state import Scope, no_grad, set_grad_enabled, state

__all__ = ["Function", "Handle", "Node", "Scope", "Tensor", "Vertex", "no_grad", "set_grad_enabled", "state"]
_numbers = itertools.count()
accumulate: Callable[[Any, Any], Any] = operator.iadd  # of gradients, in place; `minires.ops` puts a kernel here


class Tensor(Methods):
    """An array that may remember how it was computed.

    array: the NumPy or CuPy array. requires_grad: whether `backward` should reach it. grad: after backward, a Tensor
    of the same shape (leaves only, or after `retain_grad`). Operators and methods are attached by `minires.ops`.
    """

    __slots__ = ("__weakref__", "_requires_grad", "array", "grad", "grad_hooks", "node", "statistics", "version")
    __array_ufunc__ = None  # let `ndarray * Tensor` reach Tensor.__rmul__

    def __init__(self, array: Any, requires_grad: bool = False, node: Node | None = None):
        self.array: Any = _as_array(array)
        self._requires_grad, self.node = False, None
        if requires_grad:
            self.requires_grad_()
        self.node: Node | None = node
        self.grad: Tensor | None = None
        self.grad_hooks: dict[int, Callable[[Tensor], Tensor | None]] = {}
        self.version = [0]  # counts writes into the memory; shared by the tensors that show it
        self.statistics: tuple[list[Any], list[int], int] | None = None  # and the version they are of: `ops.conv2d`

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    ndim = property(lambda self: self.array.ndim)
    device: Any = property(lambda self: device_of(self.array))
    is_leaf = property(lambda self: self.node is None)
    requires_grad: Any = property(operator.attrgetter("_requires_grad"), lambda self, on: self.requires_grad_(on))

    def detach(self) -> Tensor:
        """The same array, outside the graph."""
        alias = Tensor(self.array)
        alias.version = self.version
        return alias

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Set `requires_grad` of a leaf and return the tensor; a computed one can only go on requiring them."""
        if self.node is not None and not requires_grad:
            raise RuntimeError("requires_grad can only be changed on leaves; use detach()")
        if requires_grad and self.dtype.kind not in "fcV":  # V is bfloat16
            raise ValueError(f"only floating tensors can require gradients, not {self.dtype}")
        self._requires_grad = bool(requires_grad)
        return self

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Handle:
        """Call `hook(grad)` when this tensor's gradient is complete; what it returns, if anything, replaces it: it must
        have its shape and dtype. The hook must not write into `grad`: other paths may hold it."""
        if not self.requires_grad:
            raise RuntimeError("a hook needs a tensor that requires gradients")
        return Handle((self.node or self).grad_hooks, hook)

    def retain_grad(self) -> None:
        """Keep `.grad` of a tensor that is not a leaf."""
        if self.node is not None:
            self.node.retaining = weakref.ref(self)  # the graph must not keep the tensor, and so its array, alive

    def backward(self, gradient: Any = None, retain_graph: bool = False) -> None:
        """Compute the gradient of this tensor with respect to every leaf, and add it to the leaf's `.grad`.

        gradient: that of what is differentiated with respect to this tensor; needed unless it has one element.
        Raises RuntimeError where the graph was freed by an earlier backward (`retain_graph=True` keeps it). Where an
        op's backward raises, no leaf's `.grad` has changed.
        """
        if not self.requires_grad:
            raise RuntimeError("backward() needs a tensor that requires gradients and was computed with them enabled")
        dy = getattr(gradient, "array", gradient)
        if gradient is None and self.array.size == 1:
            dy = namespace_of(self.array).ones(self.shape, self.dtype)
        if np.shape(dy) != self.shape:
            raise ValueError(f"backward() of a tensor of shape {self.shape} needs a `gradient` of that shape")
        _walk_back(self.node or self, namespace_of(self.array).asarray(dy, self.dtype), retain_graph)

    def _add_grad(self, share: Any, ours: bool) -> None:
        if self.grad is not None:
            self.grad.array[...] += share
            self.grad.version[0] += 1
        elif ours:
            self.grad = Tensor(share)
        else:  # another tensor's gradient may be the same array
            self.grad = Tensor(namespace_of(share).empty_like(self.array))
            self.grad.array[...] = share


class Node:
    """One applied op: the `ctx` of its forward and backward.

    fn: the Function. params: its keyword parameters. inputs: per input the vertex that its gradient flows to (a Node,
    a leaf Tensor, or None where no gradient is needed). needs_grad: which inputs need one; backward may return None
    for the others. saved_for_backward: arrays kept by `save_for_backward`. scope: the module it ran in. elsewhere: in
    backward, an input's gradient so far, (array, _); who sets it to None returns the sum with it. Forward may set more.
    """

    __slots__ = tuple(
        "fn params scope number inputs needs_grad input_shapes saved_for_backward grad_hooks retaining versions "
        "__dict__ __weakref__".split()
    )

    def __init__(self, fn: type[Function], inputs: Sequence[Tensor | None], params: dict[str, Any]):
        self.fn, self.params, self.scope, self.number, on = fn, params, state.scope, next(_numbers), state.grad_enabled
        self.inputs = tuple([(t.node or t) if on and t is not None and t._requires_grad else None for t in inputs])
        self.needs_grad = tuple([vertex is not None for vertex in self.inputs])
        self.input_shapes = tuple([None if t is None else t.array.shape for t in inputs])
        self.saved_for_backward: tuple[Any, ...] | None = ()
        self.grad_hooks: dict[int, Callable[[Tensor], Tensor | None]] = {}
        self.retaining: Callable[[], Tensor | None] = lambda: None
        self.versions: list[tuple[list[int], int]] = []  # of saved tensors: the count of writes, and what it was

    name = property(lambda self: self.fn.__name__)

    def save_for_backward(self, *arrays: Any) -> None:
        """Keep arrays for backward. Keep what it reads and nothing else: this is what training costs in memory."""
        self.saved_for_backward = arrays

    def backward(self, dy: Any) -> tuple[Any, ...]:
        """The gradients of the inputs."""
        if self.saved_for_backward is None:
            raise RuntimeError(f"an earlier backward() freed what {self.name} saved: give that one retain_graph=True")
        if any(version[0] != then for version, then in self.versions):
            raise RuntimeError(f"backward of {self.name} needs a tensor that was written into after the forward pass")
        grads = given if isinstance(given := self.fn.backward(self, dy), tuple) else (given,)
        shapes, xs = [None if g is None else g.shape for g in grads], self.input_shapes
        if len(shapes) != len(xs) or any(g not in (None, x) for g, x in zip(shapes, xs, strict=True)):
            raise RuntimeError(f"backward of {self.name} returned shapes {shapes} for inputs of shapes {list(xs)}")
        return grads

    def free(self) -> None:
        """Drop what was kept for backward."""
        self.saved_for_backward, self.inputs = None, (None,) * len(self.inputs)
        vars(self).clear()


Vertex = Node | Tensor


class Function:
    """A differentiable op: two static methods on raw arrays, `forward(ctx, *arrays, **params)` and `backward(ctx, dy)`.

    `backward` returns one gradient per input, None where `ctx.needs_grad` says that it is not needed. It must not
    write into `dy`: other paths may hold it. fresh: whether its gradients are always new arrays, held by nobody else.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    fresh = False

    @classmethod
    def apply(cls, *inputs: Tensor | None, **params: Any) -> Tensor:
        """Run forward on the inputs' arrays; the result remembers this op if an input requires a gradient."""
        node = Node(cls, inputs, params)
        arrays = [None if t is None else t.array for t in inputs]
        for hook in state.hooks:
            hook.forward_pre(node, arrays)
        array = _as_array(cls.forward(node, *arrays, **params))
        for hook in reversed(state.hooks):
            hook.forward_post(node, arrays, array)
        y = Tensor(array, recorded := True in node.needs_grad, node if recorded else None)
        place, places = _memory(array), [(t, _memory(t.array)) for t in inputs if t is not None]
        y.version = next((t.version for t, at in places if at == place), y.version)
        saved = {_memory(a) for a in node.saved_for_backward or ()} if recorded else ()
        node.versions = [(t.version, t.version[0]) for t, at in (*places, (y, place)) if at in saved]
        return y


def _as_array(value: Any) -> Any:
    if type(value) is not np.ndarray and not hasattr(value, "strides"):
        raise TypeError(f"Tensor() wraps an array, not a {type(value).__name__}: use minires.tensor(...)")
    return np.asarray(value) if isinstance(value, np.generic) else value  # NumPy's 0-d results are scalars


def _memory(array: Any) -> int:
    """The same number for arrays that show the same memory."""
    return id(array if (base := getattr(array, "base", None)) is None else base)


def _walk_back(root: Vertex, dy: Any, retain_graph: bool) -> None:
    """Visit every vertex below `root` once, after all of its consumers, with its whole gradient."""
    grads: dict[Vertex, Any] = {}  # the gradient so far, and whether its memory is ours to write into
    leaves: list[Tensor] = []
    queue: list[tuple[int, Node]] = []  # the last made node first

    def give(vertex: Vertex, share: Any, ours: bool) -> None:
        if grads.get(vertex):  # the residual add hands one array to both inputs: only what is ours is written into
            total, owned = grads[vertex]
            total, share = (total, share) if owned else (share, total)
            share, ours = (accumulate(total, share) if owned or ours else total + share), True
        elif vertex not in grads:
            leaves.append(vertex) if isinstance(vertex, Tensor) else heapq.heappush(queue, (-vertex.number, vertex))
        grads[vertex] = share, ours

    def visit(node: Node) -> None:
        dy, _ = _hooked(node.grad_hooks, *grads.pop(node))
        if (tensor := node.retaining()) is not None:
            tensor._add_grad(dy, False)
        for hook in state.hooks:
            hook.backward_pre(node, dy)
        vars(node)["elsewhere"] = {} if state.hooks else grads  # hooks are shown every share by itself
        shares = node.backward(dy)
        for hook in reversed(state.hooks):
            hook.backward_post(node, dy, shares)
        for slot, (vertex, share) in enumerate(zip(node.inputs, shares, strict=True)):
            if vertex is not None and share is not None:
                for hook in state.hooks:
                    hook.addend(vertex, node, slot, share)
                give(vertex, share, node.fn.fresh and not state.hooks)  # hooks may keep what they see
        if not retain_graph:
            node.free()

    give(root, dy, False)
    while queue:
        visit(heapq.heappop(queue)[1])
    for leaf in leaves:
        leaf._add_grad(*_hooked(leaf.grad_hooks, *grads.pop(leaf)))


def _hooked(hooks: dict[int, Callable], grad: Any, ours: bool) -> tuple[Any, bool]:
    for hook in list(hooks.values()):
        given = grad if (replaced := hook(Tensor(grad))) is None else replaced.array
        if (given.shape, given.dtype) != (grad.shape, grad.dtype):
            raise RuntimeError(f"a hook must keep {grad.dtype} {grad.shape}, not give {given.dtype} {given.shape}")
        grad, ours = given, False  # the hook may hold it
    return grad, ours
