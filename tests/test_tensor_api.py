"""What a Tensor can do beside the ops: in-place writes, conversions, comparisons, text, creation, saving."""

import copy
import subprocess
import sys

import numpy as np
import pytest

import minires
from minires import Tensor


def leaf(*values):
    return minires.tensor(values, requires_grad=True)


# In place


def test_in_place_with_a_graph_goes_on_in_the_same_object():
    x = leaf(1.0, 2.0)
    a = x * 2
    b = a
    b += 1
    assert b is a and a.tolist() == [3, 5]
    a *= x
    a.backward(minires.tensor([3.0, 5.0]))
    assert x.grad.tolist() == [3 * 5, 5 * 9]  # (2x + 1) x: 4x + 1


def test_the_residual_blocks_line():
    x = leaf(1.0, -2.0)
    out = x * 3
    identity = x
    out += identity
    out.backward(minires.tensor([1.0, 10.0]))
    assert x.grad.tolist() == [4, 40] and x.tolist() == [1, -2]


def test_in_place_without_a_graph_writes_into_the_memory():
    array = np.array([1.0, 2.0, 3.0], np.float32)
    x = minires.from_numpy(array)
    view, same, version = x[1:], x, x.version[0]
    x += 1
    x *= 2
    x -= minires.tensor([0.0, 1.0, 2.0])
    x /= 2
    assert x is same and x.array is array and array.tolist() == [2, 2.5, 3]
    assert view.tolist() == [2.5, 3] and x.version[0] == version + 4
    view += 1
    assert x.tolist() == [2, 3.5, 4]


def test_a_tensor_without_gradient_joins_the_graph():
    total, x = minires.zeros(2), leaf(1.0, 2.0)
    for _ in range(3):
        total += x * x
    total.backward(minires.tensor([1.0, 10.0]))
    assert x.grad.tolist() == [6, 120]


def test_a_leaf_cannot_be_changed_within_the_graph_but_in_no_grad():
    p = leaf(1.0, 2.0)
    with pytest.raises(RuntimeError, match="leaf that requires gradients"):
        p += 1
    with pytest.raises(RuntimeError, match="within the graph"):
        p[0] = 1
    with pytest.raises(RuntimeError, match="within the graph"):
        p.zero_()
    (p * p).backward(minires.tensor([1.0, 1.0]))
    array, same = p.array, p
    with minires.no_grad():
        p -= 0.5 * p.grad
    assert p is same and p.array is array and p.tolist() == [0, 0] and p.is_leaf and p.requires_grad
    p.grad.zero_()
    assert p.grad.tolist() == [0, 0]
    p.data.fill_(3)
    p.data += 1
    assert p.tolist() == [4, 4]


def test_a_write_into_what_backward_needs_is_noticed():
    x, y = leaf(1.0, 2.0), minires.tensor([3.0, 4.0])
    product = x * y
    y[0] = 5
    with pytest.raises(RuntimeError, match="written into after the forward pass"):
        product.backward(minires.ones(2))


def test_in_place_results_must_fit():
    ints, row = minires.tensor([1, 2]), minires.ones(2)
    with pytest.raises(ValueError, match="float32"):
        ints += 0.5
    with pytest.raises(ValueError, match=r"shape \(3, 2\)"):
        row += minires.ones(3, 2)
    row += np.ones(2)  # float64 fits into float32, as in PyTorch
    assert row.dtype == minires.float32
    half = leaf(1.0).half() * 1
    half += leaf(2.0)
    assert half.dtype == minires.float16 and half.requires_grad


def test_methods_that_write():
    x = minires.ones(2, 3)
    assert x.add_(1, alpha=3) is x and x[0, 0].item() == 4
    assert x.mul_(2).sub_(3).div_(5).tolist() == [[1, 1, 1], [1, 1, 1]]
    assert x.clamp_(max=0.5).max().item() == 0.5
    assert x.fill_(7).copy_(minires.zeros(2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]
    x[0, 1:] = minires.tensor([1.0, 2.0])
    x[x == 0] = -1
    x[minires.tensor([1])] = 5
    assert x.tolist() == [[-1, 1, 2], [5, 5, 5]]


def test_random_fillings():
    minires.manual_seed(0)
    x = minires.empty(10_000)
    n = x.normal_(3, 2).numpy()
    assert abs(n.mean() - 3) < 5 * 2 / 100 and abs(n.std() - 2) < 5 * 2 / 141
    u = x.uniform_(-1, 3).numpy()
    assert u.min() >= -1 and u.max() < 3 and abs(u.mean() - 1) < 5 * 4 / 346


# Conversions


def test_to():
    x = leaf(1.0, 2.0)
    assert x.to("cpu") is x and x.to(minires.float32) is x and x.float() is x and x.cpu() is x
    assert x.to(minires.ones(1, dtype=minires.float64)).dtype == minires.float64
    assert x.to("cpu", minires.float16).dtype == x.to(device="cpu", dtype=minires.float16).dtype == minires.float16
    (x.double() * 3).backward(Tensor(np.array([1.0, 2.0])))
    assert x.grad.dtype == minires.float32 and x.grad.tolist() == [3, 6]
    for name, dtype in [("long", "int64"), ("int", "int32"), ("bool", "bool")]:
        converted = getattr(x, name)()
        assert converted.dtype == dtype and not converted.requires_grad
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        x.to("tpu")


def test_numpy_and_numbers():
    x = leaf(1.5, 2.5)
    assert x.numpy() is x.array and np.asarray(x) is x.array
    assert np.array(x, np.float64).dtype == np.float64 and np.array(x) is not x.array
    assert x[0].item() == 1.5 and type(x[0].item()) is float and type((x > 1).sum().item()) is int
    assert type(x.to(minires.bfloat16)[0].item()) is float
    assert float(x[1]) == 2.5 and int(x[1]) == 2 and bool(x[0]) and not bool(x[0] > 2)
    assert [10, 20][minires.tensor(1)] == 20 and list(range(minires.tensor(2))) == [0, 1]
    assert f"{x[0]:.3f}" == "1.500" and f"{x}" == repr(x)
    assert len(x) == 2 and [v.item() for v in x] == [1.5, 2.5]
    with pytest.raises(ValueError, match="one element"):
        x.item()
    with pytest.raises(ValueError, match="no single truth value"):
        bool(x)
    with pytest.raises(TypeError, match="integer tensor"):
        [1][x[0]]
    with pytest.raises(TypeError, match="without axes"):
        len(x[0])


def test_shape_questions():
    x = minires.zeros(2, 3, 4)
    assert x.size() == x.shape == (2, 3, 4) and x.size(-1) == 4 and type(x.size(0)) is int
    assert x.dim() == x.ndim == 3 and x.numel() == 24 and x.is_floating_point() and not x.long().is_floating_point()
    assert not x.is_cuda and x.device == minires.device("cpu") and x.contiguous() is x
    assert x.view_as(minires.zeros(6, 4)).shape == (6, 4)


def test_text():
    assert repr(minires.tensor([[1.0, -2.5]])) == "tensor([[ 1. , -2.5]])"
    assert repr(minires.tensor([1, 2])) == "tensor([1, 2])"
    assert repr(leaf(1.0)) == "tensor([1.], requires_grad=True)"
    assert repr(leaf(1.0) * 2) == "tensor([2.], op=Mul)"
    assert repr(minires.zeros(1, dtype=minires.float64)) == "tensor([0.], dtype=float64)"


def test_comparisons():
    x, y = minires.tensor([1.0, 2.0, 3.0]), minires.tensor([3.0, 2.0, 1.0])
    for name, expected in [
        ("eq", [0, 1, 0]),
        ("ne", [1, 0, 1]),
        ("lt", [1, 0, 0]),
        ("le", [1, 1, 0]),
        ("gt", [0, 0, 1]),
    ]:
        assert getattr(x, name)(y).tolist() == [bool(e) for e in expected]
    assert (x >= 2).tolist() == (2 <= x).tolist() == (x >= np.full(3, 2)).tolist() == [False, True, True]
    assert (x == 2).dtype == minires.bool and not (leaf(1.0) == 1).requires_grad
    assert ((x > 1) & (x < 3)).tolist() == [False, True, False] and (~(x > 1) | (x == 3)).tolist() == [
        True,
        False,
        True,
    ]
    assert (x == None) is False and (x != None) is True  # noqa: E711
    assert (x > 0).all() and not (x > 3).any() and (x > 2).any(0).shape == ()
    assert len({x, y, x}) == 2  # the hash is the identity


def test_numpy_operands_on_the_left():
    x = leaf(1.0, 2.0)
    for y in (np.ones(2, np.float32) + x, np.float32(3) - x, 3 / x, 2**x, np.ones((2, 2), np.float32) @ x, x @ x.array):
        assert isinstance(y, Tensor) and y.requires_grad


def test_copies():
    x = leaf(1.0, 2.0)
    y = copy.deepcopy(x)
    assert y.tolist() == [1, 2] and y.requires_grad and not np.shares_memory(x.array, y.array)
    with minires.no_grad():
        y += 1
    assert x.tolist() == [1, 2]


# Creation


@pytest.mark.parametrize(
    ("data", "dtype", "shape"),
    [
        (1.5, "float32", ()),
        (2, "int64", ()),
        (True, "bool", ()),
        ([1, 2.5], "float32", (2,)),
        ([[1, 2], [3, 4]], "int64", (2, 2)),
        ([], "float32", (0,)),
        (1j, "complex64", ()),
        (np.ones(2), "float64", (2,)),
        (np.ones(2, np.uint8), "uint8", (2,)),
        (np.float64(1), "float64", ()),
        ([minires.tensor(1.0), minires.tensor(2.0)], "float32", (2,)),
    ],
)
def test_tensor(data, dtype, shape):
    x = minires.tensor(data)
    assert x.dtype == dtype and x.shape == shape
    assert not isinstance(data, np.ndarray) or not np.shares_memory(x.array, data)


def test_tensor_of_what_is_no_number():
    for data in ("abc", [None], {}):
        with pytest.raises(TypeError, match="holds numbers"):
            minires.tensor(data)
    with pytest.raises(ValueError, match="only floating"):
        minires.tensor([1, 2], requires_grad=True)
    with pytest.raises(TypeError, match="from_numpy needs"):
        minires.from_numpy([1.0])


def test_as_tensor_and_from_numpy_share():
    array = np.ones(2)
    assert minires.from_numpy(array).array is array and minires.as_tensor(array).array is array
    x = minires.as_tensor([1.0])
    assert minires.as_tensor(x) is x and minires.as_tensor(x, dtype=minires.float64).dtype == minires.float64


def test_filled():
    for size in ((2, 3), ((2, 3),), ([2, 3],)):
        for make, value in ((minires.zeros, 0), (minires.ones, 1)):
            x = make(*size)
            assert x.dtype == minires.float32 and x.array.tolist() == [[value] * 3] * 2
        assert minires.empty(*size).shape == minires.randn(*size).shape == minires.rand(*size).shape == (2, 3)
    assert minires.full((2,), 3).dtype == minires.int64 and minires.full((2,), 0.5).tolist() == [0.5, 0.5]
    assert minires.ones(2, dtype=minires.float16, requires_grad=True).requires_grad
    assert minires.arange(3).tolist() == [0, 1, 2] and minires.arange(3).dtype == minires.int64
    assert minires.arange(1, 2, 0.5).tolist() == [1, 1.5] and minires.arange(2.0).dtype == minires.float32
    assert minires.linspace(0, 1, 3).tolist() == [0, 0.5, 1] and minires.eye(2, 3).tolist() == [[1, 0, 0], [0, 1, 0]]
    x = Tensor(np.ones((2, 5, 5, 3)).transpose(0, 3, 1, 2))
    for like in (minires.zeros_like(x), minires.ones_like(x), minires.full_like(x, 2), minires.randn_like(x)):
        assert like.shape == x.shape and like.dtype == x.dtype
    assert minires.zeros_like(x).array.strides == x.array.strides


def test_random_numbers_follow_the_seed():
    def draw():
        return [
            t.tolist() for t in (minires.randn(3), minires.rand(3), minires.randint(0, 9, (3,)), minires.randperm(5))
        ]

    minires.manual_seed(1)
    first = draw()
    assert first != draw()
    minires.manual_seed(1)
    assert first == draw()
    assert sorted(minires.randperm(5).tolist()) == [0, 1, 2, 3, 4]
    assert set(minires.randint(3, (100,)).tolist()) == {0, 1, 2} and minires.randint(5, 7, (2,)).dtype == minires.int64
    assert minires.randn(2, dtype=minires.float64).dtype == minires.float64
    assert minires.randn(2, dtype=minires.float16).dtype == minires.float16


# The package


def test_save_and_load(tmp_path):
    x = minires.arange(6.0).reshape(2, 3)
    state = {
        "strided": x.T,
        "channels last": Tensor(np.arange(24.0).reshape(1, 2, 4, 3).transpose(0, 3, 1, 2)),
        "number": minires.tensor(7),
        "half": x.to(minires.bfloat16),
        "mask": x > 2,
    }
    path = tmp_path / "state.safetensors"
    minires.save(state, path)
    loaded = minires.load(path)
    assert loaded.keys() == state.keys() and [p.name for p in tmp_path.iterdir()] == [path.name]
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
        np.testing.assert_array_equal(loaded[name].array, value.array)
    loaded["number"] += 1  # writable
    with pytest.raises(TypeError, match="'epoch' is int"):
        minires.save({"epoch": 3}, path)
    (tmp_path / "other").write_bytes(b"no such file")
    with pytest.raises(ValueError, match="not a safetensors file"):
        minires.load(tmp_path / "other")


def test_names_of_the_package():
    assert minires.float is minires.float32 and minires.long == np.int64 and minires.bfloat16.itemsize == 2
    assert {minires.float32: 1}[minires.ones(1).dtype] == 1
    assert minires.is_grad_enabled() and minires.__version__[0].isdigit()
    with minires.no_grad():
        assert not minires.is_grad_enabled()
    assert 1 <= minires.get_num_threads()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = minires.nonsense
    assert callable(minires.gradcheck) and callable(minires.capture) and callable(minires.device)  # not the modules
    missing = [name for name in minires.__all__ if not hasattr(minires, name)]
    assert not missing


def test_import_is_light():
    heavy = ("torch", "PIL", "sklearn", "matplotlib", "rich", "cyclopts", "safetensors", "cupy", "minires.models")
    code = f"import sys, minires; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = "import minires.nn as nn, minires; from minires import optim; print(minires.nn is nn, optim.SGD.__name__)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True SGD\n"
    )


@pytest.mark.peers
def test_in_place_semantics_equal_pytorch():
    torch = pytest.importorskip("torch")

    def program(lib):
        x = lib.tensor([1.0, 2.0], requires_grad=True)
        a = x * 2
        b = a
        b += 1
        b *= x
        out = lib.zeros(2)
        out += b
        out -= x / 2
        out.backward(lib.tensor([3.0, 5.0]))
        with lib.no_grad():
            x -= 0.1 * x.grad
        x.data.mul_(2)
        return a.tolist(), out.tolist(), x.tolist(), x.grad.tolist(), x.is_leaf, b is a

    assert program(minires) == program(torch)
