"""What the CUDA driver is told of a tensor map, without a driver: a stand-in keeps the arguments."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
from minires.kernels.cuda import tensor_map
from minires.kernels.cuda.tensor_map import TensorMap, made_by_driver


class Driver:
    def __init__(self, code=0):
        self.code, self.args = code, None

    def cuTensorMapEncodeTiled(self, *args):
        self.args = args
        ctypes.memset(args[0], 7, 128)
        return self.code


def image(dtype="float16"):
    """(N, H, W, C) as a GPU's array: its memory has an address there."""
    host = np.zeros((2, 5, 7, 24), dtype)
    about = {name: getattr(host, name) for name in ("shape", "strides", "ndim", "dtype")}
    return SimpleNamespace(**about, data=SimpleNamespace(ptr=0x7F0000000100))


def test_what_the_driver_is_told(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(tensor_map, "_driver", lambda: driver)
    made = made_by_driver(TensorMap(image(), (64, 16, 8, 1), steps=(1, 2, 2, 1)))
    to, dtype, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill = driver.args
    assert to.value % 64 == 0 and made.shape == (1,) and made.tobytes() == b"\7" * 128
    assert (dtype.value, rank.value, address.value) == (6, 4, 0x7F0000000100)
    assert [list(a) for a in (sizes, strides)] == [[24, 7, 5, 2], [48, 336, 1680]], "coordinate 0 first; bytes"
    assert [list(a) for a in (box, steps)] == [[64, 32, 16, 1], [1, 2, 2, 1]], "a box counts what its steps pass over"
    assert [e.value for e in (interleave, swizzle, promotion, fill)] == [0, 3, 2, 0]


def test_a_refusal_is_one_line(monkeypatch):
    monkeypatch.setattr(tensor_map, "_driver", lambda: Driver(1))
    with pytest.raises(RuntimeError, match=r"refuses \(2, 5, 7, 24\) float16, box \(64, 16, 8, 1\): error 1"):
        made_by_driver(TensorMap(image(), (64, 16, 8, 1)))
