"""What a call of a module ran: the ops, the arrays that they took from outside, and how they are run again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

from ..dispatch import constants, is_plain
from ..engine import Tensor
from ..hooks.base import Hook
from ..nn.module import Module
from .launched import launched


class Step(NamedTuple):
    """An op: forward(ctx, *the values numbered `inputs`, **params) is the value numbered `output`.

    done: the numbers of values that no later op reads.
    """

    function: Any
    params: dict[str, Any]
    inputs: tuple[int, ...]
    output: int
    done: tuple[int, ...]

    def run(self, values: list[Any]) -> None:
        """Compute its value, and let go of those that it was the last to read."""
        values[self.output] = self.function.forward(_Context(), *[values[n] for n in self.inputs], **self.params)
        for n in self.done:
            values[n] = None


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
        return self._returned(self.run([x.array for x in inputs]))

    def run(self, arrays: Sequence[Any], watch: Callable[[int, Any], Any] = lambda number, value: None) -> list[Any]:
        """The same on arrays. watch: called with each value."""
        values = self.values_with(arrays)
        with self.constants.held():
            for step in self.steps:
                step.run(values)
                watch(step.output, values[step.output])
        return [values[n] for n in self.outputs]

    def values_with(self, inputs: Sequence[Any]) -> list[Any]:
        """All values by their numbers: constants, these inputs, and None for what is to be computed."""
        return [*inputs, *self.values[len(inputs) :]]

    def relaunch(self, inputs: list[Any]) -> Any:
        """The compiled functions again that the ops run (`launched`); None where that cannot be."""
        if not is_plain():
            return None
        if self.launches is None:
            self.launches = launched(self, inputs)
        results = self.launches.run(inputs) if self.launches and self.launches.takes(inputs) else None
        return None if results is None else self._returned(results)

    def _returned(self, arrays: list[Any]) -> Any:
        results = [Tensor(a) for a in arrays]
        return self.make(results) if self.make else results[0]


class _Write:
    """x, after x[index] = value."""

    @staticmethod
    def forward(ctx: Any, x: Any, value: Any, *, index: Any) -> Any:
        x[index] = value
        return x


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
