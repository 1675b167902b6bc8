"""Whether the launches of a module's forward and backward compute what its ops do: found out on a copy of it.

The copy runs three times, so that neither weights nor buffers nor what watches them is touched:

    1. as it is, on other numbers        what comes out, and how long each array lives, of which a plan is made
    2. noted, in memory of that plan     on the module's numbers and the input that was given
    3. by launches, on the numbers of 1  what comes out must be the same bits

Other numbers are parameters and buffers times a factor of 0.5 to 1.5 for each element, counts one higher, and random
images: what NumPy computes of any of them, and is not called again, is seen. In the end the launches are given the
module's memory for the copy's. They are refused, too, where the module cannot be copied, or raises; where a random
number is drawn, or a number of a tensor read (`item`, `if`); where forward writes into parameters or keeps what it
makes; and where something learns that is no parameter of the module.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..dispatch import Launches, Needs, dense_order, release_freed_memory, taken_from
from ..engine import Function, Node, Tensor, state
from ..nn.module import Module
from ..random import get_rng_state, set_rng_state
from .launched import random_like


def rehearsed(model: Module, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Any, list[int]] | None:
    """The launches of forward and backward, the second of which take dy, too; and how often forward writes into each
    buffer. None where the module must run itself. tensors: its floating parameters."""
    if dense_order(x.array) is None or not any(t.requires_grad for t in tensors):
        return None
    try:
        copied = copy.deepcopy(model)
    except Exception:  # a user's module may hold anything, of which a copy may raise anything
        return None
    twin = _Twin(copied, model, x.requires_grad)
    if not twin.lies_alike():
        return None
    outside, numbers = _Outside(), random_like([x.array], 1)[0]
    with outside, np.errstate(all="ignore"), contextlib.suppress(_Raised):
        twin.disturb()
        needs = Needs()
        with taken_from(needs):
            results = twin.run(numbers, None)
        if results is None or not twin.is_clean() or outside.was_used():
            return None
        wanted, upstream = _digest([*results, *twin.buffers]), twin.upstream
        plan = needs.plan([a for a in results[1:] if a is not None])
        del results
        release_freed_memory()  # the plan takes its place
        twin.undisturb()
        versions = [t.version[0] for t in twin.module.buffers()]
        launches = Launches(lambda noting: twin.run(x.array, upstream, noting.mark) or [], [x.array, upstream], plan)
        writes = [t.version[0] - before for t, before in zip(twin.module.buffers(), versions, strict=True)]
        if launches.pool.exceeded or not launches.results or not all(map(_is_run, launches.results)):
            return None
        twin.disturb()
        launches.repeat([0, 1], [numbers, upstream])
        if wanted != _digest([*launches.results, *twin.buffers]) or outside.was_used():
            return None
        launches.move(list(zip(twin.arrays, twin.originals, strict=True)))
        return launches, writes
    return None


class _Raised(Exception):
    """What the module's ops said of numbers that nobody gave them, or of the user's, to whom they will say it again."""


@contextlib.contextmanager
def _of_ops() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of code that is not ours to know
        raise _Raised from error


class _Twin:
    """A copy of a module, whose numbers may be others."""

    def __init__(self, copied: Module, model: Module, of_input: bool):
        self.module, self.of_input, self.upstream = copied, of_input, None
        self.tensors = [t for t in self.module.parameters() if t.dtype.kind in "fV"]
        self.buffers = [t.array for t in self.module.buffers()]
        self.originals = [t.array for t in (*model.parameters(), *model.buffers())]
        self.arrays = [t.array for t in (*self.module.parameters(), *self.module.buffers())]
        for t in self.tensors:
            t.grad, t.grad_hooks = None, {}
        self.parts = described(self.module)

    def lies_alike(self) -> bool:
        """Whether every array is one run of memory of its own, and its original like it."""
        pairs = list(zip(self.arrays, self.originals, strict=True))
        alike = all(type(b) is np.ndarray and a.strides == b.strides and dense_order(b) is not None for a, b in pairs)
        spans = sorted(np.lib.array_utils.byte_bounds(b) for b in self.originals) if alike else []
        return alike and all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))

    def others(self) -> Iterator[np.ndarray]:
        """Other numbers than the module's; the same each time."""
        numbers = np.random.default_rng(0)
        for a in self.originals:
            if a.dtype.kind in "iu":
                yield a + 1
            else:
                other = numbers.random(a.shape, np.float32)  # and no more memory: the peak of a process is here
                other += 0.5
                yield np.multiply(other, a, out=other, casting="unsafe").astype(a.dtype, copy=False)

    def disturb(self) -> None:
        """Give it those."""
        for a, other in zip(self.arrays, self.others(), strict=True):
            a[...] = other

    def undisturb(self) -> None:
        """Those of the module."""
        for a, original in zip(self.arrays, self.originals, strict=True):
            a[...] = original

    def run(self, array: Any, upstream: Any, halt: Callable[[], Any] = lambda: None) -> list[Any] | None:
        """y and the gradients of x and the parameters, None where there is none; halt() is called between forward and
        backward. None where the module does not return one tensor of which these are all gradients."""
        state.casts = None if state.casts is None else {}  # what was cast of other numbers
        x, first = Tensor(array, self.of_input), Node(Function, (), {}).number
        with _of_ops():
            y: Any = self.module(x)
        if not isinstance(y, Tensor) or y.node is None or type(y.array) is not np.ndarray or y.statistics is not None:
            return None
        if not _leaves(y.node, first) <= {id(t) for t in (x, *self.tensors)}:
            return None
        halt()
        if upstream is None:
            upstream = self.upstream = random_like([np.empty(y.shape, y.dtype)], 4)[0]
        with _of_ops():
            y.backward(upstream)
        found = [None if t.grad is None else t.grad.array for t in (x, *self.tensors)]
        for t in self.tensors:
            t.grad = None
        state.casts = state.casts and {}
        return [y.array, *found]

    def is_clean(self) -> bool:
        """Whether the run wrote into no parameter, replaced no array and kept nothing."""
        buffers = {id(a) for a in self.buffers}
        pairs = zip(self.arrays, self.others(), strict=True)
        same = all(id(a) in buffers or a.tobytes() == other.tobytes() for a, other in pairs)
        arrays = [t.array for t in (*self.module.parameters(), *self.module.buffers())]
        in_place = len(arrays) == len(self.arrays) and all(a is b for a, b in zip(arrays, self.arrays, strict=True))
        return same and in_place and not differ(self.parts, described(self.module))


class _Outside:
    """What a forward may change beside its module: within it gradients, casts and random numbers are put back."""

    def __enter__(self) -> _Outside:
        self.casts, self.before = state.casts, self._numbers()
        return self

    def __exit__(self, *_: object) -> None:
        state.casts = self.casts
        if self.was_used():
            ours, pythons, numpys, _ = self.before
            set_rng_state(ours)
            random.setstate(pythons)
            np.random.set_state(numpys)  # noqa: NPY002  (what a user's module may have drawn from)

    def was_used(self) -> bool:
        """Whether a random number was drawn, or a number of a tensor read, on which a forward could decide."""
        return repr(self.before) != repr(self._numbers())

    def _numbers(self) -> tuple:
        return get_rng_state(), random.getstate(), np.random.get_state(), state.reads  # noqa: NPY002


def _leaves(node: Node, first: int) -> set[int]:
    """The ids of the leaves below a node; 0 among them where a node is older than number `first`."""
    found, waiting, seen = set[int](), [node], {node}
    while waiting:
        at = waiting.pop()
        if at.number < first:
            found.add(0)
        for below in at.inputs:
            if isinstance(below, Tensor):
                found.add(id(below))
            elif below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)
    return found


def _is_run(a: Any) -> bool:
    """Whether it is None, or an array that is one run of memory, and not a part of what was given."""
    return a is None or (type(a) is np.ndarray and dense_order(a) is not None)


def _digest(arrays: Sequence[Any]) -> list[Any]:
    """Of the bits of each."""
    return [None if a is None else hashlib.blake2b(a.tobytes()).digest() for a in arrays]


def described(model: Module) -> list[Any]:
    """A network's modules and what they hold, to be compared by `differ`."""
    return [part for module in model.modules() for part in (module, *_parts(vars(module)))]


def _parts(value: Any, depth: int = 0) -> Iterator[Any]:
    if isinstance(value, dict) and depth < 4:
        for name, item in value.items():
            yield name
            yield from _parts(item, depth + 1)
    elif isinstance(value, (list, tuple, set)) and depth < 4:
        yield len(value)
        for item in value:
            yield from _parts(item, depth + 1)
    else:
        yield value


def differ(a: list[Any], b: list[Any]) -> bool:
    """Whether two descriptions are of different things: numbers and names by value, everything else by identity."""
    return len(a) != len(b) or not all(map(_same, a, b))


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (bool, int, float, str)) and a == b)
