"""A stand-in for CuPy on a machine without a GPU: arrays in host memory that answer as `cuda:0`, as strict as CuPy's.

What CuPy refuses is refused here: an array never turns into NumPy's by itself, does not mix with NumPy's arrays, and
has only functions that the installed CuPy has. What differs in kind is the same here: a reduction or an element is an
array without axes, not a number. Kernels that are launched on these arrays run in the interpreter.
"""

import dataclasses
import importlib
import sys
import types

import numpy as np
from minires.kernels.cuda import launch as launches
from minires.kernels.interpreter import interpret

_CREATE_FROM_HOST = {"array", "asarray", "ascontiguousarray"}


_KEEP_ORDER = {"astype", "empty_like", "zeros_like", "ones_like", "full_like"}


class ndarray:
    """Like cupy.ndarray: the array itself is `_host`."""

    __array_priority__ = 100

    def __init__(self, host):
        self._host = host

    shape, strides, dtype, ndim, size, nbytes, itemsize = (
        property(lambda self, name=name: getattr(self._host, name))
        for name in ("shape", "strides", "dtype", "ndim", "size", "nbytes", "itemsize")
    )
    flags = property(lambda self: self._host.flags)
    real, imag, T = (
        property(lambda self, name=name: _wrap(getattr(self._host, name))) for name in ("real", "imag", "T")
    )
    device = property(lambda self: types.SimpleNamespace(id=0))
    data = property(lambda self: types.SimpleNamespace(ptr=self._host.__array_interface__["data"][0]))
    base = property(lambda self: None if self._host.base is None else self._host.base)

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return _call(getattr(ufunc, method), ufunc.__name__, inputs, kwargs)

    def __array_function__(self, function, kinds, args, kwargs):
        return getattr(module(), function.__name__)(*args, **kwargs)

    def get(self):
        return self._host.copy(order="K")

    def item(self):
        return self._host.item()

    def tolist(self):
        return self._host.tolist()

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __bool__(self):
        return bool(self._host)

    def __int__(self):
        return int(self._host)

    def __index__(self):
        return self._host.__index__()

    def __float__(self):
        return float(self._host)

    def __getitem__(self, key):
        return _wrap(self._host[_unwrap(key)])

    def __setitem__(self, key, value):
        self._host[_unwrap(key)] = _unwrap(value)

    def view(self, *args, **kwargs):
        return _wrap(self._host.view(*args, **kwargs))

    def fill(self, value):
        self._host.fill(_unwrap(value))


def _method(name):
    def call(self, *args, **kwargs):
        result = _call(getattr(self._host, name), name, args, kwargs)
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
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, np.ndarray) and not host_too:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if type(value) in (tuple, list):
        return type(value)(_unwrap(v, host_too) for v in value)
    return value


def _call(function, name, args, kwargs):
    """A NumPy function on the hosts of our arrays; `out` stays the array that it was."""
    host_too = name in _CREATE_FROM_HOST
    out = kwargs.get("out")
    result = function(
        *(_unwrap(a, host_too) for a in args), **{key: _unwrap(value, host_too) for key, value in kwargs.items()}
    )
    if out is not None:
        return out[0] if isinstance(out, tuple) else out
    if result is NotImplemented:
        return result
    if isinstance(result, np.ndarray) and result.base is None and name not in _KEEP_ORDER:
        result = np.asarray(result, order="F" if result.flags.f_contiguous else "C")  # CuPy makes no other orders
    if host_too and not any(isinstance(a, ndarray) for a in args):  # moved to the device
        result = np.array(result, order="F" if result.flags.f_contiguous else "C")
    return _wrap(result)


class _Module(types.ModuleType):
    """`cupy`: every function that the installed one has, computed by NumPy's of that name."""

    def __init__(self, real):
        super().__init__("cupy")
        self.__spec__, self._real, self.ndarray = real.__spec__, real, ndarray
        runtime = types.SimpleNamespace(getDeviceCount=lambda: 1)
        self.cuda = types.SimpleNamespace(runtime=runtime, Device=_Device, nvrtc=real.cuda.nvrtc)

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
        self._function.at(*map(_unwrap, args))


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
        _Device.synchronized += 1

    synchronized = 0


def module():
    """The stand-in that is installed."""
    return sys.modules["cupy"]


def install(monkeypatch):
    """Put the stand-in in the place of CuPy until the test ends; returns the list that launches are recorded in."""
    real = importlib.import_module("cupy")
    monkeypatch.setitem(sys.modules, "cupy", _Module(real))
    launched = []

    def execute(launch):
        launched.append(launch)
        assert not any(isinstance(a, np.ndarray) and a.ndim for a in launch.args), (
            "an array of the host's was launched on"
        )
        interpret(dataclasses.replace(launch, args=tuple(_unwrap(a, host_too=True) for a in launch.args)))

    monkeypatch.setattr(launches, "_executor", execute)
    return launched
