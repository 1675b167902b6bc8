"""Inference without most of its Python: what a module computes is recorded once, and then only its ops run.

    fast = minires.jit.trace(minires.nn.fuse_for_inference(model))
    with minires.no_grad():
        y = fast(x)                  the first call records, the second checks, from the third on launches are replayed

Around the kernel of a convolution that takes 1 ms there are 0.1 ms of Python: modules call modules, arguments are
looked at, a policy is asked for its precision. For inputs of the same shapes it all comes out the same. A recording
keeps of each op its `Function.forward`, its parameters, and which arrays it takes and makes; what depends on weights
alone (a filter in bfloat16) is computed once. A ResNet-20's forward pass takes 0.83 of the time, a ResNet-50's 0.91.

Of that, on the CPU, the third call notes which compiled functions were called with which memory, and later ones call
them again (kernels/cpu/launches.py): a ResNet-20 takes 0.8 of the time that is left, a ResNet-50 0.92, single images
0.16 to 0.75. The ops run instead where they did anything more, which is seen on random numbers; while kernels are
chosen, measured or observed; and in a second thread at the same time. Results are copies.

There is a recording per shapes, dtypes and devices of the inputs and per precision. It is made again when a weight was
replaced or written into by anything that `Tensor.version` counts, or when a module was changed. The module itself runs
wherever there is more to do than compute: with gradients, in training mode, with hooks or `capture`, and for arguments
that are not tensors. What a recording cannot see is a forward that computes outside of ops (NumPy, indices such as
argmax's), or decides by values: the second call compares it with the module, and raises where they differ.

Source: the name, and `check_trace`, are torch.jit.trace's; the rules when to record anew torch.compile's guards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .device import CPU, to_device
from .dispatch import Launches, constants, dense_order, is_plain
from .engine import Tensor, state
from .hooks.base import Hook
from .nn.module import Module

_MOST = 16  # recordings of a trace; the oldest makes place
_MOST_BYTES = 1 << 28  # that launches may keep


class Step(NamedTuple):
    """An op: forward(ctx, *the values numbered `inputs`, **params) is the value numbered `output`.

    done: the numbers of values that no later op reads.
    """

    function: Any
    params: dict[str, Any]
    inputs: tuple[int, ...]
    output: int
    done: tuple[int, ...]


class Traced(Module):
    """A module that computes what `model` does, from recordings. See the head of this page."""

    def __init__(self, model: Module, check_trace: bool = True):
        super().__init__()
        self.model, self.check_trace = model, check_trace
        self.recordings: dict[Any, Recording] = {}
        self.train(model.training)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What `model(*inputs, **options)` returns."""
        if state.grad_enabled or state.hooks or options or not all(isinstance(x, Tensor) for x in inputs):
            return self.model(*inputs, **options)
        twice = [i for i, x in enumerate(inputs) if any(x.array is y.array for y in inputs[:i])]
        key = (*[(x.shape, x.dtype, x.device) for x in inputs], *twice, *state.autocast.items(), state.fuse)
        recording = self.recordings.get(key)
        if recording is None or recording.is_stale():
            if any(map(_does_more, self.model.modules())):
                return self.model(*inputs)
            self.recordings.pop(key, None)
            while len(self.recordings) >= _MOST:
                self.recordings.pop(next(iter(self.recordings)), None)
            self.recordings[key], result = record(self.model, inputs)
            return result
        arrays = [x.array for x in inputs]
        if (recording.checked or not self.check_trace) and (results := recording.relaunch(arrays)) is not None:
            return results
        to_check = self.check_trace and not recording.checked
        twins = [Tensor(x.array.copy("K")) for x in inputs] if to_check else []  # the ops may write into their inputs
        y = recording.replay(inputs)
        if to_check:
            if not _same(y, self.model(*twins)):
                self.recordings.pop(key, None)
                raise RuntimeError(
                    f"the recording of {type(self.model).__name__} does not compute what the module does: its forward "
                    "decides by values, or computes outside of minires' ops (argmax, NumPy); call the module itself"
                )
            recording.checked = True
        return y


def trace(model: Module, check_trace: bool = True) -> Traced:
    """A module that computes what `model` does under `no_grad`, with less Python: see the head of this page.

    model: in evaluation mode; usually what `nn.fuse_for_inference` made. It is not copied: its weights may change, and
    are seen. It returns a Tensor, or a tuple or list of them. Each of at most 16 recordings keeps the memory of a pass,
    up to 256 MiB; the launches of larger passes are not kept. check_trace: compare the second call of each recording
    with the module; RuntimeError where they differ, TypeError at the first for any other result.
    """
    return Traced(model, check_trace)


def record(model: Module, inputs: Sequence[Tensor]) -> tuple[Recording, Any]:
    """Call the module: the recording, and what the module returned."""
    weights = {id(t.array): t for t in (*model.parameters(), *model.buffers())}
    recording = Recording([*weights.values()])
    with recording.constants.held(), _Recorder() as seen:
        result: Any = model(*inputs)
    kind = type(result)
    results: Any = result if isinstance(result, (tuple, list)) else [result]
    if not all(isinstance(y, Tensor) for y in results):
        raise TypeError(f"a trace returns a Tensor, or a tuple or list of them, not {kind.__name__}")
    recording.make = getattr(kind, "_make", kind) if results is result else None
    recording.write_down(seen.calls, [x.array for x in inputs], [y.array for y in results])
    return recording, result


class Recording:
    """The ops that one call ran, and the arrays that they took from outside.

    make: what the results are put into; None for one Tensor.
    """

    make: Any = None
    checked = False
    launches: Any = None  # not yet tried; False where they cannot be

    def __init__(self, weights: list[Tensor]):
        self.changes, self.constants = Module._changes, constants([t.array for t in weights])
        self.weights = [(t, t.array, t.version[0]) for t in weights]

    def write_down(self, calls: list[tuple], inputs: list[Any], results: list[Any]) -> None:
        """Number the values; leave out what depends on no input."""
        numbers = {id(x): n for n, x in enumerate(inputs)}
        self.values: list[Any] = [None] * len(inputs)  # constants stay in it, the others are filled in by a replay
        varying, steps = set(numbers.values()), []

        def number(array: Any) -> int:
            if id(array) not in numbers:
                numbers[id(array)] = len(self.values)
                self.values.append(array)
            return numbers[id(array)]

        for function, params, arrays, y in calls:
            taken = tuple(map(number, arrays))
            if varying.isdisjoint(taken):
                continue
            numbers[id(y)] = len(self.values)  # after an op in place, of the same array
            varying.add(numbers[id(y)])
            self.values.append(None)
            steps.append((function, params, taken, numbers[id(y)]))
        self.outputs = tuple(map(number, results))
        needed, self.steps = set(self.outputs), list[Step]()
        for function, params, taken, output in reversed(steps):
            done = tuple(varying.intersection(taken) - needed)
            needed.update(taken)
            self.steps.insert(0, Step(function, params, taken, output, done))
        self.constants.add(self.values)

    def is_stale(self) -> bool:
        """Whether a weight or a module has changed since."""
        if self.changes != Module._changes:
            return True
        return any(t.array is not array or t.version[0] != count for t, array, count in self.weights)

    def replay(self, inputs: Sequence[Tensor]) -> Any:
        """The ops again, on other inputs."""
        values = self.values.copy()
        values[: len(inputs)] = [x.array for x in inputs]
        with self.constants.held():
            for function, params, taken, output, done in self.steps:
                values[output] = function.forward(_Context(), *[values[n] for n in taken], **params)
                for n in done:
                    values[n] = None
        return self._returned([values[n] for n in self.outputs])

    def relaunch(self, inputs: list[Any]) -> Any:
        """The compiled functions again that the ops run (`Launches`); None where that cannot be."""
        if not is_plain():
            return None
        if self.launches is None:
            self.launches = self._launches(inputs)
        results = self.launches.run(inputs) if self.launches and self.launches.takes(inputs) else None
        return None if results is None else self._returned(results)

    def _launches(self, inputs: list[Any]) -> Any:
        """They, noted in a run of the ops; False where the ops do more than run compiled functions, or where they take
        more memory than Python's time is worth. What they do is compared on other inputs than they were noted with."""
        if not inputs or not all(type(x) is np.ndarray and x.dtype.kind in "fV" and dense_order(x) for x in inputs):
            return False
        if sum(x.nbytes for x in inputs) > _MOST_BYTES // 4:  # copies are made of them, and a pass takes more
            return False

        def results_of(arrays: list[Any]) -> list[Any]:
            y = self.replay([Tensor(x) for x in arrays])
            return [t.array for t in (y if isinstance(y, (tuple, list)) else [y])]

        first, second, again = (_random(inputs, seed) for seed in (1, 2, 2))
        with np.errstate(all="ignore"):
            try:
                results_of(first)
                wanted = [*results_of(second), *second]
            except (
                Exception
            ):  # whatever an op says of numbers that nobody gave it: with the user's it goes on as before
                return False
            launches = Launches(lambda: results_of(first), first, _MOST_BYTES)
            results = launches.run(again)
        if results is None:
            return False
        alike = [a.tobytes() for a in [*results, *again]] == [b.tobytes() for b in wanted]
        return launches if alike else False

    def _returned(self, arrays: list[Any]) -> Any:
        results = [Tensor(a) for a in arrays]
        return self.make(results) if self.make else results[0]


class _Write:
    """x, after x[index] = value."""

    @staticmethod
    def forward(ctx: Any, x: Any, value: Any, *, index: Any) -> Any:
        x[index] = value
        return x


def _does_more(module: Module) -> bool:
    """Whether a call of the module is more than its ops."""
    return bool(module.training or module._forward_pre_hooks or module._forward_hooks or module._backward_hooks)


class _Context:
    """What a forward gets in a node's place: nothing is kept for backward."""

    needs_grad: ClassVar = defaultdict(bool)

    def save_for_backward(self, *arrays: Any) -> None:
        pass


class _Recorder(Hook):
    """Every op: (function, parameters, arrays, result). Arrays are kept, so that no two have the same id."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict[str, Any], list[Any], Any]] = []

    def forward_post(self, node: Any, arrays: Sequence[Any], y: Any) -> None:
        self.calls.append((node.fn, node.params, list(arrays), y))

    def written(self, array: Any, index: Any, value: Any) -> None:
        self.calls.append((_Write, {"index": index}, [array, value], array))


def _random(inputs: list[Any], seed: int) -> list[Any]:
    """Random numbers that lie like the inputs, each of which is one run of memory."""
    numbers, made = np.random.default_rng(seed), dict[int, Any]()
    for x in inputs:
        if id(x) not in made:  # the same may be given twice
            made[id(x)] = other = np.ndarray(x.shape, x.dtype, np.empty(x.nbytes, np.uint8), strides=x.strides)
            other[...] = numbers.standard_normal(x.shape).astype(x.dtype)
            other.flags.writeable = x.flags.writeable
    return [made[id(x)] for x in inputs]


def _same(a: Any, b: Any) -> bool:
    """Whether two results are the same bits."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and _bytes(a) == _bytes(b)
    return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))


def _bytes(x: Tensor) -> bytes:
    return to_device(x.array, CPU).tobytes()
