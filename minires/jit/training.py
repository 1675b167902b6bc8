"""Forward and backward of a module as launches: what `Traced` does where gradients are wanted, on the CPU.

    model = minires.jit.trace(model)
    loss = cross_entropy(model(x), targets)     the model's forward: calls of compiled functions, and no ops
    loss.backward()                             its backward: one node, and calls again

For the inputs' first shape from the first call on, the module is one op, `Repeated`: its inputs are x and every
parameter, and its arrays lie where a plan puts them (kernels/cpu/pools.py). That saves what Python does around kernels,
and memory that is new to the cache (AMX, ResNet-20 in bfloat16: 0.70 of a step's time, ResNet-50 in float32: 0.88).
What is called is noted on a copy of the module, and compared with the ops (rehearsal.py).

The module itself runs where that finds a difference, and where anything watches or chooses kernels when forward begins;
for another shape that comes once (the last batch); and while an earlier forward still waits for its backward, whose
activations must stay. Gradients lie in memory of their own, into which the next backward writes, unless somebody still
holds them, as where they are accumulated: then the new ones are copies.

What a forward takes from elsewhere (a global, an object that is no module) is taken as it was: as a CUDA graph does.

Source: what is noted and when is torch.cuda.make_graphed_callables', for the CPU.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..dispatch import get_num_threads, is_plain, layout, order_of, release_freed_memory
from ..engine import Function, Tensor, state
from ..nn.module import Module
from .rehearsal import described, differ, rehearsed

# Calls of one shape before a try: of a module's first at once, while its gradients and the optimizer's state take no
# memory yet, of others later and later.
_CALLS = (1, 4, 8, 16, 32, 64, math.inf)


class Training:
    """A module's forward and backward, where they can be launches: for inputs of one layout at a time.

    step: they, if there are any.
    """

    def __init__(self) -> None:
        self.step: Passes | None = None
        self._lock = threading.RLock()
        self._forget([])
        self._changes = -1

    def __reduce__(self) -> Any:
        return Training, ()  # a copy begins anew

    def __call__(self, model: Module, x: Tensor) -> Tensor | None:
        """What the module returns, as one op; None where the module is to run itself."""
        if state.hooks or not is_plain() or x.statistics is not None:
            return None
        if type(x.array) is not np.ndarray or x.dtype.kind not in "fV" or not x.array.size:
            return None
        with self._lock:
            self._look(model)
            key: Any = layout(x.array), x.requires_grad, *state.autocast.items(), state.fuse, get_num_threads()
            key = *key, *[t.requires_grad for t in self._tensors]
            self._times = self._times + 1 if key == self._last else 1
            self._last = key
            if self.step is not None and not self.step.is_in_place():
                self.step = self._key = None
            if key != self._key and self._times >= _CALLS[self._tries]:
                self._try(model, x, key)
            if self.step is None or key != self._key or self.step.waits():
                return None
            return Repeated.apply(x, *self._tensors, step=self.step)

    def _try(self, model: Module, x: Tensor, key: Any) -> None:
        if any(m._forward_pre_hooks or m._forward_hooks or m._backward_hooks for m in model.modules()):
            return
        self.step = self._key = None  # before there is memory for another
        self._tries += 1
        launches = rehearsed(model, x, self._tensors)
        release_freed_memory()  # the copy's
        if launches is not None:
            self.step, self._key = Passes(*launches, self._tensors, [*model.buffers()]), key

    def _look(self, model: Module) -> None:
        """Forget everything if the module is not what it was."""
        if self._changes == Module._changes and self._described[:1] == [model]:
            return
        self._changes, now = Module._changes, described(model)
        if differ(now, self._described):
            self._forget(now)
            self._tensors = [t for t in model.parameters() if t.dtype.kind in "fV"]

    def _forget(self, now: list[Any]) -> None:
        """now: what the module is. The keys are of the step and of the last call, which was the how manieth of its."""
        self._described, self.step, self._tries, self._times = now, None, 0, 0
        self._key: Any = None
        self._last: Any = None
        self._tensors: Sequence[Tensor] = []


class Passes:
    """Launches of forward and backward. writes: how often forward writes into each of the buffers."""

    def __init__(self, launches: Any, writes: list[int], tensors: Sequence[Tensor], buffers: list[Tensor]):
        self.launches, self.tensors = launches, tensors
        self.written = [(t, n) for t, n in zip(buffers, writes, strict=True) if n]
        self.read = [t for t, n in zip(buffers, writes, strict=True) if not n]
        self.arrays = [(t, t.array) for t in (*tensors, *buffers)]
        self._lock, self._waiting = threading.RLock(), lambda: None
        self._given: list[Any] = []  # weak, what the last gradients were shown by

    def is_in_place(self) -> bool:
        """Whether parameters and buffers lie where they did."""
        return all(t.array is array for t, array in self.arrays)

    def waits(self) -> bool:
        """Whether the activations are those of a forward whose backward may still come."""
        return self._waiting() is not None

    def forward(self, ctx: Any, x: Any) -> Any:
        """y"""
        with self._lock:
            self._waiting = weakref.ref(ctx)
            self.launches.repeat([0], [x])
            for t, count in self.written:
                t.version[0] += count
            ctx.buffers = [(t, t.version[0]) for t in self.read]
            return self.launches.results[0].copy("K")

    def backward(self, ctx: Any, x: Any, dy: Any) -> list[Any]:
        """The gradients of x and the tensors, None where none is needed."""
        with self._lock:
            if self._waiting() is not ctx:  # a second time, with retain_graph: the first wrote over the activations
                self._again(ctx, x)
            self._waiting = lambda: None
            y, *mine = self.launches.results
            inputs = [self.launches.apart(a) for a in (x, np.ascontiguousarray(dy, y.dtype))]  # these may be gradients
            if any(owner() is not None for owner in self._given):
                with _kept(g for g in mine if g is not None):
                    self.launches.repeat([1], inputs)
                    return [None if g is None else g.copy("K") for g in mine]
            self.launches.repeat([1], inputs)
            shown = [None if g is None else _shown(g) for g in mine]
            self._given = [weakref.ref(g.base) for g in shown if g is not None]
            return shown

    def _again(self, ctx: Any, x: Any) -> None:
        """Forward as it was, but for what it writes into buffers."""
        if any(t.version[0] != then for t, then in ctx.buffers):
            raise RuntimeError("backward of a traced module needs a buffer that was written into after forward")
        with _kept(t.array for t, _ in self.written):
            self.launches.repeat([0], [x])


class Repeated(Function):
    """y = model(x) by launches. The tensors after x are the model's parameters."""

    fresh = True

    @staticmethod
    def forward(ctx, x, *parameters, step: Passes):
        ctx.save_for_backward(x, *parameters)  # these are read where they lie: they are named so that a write is seen
        return step.forward(ctx, x)

    @staticmethod
    def backward(ctx, dy):
        gradients = ctx.params["step"].backward(ctx, ctx.saved_for_backward[0], dy)
        return tuple(g if needed else None for g, needed in zip(gradients, ctx.needs_grad, strict=True))


@contextlib.contextmanager
def _kept(arrays: Iterable[np.ndarray]) -> Iterator[None]:
    """These are in the end what they were, also after an interrupt."""
    pairs = [(a, a.copy("K")) for a in arrays]
    try:
        yield
    finally:
        for a, before in pairs:
            a[...] = before


def _shown(a: np.ndarray) -> np.ndarray:
    """The same memory, by an owner that lives as long as anything that shows it."""
    flat: Any = a.transpose(order_of(a)).reshape(-1).view(np.uint8)
    owner = np.frombuffer(memoryview(flat), np.uint8)
    return np.ndarray(a.shape, a.dtype, owner, strides=a.strides)
