"""CUDA graphs of device_double: streams, capture, memory pools and replays, as strict as CuPy's on a GPU, or stricter.

While a stream captures, nothing is done: a launch is written down with its arguments, and so is an array function,
whose result is garbage until a replay. What waits for the GPU is refused and spoils the capture; so is a copy from the
host. A replay does what was written down, on the same memory: launches in the interpreter, array functions by NumPy.
Memory that was freed since the capture is noticed: a GPU would read what lies there now.
"""

import contextlib
import dataclasses
import types
import weakref

import numpy as np

IN_PLACE = {f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor".split()}


class CUDARuntimeError(RuntimeError):
    """CuPy's own."""


class Recorder:
    """What is captured: `work`, functions without arguments; `undo`, what the capture's array functions overwrote."""

    def __init__(self):
        self.work, self.undo, self.made, self.spoilt = [], [], {}, ""

    def write(self, *arrays):
        """Before a function that writes into arrays of the host runs to see what comes out."""
        self.undo += [(a, a.copy()) for a in arrays]

    def refuse(self, what):
        """For what waits for the GPU or needs the host."""
        self.spoilt = f"cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing ({what})"
        raise CUDARuntimeError(self.spoilt)

    def launch(self, launch, run):
        """A launch of a kernel; `run` does it."""
        args = tuple(self.deep(a) if isinstance(a, tuple) or getattr(a, "ndim", 0) else a for a in launch.args)
        bare = dataclasses.replace(launch, args=())
        self.work.append(lambda: run(dataclasses.replace(bare, args=tuple(map(_there, args)))))

    def function(self, function, args, kwargs, results):
        """An array function that made `results` (None: no new memory), or wrote into its arguments."""
        args, kwargs = self.deep(args), self.deep(kwargs)
        targets = [None if r is None else self.kept(r) for r in results]

        def again():
            with np.errstate(all="ignore"):
                values = function(*_there(args), **_there(kwargs))
            for target, value in zip(targets, values if isinstance(values, (tuple, list)) else [values], strict=False):
                if target is not None:
                    _there(target)[...] = value

        self.work.append(again)

    def deep(self, value):
        """The arrays within it as what is there at a replay."""
        if isinstance(value, np.ndarray):
            return self.kept(value)
        if isinstance(value, dict):
            return {key: self.deep(v) for key, v in value.items()}
        return type(value)(map(self.deep, value)) if type(value) in (tuple, list) else value

    def kept(self, array):
        """Memory of the capture stays with the graph; other memory is not the graph's to keep."""
        root = _root(array)
        if id(root) in self.made:
            return _Kept(array)
        offset = array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
        return _Seen(weakref.ref(root), array.shape, array.dtype, array.strides, offset)


@dataclasses.dataclass
class _Kept:
    array: np.ndarray

    def there(self):
        return self.array


@dataclasses.dataclass
class _Seen:
    root: weakref.ref
    shape: tuple
    dtype: np.dtype
    strides: tuple
    offset: int

    def there(self):
        root = self.root()
        if root is None:
            raise CUDARuntimeError(f"cudaErrorIllegalAddress: a replay reads {self.dtype} {self.shape}, freed since")
        return view_of(root, self.shape, self.dtype, self.strides, self.offset)


def view_of(root, shape, dtype, strides, offset):
    """An array in the memory of another one, which is a single run."""
    flat = np.lib.stride_tricks.as_strided(root, (root.nbytes // root.itemsize,), (root.itemsize,))
    return np.ndarray(shape, dtype, flat.view(np.uint8), offset, strides)


def _there(value):
    if isinstance(value, (_Kept, _Seen)):
        return value.there()
    if isinstance(value, dict):
        return {key: _there(v) for key, v in value.items()}
    return type(value)(map(_there, value)) if type(value) in (tuple, list) else value


def _root(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


class Graph:
    """cupy.cuda.Graph."""

    def __init__(self, work):
        self.work = work

    def launch(self, stream=None):
        for work in self.work:
            work()

    def upload(self, stream=None):
        pass


class MemoryPool:
    """cupy.cuda.MemoryPool: counts."""

    def __init__(self):
        self.taken = 0

    def malloc(self, size):
        self.taken += size

    def used_bytes(self):
        return self.taken

    total_bytes = used_bytes


class Streams:
    """What `cupy.cuda` has of streams and memory; `recorder` is set while one captures."""

    def __init__(self):
        self.recorder = None
        outer = self

        class Stream:
            def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
                self.ptr = 0 if null else id(self)

            def __enter__(self):
                outer.current.append(self)
                return self

            def __exit__(self, *exception):
                outer.current.pop()

            def begin_capture(self, mode=None):
                if self.ptr == 0:
                    raise RuntimeError("cannot capture on the default (legacy) stream")
                assert outer.current[-1] is self and outer.recorder is None
                outer.recorder = Recorder()

            def end_capture(self):
                recorder, outer.recorder = outer.recorder, None
                for array, value in reversed(recorder.undo):
                    array[...] = value
                if recorder.spoilt:
                    raise CUDARuntimeError(
                        "cudaErrorStreamCaptureInvalidated: operation failed due to a previous error"
                    )
                return Graph(recorder.work)

            def is_capturing(self):
                return outer.recorder is not None and outer.current[-1] is self

            def synchronize(self):
                pass

        Stream.null = Stream(null=True)
        self.current, self.default = [Stream.null], MemoryPool()
        self.allocators, self.pinned, pinned = [self.default.malloc], lambda size: None, MemoryPool()
        self.names = types.SimpleNamespace(
            Stream=Stream,
            MemoryPool=MemoryPool,
            Graph=Graph,
            using_allocator=self.using_allocator,
            get_current_stream=lambda: self.current[-1],
            set_pinned_memory_allocator=lambda allocator: setattr(self, "pinned", allocator),
        )
        self.pinned_pool = pinned

    @contextlib.contextmanager
    def using_allocator(self, allocator):
        self.allocators.append(allocator)
        try:
            yield
        finally:
            self.allocators.pop()

    def made(self, function, name, given, result):
        """After an array function: what is new memory was allocated, and has to be made again at a replay."""
        hosts = [getattr(r, "_host", None) for r in (result if isinstance(result, (tuple, list)) else [result])]
        roots = {id(_root(a)) for a in _arrays((*given[0], *given[1].values()))}
        fresh = [None if h is None or id(_root(h)) in roots else h for h in hosts]
        for array in fresh:
            if array is not None:
                self.allocators[-1](array.nbytes)
                if self.recorder is not None:
                    self.recorder.made[id(_root(array))] = _root(array)
        if self.recorder is not None and (name in IN_PLACE or any(a is not None for a in fresh)):
            if name not in ("empty", "empty_like"):
                self.recorder.function(function, *given, fresh)


def _arrays(values):
    for value in values:
        if isinstance(value, np.ndarray):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _arrays(value)
