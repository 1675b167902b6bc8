"""A stand-in for CuPy on a machine without a GPU: arrays in host memory that answer as `cuda:0`, as strict as CuPy's.

What CuPy refuses is refused here: an array never turns into NumPy's by itself, does not mix with NumPy's arrays, and
has only functions that the installed CuPy has. What differs in kind is the same here: a reduction or an element is an
array without axes, not a number. Kernels that are launched on these arrays run in the interpreter. CUDA graphs, and
what is refused while one is captured: capture_double.py.
"""

import dataclasses
import importlib
import operator
import sys
import types

import numpy as np
from capture_double import IN_PLACE, CUDARuntimeError, Streams, view_of
from minires.kernels.cuda import launch as launches
from minires.kernels.cuda.tensor_map import TensorMap
from minires.kernels.interpreter import interpret

_CREATE_FROM_HOST = {"array", "asarray", "ascontiguousarray"}


_KEEP_ORDER = {"astype", "empty_like", "zeros_like", "ones_like", "full_like"}
_CUBLAS = {"__matmul__", "__rmatmul__", "matmul", "dot", "tensordot", "einsum", "inner", "vdot"}
_SIZE_OF_VALUES = {"nonzero", "argwhere", "flatnonzero", "unique", "array_equal"}  # CuPy waits for the GPU in them
streams = Streams()  # anew for every `install`


class ndarray:
    """Like cupy.ndarray: the array itself is `_host`."""

    __array_priority__ = 100

    def __init__(self, host, dtype=None, memptr=None, strides=None):
        self._host = host if memptr is None else memptr.view(host, dtype, strides)

    shape, strides, dtype, ndim, size, nbytes, itemsize = (
        property(lambda self, name=name: getattr(self._host, name))
        for name in ("shape", "strides", "dtype", "ndim", "size", "nbytes", "itemsize")
    )
    flags = property(lambda self: self._host.flags)
    real, imag, T = (
        property(lambda self, name=name: _wrap(getattr(self._host, name))) for name in ("real", "imag", "T")
    )
    device = property(lambda self: types.SimpleNamespace(id=0))
    data = property(lambda self: _Pointer(self._host))
    base = property(lambda self: None if self._host.base is None else self._host.base)

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return _call(getattr(ufunc, method), ufunc.__name__, inputs, kwargs)

    def __array_function__(self, function, kinds, args, kwargs):
        return getattr(module(), function.__name__)(*args, **kwargs)

    def get(self):
        return _read(self).copy(order="K")

    def item(self):
        return _read(self).item()

    def tolist(self):
        return _read(self).tolist()

    def set(self, host, stream=None):
        if type(host) is not np.ndarray or (host.shape, host.dtype) != (self.shape, self.dtype):
            raise ValueError(f"set: {type(host)} does not fit an array of {self.dtype} {self.shape}")
        if streams.recorder is not None:
            streams.recorder.refuse("set")
        self._host[...] = host

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __bool__(self):
        return bool(_read(self))

    def __int__(self):
        return int(_read(self))

    def __index__(self):
        return _read(self).__index__()

    def __float__(self):
        return float(_read(self))

    def __getitem__(self, key):
        return _call(operator.getitem, _named("getitem", key), (self, key), {})

    def __setitem__(self, key, value):
        _in_place(operator.setitem, _named("setitem", key), self, key, value)

    def view(self, *args, **kwargs):
        return _wrap(self._host.view(*args, **kwargs))

    def fill(self, value):
        _in_place(np.ndarray.fill, "fill", self, value)


class _Pointer:
    """cupy.cuda.MemoryPointer."""

    def __init__(self, host, offset=0):
        self.host, self.offset, self.ptr = host, offset, host.__array_interface__["data"][0] + offset

    def __add__(self, offset):
        return _Pointer(self.host, self.offset + offset)

    def view(self, shape, dtype, strides):
        root = self.host
        while isinstance(root.base, np.ndarray):
            root = root.base
        return view_of(root, shape, dtype, strides, self.ptr - root.__array_interface__["data"][0])


def _read(array):
    """The host's memory, for a number that the host looks at: the GPU must be waited for."""
    if streams.recorder is not None:
        streams.recorder.refuse("memcpy to the host")
    return array._host


def _named(name, key):
    """An index of bools is as many numbers as are true."""
    keys = key if isinstance(key, tuple) else (key,)
    return "nonzero" if any(isinstance(k, ndarray) and k.dtype == bool for k in keys) and name == "getitem" else name


def _in_place(function, name, array, *args):
    """A function that writes into its first argument."""
    _refuse(name)
    unwrapped = [_unwrap(a) for a in (array, *args)]
    if streams.recorder is None:
        function(*unwrapped)
        return
    streams.recorder.write(unwrapped[0])
    with np.errstate(all="ignore"):
        function(*unwrapped)
    streams.recorder.function(function, tuple(unwrapped), {}, ())


def _refuse(name):
    """What CuPy cannot do while a stream captures."""
    if streams.recorder is not None and name in _CUBLAS:
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
    if streams.recorder is not None and name in _SIZE_OF_VALUES:
        streams.recorder.refuse(name)


def _method(name):
    def call(self, *args, **kwargs):
        result = _call(getattr(np.ndarray, name), name, (self, *args), kwargs)
        return self if isinstance(result, ndarray) and result._host is self._host else result

    return call


_OPERATORS = """
    add sub mul truediv floordiv mod pow matmul and or xor lshift rshift radd rsub rmul rtruediv rfloordiv rmod rpow
    rmatmul rand ror rxor iadd isub imul itruediv ifloordiv imod ipow iand ior ixor lt le gt ge eq ne neg pos abs invert
""".split()
_METHODS = """
    sum mean max min prod var std argmax argmin any all reshape transpose astype copy ravel flatten squeeze swapaxes
    nonzero take repeat cumsum clip round conj dot argsort
""".split()
for _name in _OPERATORS:
    setattr(ndarray, f"__{_name}__", _method(f"__{_name}__"))
for _name in _METHODS:
    setattr(ndarray, _name, _method(_name))
ndarray.__hash__ = None
ndarray.__module__ = "cupy"


def _wrap(result):
    if isinstance(result, (np.ndarray, np.generic)):
        return ndarray(np.asarray(result))
    if type(result) in (tuple, list):
        return type(result)(map(_wrap, result))
    return result


def _unwrap(value, host_too=False):
    if isinstance(value, TensorMap):
        return dataclasses.replace(value, array=_unwrap(value.array))
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, TensorMap):
        return dataclasses.replace(value, array=_unwrap(value.array))
    if isinstance(value, np.ndarray) and not host_too:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if type(value) in (tuple, list):
        return type(value)(_unwrap(v, host_too) for v in value)
    return value


def _call(function, name, args, kwargs):
    """A NumPy function on the hosts of our arrays; `out` stays the array that it was."""
    _refuse(name)
    host_too, recorder, out = name in _CREATE_FROM_HOST, streams.recorder, kwargs.get("out")
    moved = host_too and not any(isinstance(a, ndarray) for a in args)
    given = tuple(_unwrap(a, host_too) for a in args), {key: _unwrap(v, host_too) for key, v in kwargs.items()}
    outs = () if out is None else out if isinstance(out, tuple) else (out,)
    written = given[0][:1] if name in IN_PLACE else _unwrap(outs)
    if recorder is None:
        result = function(*given[0], **given[1])
    else:
        recorder.write(*written)
        with np.errstate(all="ignore"):
            result = function(*given[0], **given[1])
    if out is not None:
        if recorder is not None:
            recorder.function(function, *given, ())
        return out[0] if isinstance(out, tuple) else out
    if result is NotImplemented:
        return result
    if isinstance(result, np.ndarray) and result.base is None and name not in _KEEP_ORDER:
        result = np.asarray(result, order="F" if result.flags.f_contiguous else "C")  # CuPy makes no other orders
    if moved:
        result = np.array(result, order="F" if result.flags.f_contiguous else "C")
        if result.ndim:
            streams.pinned(result.nbytes)
    result = _wrap(result)
    streams.made(function, name, given, result)
    return result


class _Module(types.ModuleType):
    """`cupy`: every function that the installed one has, computed by NumPy's of that name."""

    def __init__(self, real):
        super().__init__("cupy")
        self.__spec__, self._real, self.ndarray = real.__spec__, real, ndarray
        runtime = types.SimpleNamespace(
            getDeviceCount=lambda: 1,
            CUDARuntimeError=CUDARuntimeError,
            driverGetVersion=lambda: 13000,
            getDeviceProperties=lambda index: {"name": b"stand-in"},
        )
        self.cuda = types.SimpleNamespace(runtime=runtime, Device=_Device, nvrtc=real.cuda.nvrtc, **vars(streams.names))
        assert all(hasattr(real.cuda, name) for name in vars(streams.names))
        self.get_default_memory_pool = lambda: streams.default
        self.get_default_pinned_memory_pool = lambda: streams.pinned_pool

    def __getattr__(self, name):
        if not hasattr(self._real, name):
            raise AttributeError(f"module 'cupy' has no attribute {name!r}")
        value = getattr(np, name)
        if name in ("ogrid", "mgrid"):
            return _Grid(value)
        if not callable(value) or isinstance(value, type):
            return value
        return _Function(value, name)


class _Function:
    """A function of NumPy's, and `at` of one that is a ufunc."""

    def __init__(self, function, name):
        self._function, self._name = function, name

    def __call__(self, *args, **kwargs):
        return _call(self._function, self._name, args, kwargs)

    def at(self, *args):
        _in_place(self._function.at, "at", *args)


class _Grid:
    def __init__(self, grid):
        self._grid = grid

    def __getitem__(self, key):
        return _wrap(self._grid[key])


class _Device:
    def __init__(self, index=0):
        assert index == 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False

    def synchronize(self):
        if streams.recorder is not None:
            streams.recorder.refuse("deviceSynchronize")
        _Device.synchronized += 1

    synchronized = 0


def module():
    """The stand-in that is installed."""
    return sys.modules["cupy"]


def install(monkeypatch):
    """Put the stand-in in the place of CuPy until the test ends; returns the list that launches are recorded in."""
    real = importlib.import_module("cupy")
    streams.__init__()
    monkeypatch.setitem(sys.modules, "cupy", _Module(real))
    launched = []

    def execute(launch):
        launched.append(launch)
        assert not any(isinstance(a, np.ndarray) and a.ndim for a in launch.args), (
            "an array of the host's was launched on"
        )
        launch = dataclasses.replace(launch, args=tuple(_unwrap(a, host_too=True) for a in launch.args))
        interpret(launch) if streams.recorder is None else streams.recorder.launch(launch, interpret)

    monkeypatch.setattr(launches, "_executor", execute)
    return launched
