"""`minires.cuda`: whether there is a GPU, and CUDA graphs, under PyTorch's names.

A graph is a stretch of work, captured once as a list of launches and replayed as one. What it saves is the host's time:
a training step of ResNet-20 is some hundred launches of microseconds each, and Python needs longer for a launch.

    graph = minires.cuda.CUDAGraph()
    with minires.cuda.graph(graph):         # nothing runs in here; the launches are written down
        loss = step(images, labels)
    graph.replay()                          # runs them all: on the same memory, whatever lies in it now

Within a capture Python runs once, the GPU not at all; a replay runs the GPU, and no Python. Hence the rules:

- Memory is what it was: results of the captured code are overwritten by every replay, inputs are written into
  (`make_graphed_step` does it). Memory of the capture comes from a pool that the graph keeps; a replay allocates none.
- What the host knows anew at every step is `fed`: a learning rate, the key of dropout's numbers. Its function is asked
  again before every replay. A number passed to a kernel by value stays what it was at the capture; where it may change
  (a momentum), `held` says so, and a replay after a change is a RuntimeError.
- Nothing may wait for the GPU (`loss.item()`), and nothing may be copied from the host: either is a RuntimeError.

`make_graphed_step(step)` captures and replays a function of tensors by itself, and runs it as it is where it has to.
Source: CUDA C++ Programming Guide, "CUDA Graphs"; PyTorch's torch.cuda.CUDAGraph, torch.cuda.graph.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .device import Device, array_module, cuda_is_available, device, device_of, is_cuda_array
from .random import default_generator, get_rng_state, set_rng_state
from .state import state

__all__ = ["CUDAGraph", "GraphedStep", "fed", "fed_numbers", "graph", "held", "is_available"]
__all__ += ["is_current_stream_capturing", "make_graphed_step"]


class _Local(threading.local):
    """The graph that is being captured in this thread."""

    capturing: CUDAGraph | None = None


_local = _Local()
_lingering: list[
    Any
] = []  # pools of graphs that are gone, with arrays that are not: CuPy frees a pool's memory with it


def is_available() -> bool:
    """True where CuPy is installed, finds a GPU, and can compile for it."""
    return cuda_is_available()


def is_current_stream_capturing() -> bool:
    """Whether a graph is being captured in this thread."""
    return _local.capturing is not None


class CUDAGraph:
    """A captured stretch of work; `graph` captures it. See the page's head.

    device: whose work it is. Raises RuntimeError where there is no such device.
    """

    def __init__(self, device_: str | Device = "cuda"):
        self._graph: Any = None
        self._pool: Any = None
        self._fed: list[tuple[Any, Callable[[], Any]]] = []
        self._held: list[tuple[Callable[[], dict[str, Any]], dict[str, Any]]] = []
        self._drawn: dict[str, Any] = {}
        self._numbers: Any = None
        self._entered: contextlib.ExitStack | None = None
        self._stream: Any = None
        self.device = device(device_)
        self._xp: Any = array_module(self.device)

    def capture_begin(self, pool: Any = None, stream: Any = None) -> None:
        """From here on, work in this thread is written down and not done.

        pool: `pool()` of another graph that is never replayed while this one's results are needed. stream: the one to
        capture on; by default a new one. RuntimeError for a second capture, of this graph or within another one.
        """
        if is_current_stream_capturing():
            raise RuntimeError("a graph is being captured already; captures do not nest")
        if self._graph is not None:
            raise RuntimeError("this graph is captured already: make another one, or call reset()")
        cuda = self._xp.cuda
        gc.collect()  # what is collected within a capture may free memory, which breaks it off
        with contextlib.ExitStack() as stack:
            stack.enter_context(cuda.Device(self.device.index))
            cuda.Device(self.device.index).synchronize()
            self._pool = cuda.MemoryPool() if pool is None else pool
            self._stream = cuda.Stream(non_blocking=True) if stream is None else stream
            stack.enter_context(self._stream)
            stack.enter_context(cuda.using_allocator(self._pool.malloc))
            cuda.set_pinned_memory_allocator(_refuse_host)  # a copy from there would read memory that is gone by then
            stack.callback(cuda.set_pinned_memory_allocator, self._xp.get_default_pinned_memory_pool().malloc)
            self._stream.begin_capture()
            self._entered = stack.pop_all()
        self._numbers, _local.capturing = get_rng_state(), self

    def capture_end(self) -> None:
        """The end of what `capture_begin` began. CuPy's CUDARuntimeError where something in between was refused."""
        if _local.capturing is not self or self._entered is None:
            raise RuntimeError("capture_end() without capture_begin() in this thread")
        _local.capturing = None
        entered, self._entered = self._entered, None
        set_rng_state(self._numbers)  # what is drawn is drawn by replays
        with entered:
            self._graph = self._stream.end_capture()

    def replay(self) -> None:
        """Ask what is fed, and do the captured work on the current stream; returns before it is done.

        RuntimeError where something allocates memory of the GPU, which a replay never needs, and where a value has
        changed that the captured work holds (`changed`).
        """
        if self._graph is None:
            raise RuntimeError("replay() of a graph that was not captured")
        if changed := self.changed():
            raise RuntimeError(f"replay() of a graph that holds another value: {changed}; capture it anew")
        cuda = self._xp.cuda
        with cuda.Device(self.device.index), cuda.using_allocator(_refuse_memory):
            stream = cuda.get_current_stream()
            for array, value in self._fed:  # on the stream, so as not to wait for the replay before
                array.set(np.asarray(value(), array.dtype).reshape(array.shape), stream)
            self._graph.launch()
        if state.casts:  # of weights that the replay has changed
            state.casts.clear()

    def reset(self) -> None:
        """Forget what was captured, and let go of its memory, as far as no array is left in it."""
        pool, self._graph, self._pool = self._pool, None, None
        self._fed, self._held, self._drawn = [], [], {}
        _lingering[:] = [p for p in (*_lingering, pool) if p is not None and p.used_bytes()]

    __del__ = reset

    def pool(self) -> Any:
        """The memory pool of the capture, a cupy.cuda.MemoryPool."""
        return self._pool

    def feed(self, value: Callable[[], Any], shape: tuple[int, ...], dtype: Any) -> Any:
        """An array that every replay fills with `value()` first; see `fed`."""
        array = self._xp.empty(shape, dtype)
        self._fed.append((array, value))
        return array

    def hold(self, values: Callable[[], dict[str, Any]]) -> None:
        """Say that the captured work holds these values, by name, as they are now; see `held`."""
        self._held.append((values, values()))

    def changed(self) -> str:
        """What is not as the captured work holds it, such as "momentum is 0.8, and was 0.9 at the capture"; or ""."""
        for values, then in self._held:
            for name, value in values().items():
                if value != then[name]:
                    return f"{name} is {value!r}, and was {then[name]!r} at the capture"
        return ""

    def draw(self, count: int) -> Any:
        """`fed_numbers` of this graph. The generator goes on, so that it tells one draw from the next."""
        at = repr(get_rng_state())

        def value() -> Any:
            return default_generator.bit_generator.random_raw(count)

        value()
        if at not in self._drawn:
            self._drawn[at] = self.feed(value, (count,), "uint64")
        return self._drawn[at]


@contextlib.contextmanager
def graph(cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None) -> Iterator[None]:
    """Within it, work in this thread is captured in `cuda_graph`. Arguments as of `CUDAGraph.capture_begin`.

    RuntimeError for what cannot be captured; the graph is as new then.
    """
    cuda_graph.capture_begin(pool, stream)
    casts, state.casts = state.casts, None  # a weight that was cast before is not cast by the replay
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # that the capture is invalid is known
            cuda_graph.capture_end()
        cuda_graph.reset()
        raise
    finally:
        state.casts = casts
    try:
        cuda_graph.capture_end()
    except RuntimeError as error:
        cuda_graph.reset()
        raise RuntimeError(f"what ran cannot be captured in a CUDA graph: {_first_line(error)}") from error


def fed(value: Callable[[], Any], shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """`value()` as an array on the device of `like`; in a graph, what it is at each replay.

    value: of what the host knows anew at each step; called once per execution of the code around it: now, or, where a
    graph is being captured, before every replay and not now. It must not use the GPU.
    """
    if is_cuda_array(like) and _local.capturing is not None:
        return _local.capturing.feed(value, shape, dtype)
    host = np.asarray(value(), dtype).reshape(shape)
    return array_module(device_of(like)).asarray(host)


def fed_numbers(count: int, like: Any) -> Any:
    """`count` random 64-bit numbers (uint64) of the default generator, `fed`. What is computed a second time from the
    same state of the generator (an activation checkpoint) gets the same ones in a graph, too."""
    if is_cuda_array(like) and _local.capturing is not None:
        return _local.capturing.draw(count)
    return fed(lambda: default_generator.bit_generator.random_raw(count), (count,), "uint64", like)


def held(values: Callable[[], dict[str, Any]]) -> None:
    """Say that kernels get these numbers, by name, by value: a graph captured now must not be replayed with others.

    values: asked now and before every replay, where a graph is being captured; else not at all.
    """
    if _local.capturing is not None:
        _local.capturing.hold(values)


class GraphedStep:
    """What `make_graphed_step` returns: call it like the step.

    captured: whether calls can be replayed now. captures: how many captures there were. replayed: whether the last call
    was a replay. refused: why the step cannot be captured, or "".
    """

    def __init__(
        self,
        step: Callable[..., Any],
        warmup: int = 3,
        depends: Callable[[], Any] = lambda: None,
        note: Callable[[str], Any] | None = None,
        where: str | Device | None = None,
    ):
        if warmup < 1:
            raise ValueError(f"warmup={warmup} must be at least 1: the first steps compile kernels and make buffers")
        self.step, self.warmup, self.depends, self.where = step, warmup, depends, where
        self.note = note or (lambda text: warnings.warn(text, stacklevel=4))
        self.refused, self.captures, self.replayed = "", 0, False
        self._said: set[str] = set()
        self._graph: CUDAGraph | None = None
        self._key: Any = None
        self._ran, self._inputs, self._outputs = 0, (), None

    captured = property(lambda self: self._graph is not None)

    def __call__(self, *inputs: Any) -> Any:
        """`step(*inputs)`. What a replay returns is overwritten by the next one."""
        self.replayed = False
        if self.refused:
            return self.step(*inputs)
        if state.hooks:
            return self._eagerly("hooks are entered, which watch ops as they run", inputs)
        key = (self.depends(), tuple((t.shape, t.dtype, t.array.strides) for t in inputs))
        if self._graph is not None and (changed := self._graph.changed()):
            self._say(f"{changed}; it is captured anew")
        if self._graph is not None and (changed or key[0] != self._key[0]):  # another stage: capture it anew
            self._graph = None
            self._ran = 0
        if self._graph is None:
            self._ran = self._ran + 1 if key == self._key else 1
            self._key = key
            if self._ran <= self.warmup:
                return self.step(*inputs)
            if not self._capture(inputs):
                return self.step(*inputs)
        elif key != self._key:
            return self._eagerly("a batch has another shape than the captured one", inputs)
        assert self._graph is not None
        for static, new in zip(self._inputs, inputs, strict=True):
            _copy(new.array, static.array)
        self._graph.replay()
        self.replayed = True
        return self._outputs

    def _eagerly(self, reason: str, inputs: Any) -> Any:
        self._say(f"{reason}; such a step runs without its graph")
        return self.step(*inputs)

    def _say(self, text: str) -> None:
        """Note it, once for each kind of reason: values that change do so at many steps."""
        kind = text.partition(" is ")[0]
        if kind not in self._said:
            self._said.add(kind)
            self.note(f"CUDA graphs: {text}")

    def _capture(self, inputs: Any) -> bool:
        """Whether the step is captured now; where it cannot be, why is noted, and nothing has happened."""
        try:
            if not all(is_cuda_array(t.array) for t in inputs) or not (inputs or self.where):
                raise RuntimeError("it needs inputs, and all of them on the GPU")
            captured = CUDAGraph(self.where or device_of(*(t.array for t in inputs)))
            self._inputs = tuple(type(t)(_empty_like(t.array)) for t in inputs)
            with graph(captured):
                self._outputs = self.step(*self._inputs)
        except (RuntimeError, MemoryError) as error:  # CuPy's errors are of these
            self.refused, self._inputs, self._outputs = _first_line(error), (), None
            self.note(f"CUDA graphs: this step cannot be captured and runs without: {self.refused}")
            return False
        self._graph = captured
        self.captures += 1
        return True


def make_graphed_step(
    step: Callable[..., Any],
    warmup: int = 3,
    depends: Callable[[], Any] = lambda: None,
    note: Callable[[str], Any] | None = None,
    where: str | Device | None = None,
) -> GraphedStep:
    """`step` as a function that is captured in a CUDA graph once it has run `warmup` times, and replayed from then on.

    step: a function of tensors on one GPU: forward, backward, the optimizer's step, or parts of them. It must begin
    with `zero_grad()` where it has a backward. What it returns is overwritten by the next replay. warmup: steps that
    run as they are: they compile kernels, measure (`autotune`) and make the optimizer's buffers. depends: called before
    every step; where its value changes (layers are frozen, training becomes evaluation), or a value that is `held` (the
    optimizer's momentum, its weight decay), the step is captured anew, after as many steps as they are.
    note: called with one line on each reason why steps run without the graph; by default a warning. where: the device
    of a step without inputs.

    A step runs as it is, with the same result, where its inputs have other shapes than those captured (the last
    batch), where hooks are entered, and where it cannot be captured at all: it waits for the GPU or reads the host.
    The memory of parameters, buffers and the optimizer's state must stay: capture anew after `load_state_dict`.
    """
    return GraphedStep(step, warmup, depends, note, where)


def _empty_like(array: Any) -> Any:
    """Memory in the order of axes of `array`, which CuPy keeps for C and F order only."""
    order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    memory = array_module(device_of(array)).empty([array.shape[axis] for axis in order], array.dtype)
    return memory.transpose(sorted(range(array.ndim), key=order.__getitem__))


def _copy(source: Any, target: Any) -> None:
    """Copy between arrays whose axes lie in the same order: one run of memory."""
    order = sorted(range(target.ndim), key=lambda axis: -target.strides[axis])
    target.transpose(order)[...] = source.transpose(order)


def _refuse_memory(size: int) -> Any:
    raise RuntimeError(f"a replay of a CUDA graph allocates {size} bytes: what is fed must be made on the host")


def _refuse_host(size: int) -> Any:
    raise RuntimeError(f"{size} bytes are copied from the host, which a CUDA graph cannot repeat; see minires.cuda.fed")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
