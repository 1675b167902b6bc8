"""Layers of real size, where the definition would take too long: a gradient kernel is the transpose of its forward.

    <fprop(x, w), dy> = <x, dgrad(dy, w)> = <w, wgrad(x, dy)>

The inputs are small whole numbers, so that every product and every sum is exact in any order, and the three numbers
must be equal to the last bit, for every kernel: one element in a million, missed or counted twice, shows. Kernels that
are not plain sums (Winograd) must come close to whole numbers, and are rounded to them.
"""

import math

import minires.kernels  # noqa: F401  (registers)
import numpy as np
import pytest
from minires.kernels import registry
from minires.kernels.memory import poisoned

CONV = {case.name: case.params for case in registry.problem("conv2d_fprop").cases if "bench" in case.tags}
_ODD = dict(n=24, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
CONV |= {
    "grouped": _ODD | dict(c=48, hw=(37, 29), k=96, rs=(3, 3), groups=4),
    "depthwise": _ODD | dict(c=67, hw=(31, 33), k=67, rs=(5, 5), stride=(2, 2), padding=(2, 2), groups=67),
    "dilated": _ODD | dict(c=33, hw=(41, 43), k=65, rs=(3, 5), padding=(2, 4), dilation=(2, 3)),
    "strides_differ": _ODD | dict(c=17, hw=(53, 47), k=31, rs=(4, 3), stride=(3, 2), padding=(0, 2)),
}


def _whole(rng, shape, dtype, most=2):
    """Random whole numbers, laid out channels-last where there are channels."""
    a = rng.integers(-most, most + 1, shape).astype(dtype)
    return a.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2) if a.ndim == 4 else a


def _inner(a, b):
    """<a, b>, exactly."""
    return int(np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64)))


def _each(problem, *arrays, **params):
    """The output of every kernel of the problem that takes the inputs, by name."""
    with poisoned():
        return {
            f"{problem}/{k.name}": k(*arrays, **params) if k.exact else _rounded(k(*arrays, **params))
            for k in registry.kernels(problem, "cpu")
            if k.step > 0 and k.takes(*arrays, **params)
        }


def _rounded(y):
    whole = np.rint(y)
    assert np.abs(y - whole).max() < 0.25, "far from a whole number"
    return whole


def _equal(products):
    assert len(products) >= 3, "a forward, and a gradient by two kernels or to two inputs"
    assert len(set(products.values())) == 1, products


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CONV)
def test_convolution(name, dtype):
    p, rng = CONV[name], np.random.default_rng(len(name))
    params = {key: p[key] for key in ("stride", "padding", "dilation", "groups")}
    n = math.ceil(p["n"] / 8)
    x = _whole(rng, (n, p["c"], *p["hw"]), dtype)
    w = _whole(rng, (p["k"], p["c"] // p["groups"], *p["rs"]), dtype)
    ys = _each("conv2d_fprop", x, w, **params)
    dy = _whole(rng, next(iter(ys.values())).shape, dtype)
    products = {kernel: _inner(y, dy) for kernel, y in ys.items()}
    for kernel, dx in _each("conv2d_dgrad", dy, w, **params, input_hw=p["hw"]).items():
        products[kernel] = _inner(x, dx)
    for kernel, dw in _each("conv2d_wgrad", x, dy, **params, kernel_hw=p["rs"]).items():
        products[kernel] = _inner(w, dw)
    _equal(products)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n, i, o", [(128, 64, 10), (33, 512, 1000), (257, 129, 65)])
def test_linear(n, i, o, dtype):
    rng = np.random.default_rng(n)
    x, w, dy = (_whole(rng, shape, dtype) for shape in ((n, i), (o, i), (n, o)))
    products = {kernel: _inner(y, dy) for kernel, y in _each("linear_fprop", x, w, None).items()}
    products |= {kernel: _inner(x, dx) for kernel, dx in _each("linear_dgrad", dy, w).items()}
    products |= {kernel: _inner(w, dw) for kernel, dw in _each("linear_wgrad", x, dy).items()}
    _equal(products)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_max_pooling(dtype):
    rng = np.random.default_rng(0)
    x = _whole(rng, (2, 64, 57, 56), dtype, most=50)
    window = dict(kernel=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1), ceil_mode=False)
    outputs = _each("maxpool2d_fprop", x, **window)
    y, indices = next(iter(outputs.values()))
    dy = _whole(rng, y.shape, dtype)
    products = {kernel: _inner(y, dy) for kernel, (y, _) in outputs.items()}
    for kernel, dx in _each("maxpool2d_bwd", dy, indices, **window, input_hw=x.shape[2:]).items():
        products[kernel] = _inner(x, dx)
    _equal(products)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size, kernel, stride", [((58, 54), 2, 2), ((57, 56), 4, 3), ((8, 8), 8, 1)])
def test_average_pooling(size, kernel, stride, dtype):
    """Windows of 2^n pixels, so that the division is exact too."""
    rng = np.random.default_rng(kernel)
    window = dict(kernel=(kernel,) * 2, stride=(stride,) * 2, padding=(0, 0), ceil_mode=False, count_include_pad=True)
    x = _whole(rng, (3, 64, *size), dtype)
    ys = _each("avgpool2d_fprop", x, **window)
    dy = _whole(rng, next(iter(ys.values())).shape, dtype)
    taps = kernel * kernel
    products = {kernel: _inner(taps * y, dy) for kernel, y in ys.items()}
    for name, dx in _each("avgpool2d_bwd", dy, **window, input_hw=size).items():
        products[name] = _inner(x, taps * dx)
    _equal(products)
