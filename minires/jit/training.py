"""Forward and backward of a module as launches: what `Traced` does where gradients are wanted, on the CPU.

    model = minires.jit.trace(model)
    loss = cross_entropy(model(x), targets)     the model's forward: calls of compiled functions, and no ops
    loss.backward()                             its backward: one node, and calls again

From the third call for inputs of one shape on, the module is one op, `Repeated`: its inputs are x and every parameter,
and its arrays lie where a plan puts them (kernels/cpu/pools.py). That saves what Python does around kernels, and
memory that is new to the cache (AMX, ResNet-20 in bfloat16: 0.68 of a step's time, ResNet-50 in float32: 0.91).

At the second call the module runs three times on random numbers: once to see how long each array lives and what comes
out, with all parameters negated, so that nothing made of them before could pass; once to be noted; and once as
launches, on what the first was given. Where these differ by a bit from the ops, the module goes on as it is: so does
what draws random numbers, reads those of a tensor (`item`, `if`), has hooks, or computes with NumPy. Buffers are put
back, and hold what one call makes them. What cannot be seen is a forward that decides by `x.array` or by a generator of
its own.

Gradients lie in memory of their own, into which the next backward writes: `p.grad` is moved out of the way before if it
is still there, as when gradients are accumulated. Activations are those of the last forward; a backward of an earlier
one runs the forward again first.

Source: what is noted and when is CUDA graphs' (torch.cuda.make_graphed_callables), for the CPU.
"""

from __future__ import annotations

import hashlib
import random
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..dispatch import Launches, Needs, dense_order, get_num_threads, is_plain, layout, release_freed_memory, taken_from
from ..engine import Function, Tensor, state
from ..nn.module import Module
from ..random import get_rng_state, set_rng_state
from .launched import random_like


class Training:
    """A module's forward and backward, where they can be launches: for inputs of one layout at a time.

    step: they. Another shape that comes once (the last batch) leaves them as they are; a second time, they are its.
    """

    def __init__(self, model: Module):
        self.model, self._lock = model, threading.RLock()
        self._changes, self._described = -1, list[Any]()
        self._tensors: list[Tensor] = []
        self.step: Step | None = None
        self._key = self._last = self._refused = None  # of the step, of the last call, of the last try in vain

    def __call__(self, x: Tensor) -> Tensor | None:
        """What the module returns, as one op; None where the module is to run itself."""
        if state.hooks or not is_plain() or type(x.array) is not np.ndarray or x.dtype.kind not in "fV":
            return None
        with self._lock:
            self._look()
            key: Any = layout(x.array), x.requires_grad, *state.autocast.items(), state.fuse, get_num_threads()
            key = *key, *[t.requires_grad for t in self._tensors]
            if self.step is not None and not self.step.is_in_place():
                self.step = self._key = None
            if key != self._key and key == self._last and key != self._refused:
                self.step = self._key = None  # before there is memory for another
                self.step = self._noted(x)
                self._key, self._refused = (None, key) if self.step is None else (key, None)
            self._last = key
            return Repeated.apply(x, *self._tensors, step=self.step) if key == self._key else None

    def _look(self) -> None:
        """Forget everything if the module is not what it was."""
        if self._changes == Module._changes:
            return
        self._changes, described = Module._changes, _described(self.model)
        if len(described) != len(self._described) or not all(map(_same, described, self._described)):
            self._described, self.step = described, None
            self._key = self._last = self._refused = None
            self._tensors = [t for t in self.model.parameters() if t.dtype.kind in "fV"]

    def _noted(self, x: Tensor) -> Step | None:
        """The launches; None where the ops do more than run compiled functions."""
        hooked = any(m._forward_pre_hooks or m._forward_hooks or m._backward_hooks for m in self.model.modules())
        learned = any(t.requires_grad for t in self._tensors)
        if hooked or not learned or not x.array.size or dense_order(x.array) is None:
            return None
        with _Undisturbed(self.model, self._tensors) as saved, np.errstate(all="ignore"):
            (first, second), upstream = (random_like([x.array], seed) for seed in (1, 2)), list[Any]()

            def compute(array: Any, halt: Callable[[], Any] = lambda: None) -> list[Any]:
                image = Tensor(array, x.requires_grad)
                y: Any = self.model(image)
                if not isinstance(y, Tensor) or not y.requires_grad or type(y.array) is not np.ndarray:
                    raise TypeError("one tensor with a gradient is wanted")
                halt()
                if not upstream:
                    upstream.extend(random_like([np.empty(y.shape, y.dtype)], seed)[0] for seed in (1, 2))
                y.backward(upstream[array is second[0]])
                return [y.array, *_taken([image, *self._tensors])]

            saved.negate()
            needs = Needs()
            try:
                with taken_from(needs):
                    results = compute(second[0])
            except Exception:
                # Whatever an op says of numbers that nobody gave it. With the user's it goes on as before.
                return None
            wanted = _digest([*results, *saved.buffers])
            plan = needs.plan([a for a in results[1:] if a is not None])
            del results
            saved.restore()
            release_freed_memory()  # in the place of which the plan's is
            inputs = [first[0], upstream[0]]
            launches = Launches(lambda noting: compute(first[0], noting.mark), inputs, plan)
            written = [(t, t.version[0] - count) for t, count in saved.versions]
            step = Step(launches, self.model, self._tensors, [(t, n) for t, n in written if n])
            saved.restore()
            saved.negate()
            launches.repeat([0, 1], [second[0], upstream[1]])
            made = all(a is None or type(a) is np.ndarray for a in launches.results)  # not a part of what was given
            alike = made and wanted == _digest([*launches.results, *saved.buffers]) and saved.nothing_else()
        return step if alike and not launches.pool.exceeded else None


class Step:
    """Launches of forward and backward. written: the buffers that forward writes into, and how often."""

    def __init__(self, launches: Any, model: Module, tensors: Sequence[Tensor], written: list[tuple[Tensor, int]]):
        self.launches, self.tensors, self.written = launches, tensors, written
        self.arrays = [(t, t.array) for t in (*tensors, *model.buffers())]
        self.lock, self._last = threading.Lock(), lambda: None

    def is_in_place(self) -> bool:
        """Whether parameters and buffers lie where they did."""
        return all(t.array is array for t, array in self.arrays)

    def forward(self, ctx: Any, x: Any) -> Any:
        """y; the activations are those of `ctx` then."""
        with self.lock:
            self.launches.repeat([0], [x])
            self._last = weakref.ref(ctx)
            for t, count in self.written:
                t.version[0] += count
            return self.launches.results[0].copy("K")

    def backward(self, ctx: Any, x: Any, dy: Any) -> list[Any]:
        """The gradients of x and the tensors, None where none is needed."""
        with self.lock:
            if self._last() is not ctx:  # another forward was in between
                before = [t.array.copy() for t, _ in self.written]
                self.launches.repeat([0], [x])
                for (t, _), array in zip(self.written, before, strict=True):
                    t.array[...] = array
            self._last = lambda: None  # backward writes over them
            for t, mine in zip(self.tensors, self.launches.results[2:], strict=True):
                if mine is not None and t.grad is not None and np.may_share_memory(t.grad.array, mine):
                    t.grad.array = t.grad.array.copy()
            self.launches.repeat([1], [x, np.ascontiguousarray(dy)])
            return self.launches.results[1:]


class Repeated(Function):
    """y = model(x) by launches. The tensors after x are the model's parameters."""

    fresh = True

    @staticmethod
    def forward(ctx, x, *parameters, step: Step):
        ctx.save_for_backward(x, *parameters)  # these are read where they lie: they are named so that a write is seen
        return step.forward(ctx, x)

    @staticmethod
    def backward(ctx, dy):
        gradients = ctx.params["step"].backward(ctx, ctx.saved_for_backward[0], dy)
        return tuple(g if needed else None for g, needed in zip(gradients, ctx.needs_grad, strict=True))


class _Undisturbed:
    """Within it a module may be run on any numbers; afterwards it is as it was: buffers, gradients, random numbers."""

    def __init__(self, model: Module, tensors: Sequence[Tensor]):
        self.tensors = tensors
        self.parameters = [t.array for t in tensors if t.array.size and t.array.flags.writeable]
        self.signs = [np.signbit(array.flat[0]) for array in self.parameters]
        self.versions = [(t, t.version[0]) for t in (*tensors, *model.buffers())]
        self.buffers = [t.array for t in model.buffers()]

    def __enter__(self) -> _Undisturbed:
        self.before, self.numbers, self.seen = [a.copy() for a in self.buffers], get_rng_state(), _seen()
        self.grads = [(t, t.grad, t.grad_hooks) for t in self.tensors]
        self.casts, state.casts = state.casts, None  # a weight that was cast before would not be cast again
        for t in self.tensors:
            t.grad, t.grad_hooks = None, {}
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
        state.casts = self.casts
        set_rng_state(self.numbers)
        for t, grad, hooks in self.grads:
            t.grad, t.grad_hooks = grad, hooks

    def negate(self) -> None:
        """All parameters times -1, which can be undone without a copy, and counts one more."""
        for array in self.parameters:
            np.negative(array, out=array)
        for array in self.buffers:
            if array.dtype.kind in "iu":
                array += 1

    def restore(self) -> None:
        """What was written into."""
        for array, sign in zip(self.parameters, self.signs, strict=True):  # also where it was interrupted
            if np.signbit(array.flat[0]) != sign:
                np.negative(array, out=array)
        for array, before in zip(self.buffers, self.before, strict=True):
            array[...] = before
        for t, count in self.versions:
            t.version[0] = count

    def nothing_else(self) -> bool:
        """Whether no random number was drawn, and no number of a tensor read, on which a forward could decide."""
        return self.seen == _seen()


def _seen() -> list[Any]:
    """What changes where Python draws random numbers, or reads a tensor's."""
    numpys = repr(np.random.get_state())  # noqa: NPY002  (what a user's module may draw from)
    return [repr(get_rng_state()), random.getstate(), numpys, state.reads]


def _taken(tensors: Iterable[Tensor]) -> list[Any]:
    """The gradients' arrays, None where there is none; the tensors have none any more."""
    found = [(t, None if t.grad is None else t.grad.array) for t in tensors]
    for t, _ in found:
        t.grad = None
    return [array for _, array in found]


def _digest(arrays: Sequence[Any]) -> list[Any]:
    """Of the bits of each."""
    return [None if a is None else hashlib.blake2b(a.tobytes()).digest() for a in arrays]


def _described(model: Module) -> list[Any]:
    """The modules of a network and what they hold: numbers, and everything else by identity."""
    found: list[Any] = []
    for module in model.modules():
        found.append(module)
        for name, value in vars(module).items():
            found += [name, *(value.items() if isinstance(value, dict) else [value])]
    return [part for item in found for part in (item if isinstance(item, tuple) else (item,))]


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (bool, int, float, str)) and a == b)
