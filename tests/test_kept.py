"""What kernels keep of constant filters is never stale, and goes with them."""

import gc
import threading

import numpy as np
import pytest
from minires.kernels import kept as module
from minires.kernels.kept import kept, kept_bytes

import minires
from minires import nn
from minires.dispatch import constant
from minires.engine import no_grad


@pytest.fixture(autouse=True)
def nothing_kept():
    module._entries.clear()
    yield
    module._entries.clear()


@kept
def doubled(a, plus=0):
    made.append(plus)
    return 2 * a + plus


@kept
def quadrupled(a):
    return doubled(doubled(a))


made = []


def calls(function, *arguments):
    """The result, and how often `doubled` ran for it."""
    made.clear()
    return function(*arguments), len(made)


def test_made_once_for_each_setting_until_the_count_changes():
    a, version = np.arange(3.0), [0]
    for expected in (1, 0, 0):
        with constant(a, version):
            y, n = calls(doubled, a)
            z, m = calls(doubled, a, 5)
        assert (n, m) == (expected, expected)
        assert np.array_equal(y, 2 * a) and np.array_equal(z, 2 * a + 5)
    a[0] = 9
    version[0] += 1
    with constant(a, version):
        y, n = calls(doubled, a)
    assert n == 1 and y[0] == 18


def test_what_is_made_of_a_constant_is_one_and_what_lies_between_is_not_kept():
    a, version = np.arange(3.0), [0]
    for expected in (1, 0):
        with constant(a, version):
            y, n = calls(lambda: doubled(doubled(a)))
        assert n == 2 * expected and np.array_equal(y, 4 * a)
    module._entries.clear()
    with constant(a, version):
        assert np.array_equal(quadrupled(a), 4 * a) and kept_bytes() == a.nbytes


def test_elsewhere_nothing_is_kept():
    a, b = np.arange(3.0), np.arange(3.0)
    with constant(a, [0]):
        assert calls(doubled, b)[1] == 1 == calls(doubled, b)[1]
    assert calls(doubled, a)[1] == 1 == calls(doubled, a)[1]
    assert kept_bytes() == 0


def test_another_array_at_the_same_address_or_with_the_same_id_is_another():
    memory, version = np.arange(4.0), [0]
    first, second = memory[:2], memory[:2]
    with constant(first, version):
        doubled(first)
    memory[:2] = 7  # as when an array was freed and another one lies there
    with constant(second, version):
        assert np.array_equal(doubled(second), [14, 14])
    ids = set()
    for i in range(50):  # ids come again
        a = np.full(2, float(i))
        ids.add(id(a))
        with constant(a, version):
            assert np.array_equal(doubled(a), 2 * a)
        del a
    assert len(ids) < 50


def test_what_is_kept_goes_with_the_array():
    a = np.arange(1000.0)
    with constant(a, [0]):
        doubled(a)
    assert kept_bytes() == a.nbytes
    del a
    gc.collect()
    assert kept_bytes() == 0 and not module._entries


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "_MOST_BYTES", 10_000)
    arrays = [np.full(400, float(i)) for i in range(20)]
    for _ in range(2):
        for a in arrays:
            with constant(a, [0]):
                assert np.array_equal(doubled(a), 2 * a)
            assert kept_bytes() <= 10_000


def test_an_error_leaves_nothing_switched_on():
    @kept
    def fails(a):
        raise ValueError("no")

    a = np.arange(3.0)
    with pytest.raises(ValueError), constant(a, [0]):
        fails(a)
    assert not module._now.entries and kept_bytes() == 0


def network():
    """1x1, strided and Winograd convolutions, folded."""
    minires.manual_seed(0)
    sizes = ((16, 32, 1, 1), (32, 32, 3, 1), (32, 16, 3, 2))
    layers = [(nn.Conv2d(c, k, taps, stride, taps // 2), nn.BatchNorm2d(k)) for c, k, taps, stride in sizes]
    return nn.fuse_for_inference(nn.Sequential(*[layer for pair in layers for layer in pair]))


def agree(model, x):
    """What the model computes now is what it computes where nothing was kept, bit for bit."""
    with no_grad():
        got = model(x).array
        assert kept_bytes() > 0
        module._entries.clear()
        want = model(x).array
    assert np.array_equal(got, want)
    return got


def _load(model, optimizer):
    model.load_state_dict({name: t.array * 0.5 for name, t in model.state_dict().items()})


def _train(model, optimizer):
    model(minires.randn(2, 16, 9, 9)).sum().backward()
    optimizer.step()


def _copy(model, optimizer):
    with no_grad():
        for p in model.parameters():
            p.copy_(p * 0.5)


def _data(model, optimizer):
    for p in model.parameters():
        p.data *= 0.5


def _indexed(model, optimizer):
    for p in model.parameters():
        p.data[0] = minires.randn(1).item()


def _replaced(model, optimizer):
    for p in model.parameters():
        p.data = p.array * 0.5


def _through_the_state_dict(model, optimizer):
    for t in model.state_dict().values():
        t.mul_(0.5) if hasattr(t, "mul_") else t.copy_(t * 0.5)


def _initialised(model, optimizer):
    for p in model.parameters():
        nn.init.constant_(p, minires.rand(1).item())


def _new_arrays(model, optimizer):
    for p in model.parameters():
        p.array = p.array * 0.5


WRITES = [_load, _train, _copy, _data, _indexed, _replaced, _through_the_state_dict, _initialised, _new_arrays]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_into_the_weights_is_seen(write, bf16):
    model, x = network(), minires.randn(2, 16, 9, 9)
    optimizer = minires.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with minires.autocast("cpu", dtype=minires.bfloat16, enabled=bf16):
        before = agree(model, x)
    for _ in range(2):
        with minires.autocast("cpu", dtype=minires.bfloat16, enabled=bf16):
            with no_grad():
                model(x)  # keeps
            write(model, optimizer)
            after = agree(model, x)
        assert not np.array_equal(before, after)
        before = agree(model, x)


@pytest.mark.parametrize("regions", [0, 1, 3])
def test_nothing_is_made_again_in_inference(regions):
    model, x = network(), minires.randn(2, 16, 9, 9)

    def infer(bf16):
        with no_grad(), minires.autocast("cpu", dtype=minires.bfloat16, enabled=bf16):
            return model(x).array

    def things():
        return [(place, id(thing)) for entry in module._entries.values() for place, thing in entry.made.items()]

    want = infer(regions > 0)
    before = things()
    with minires.autocast("cpu", dtype=minires.bfloat16, enabled=regions == 1):  # the cast of a weight is kept in it
        for _ in range(3):
            assert np.array_equal(infer(regions > 0), want)
    assert len(module._entries) == 6 and things() == before  # three filters and their biases


def test_gradients_keep_nothing():
    model = network()
    model(minires.randn(2, 16, 9, 9)).sum().backward()
    assert kept_bytes() == 0


def test_threads_share_what_is_kept():
    model, x = network(), minires.randn(2, 16, 9, 9)
    with no_grad():
        want = model(x).array
    found = []

    def infer():
        with no_grad():
            found.append(model(x).array)

    for clear in (False, True):
        if clear:
            module._entries.clear()
        threads = [threading.Thread(target=infer) for _ in range(4)]
        for thread in threads:  # kernels of several threads take turns: one launches at a time
            thread.start()
            thread.join()
    assert len(found) == 8 and all(np.array_equal(y, want) for y in found)
