"""The engine: whose gradient is whose, what is kept and for how long, and graphs that are deep or wide."""

import gc
import threading
import weakref

import numpy as np
import pytest

from minires import no_grad, set_grad_enabled
from minires.engine import Function, Handle, Scope, Tensor, state


def leaf(*shape, seed=0, dtype=np.float64):
    return Tensor(np.random.default_rng(seed).standard_normal(shape).astype(dtype), requires_grad=True)


def upstream(*shape):
    return np.random.default_rng(99).standard_normal(shape)


class Double(Function):
    """Keeps nothing."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


class Square(Function):
    """Keeps its input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_for_backward
        return 2 * x * dy


class Exp(Function):
    """Keeps its output."""

    @staticmethod
    def forward(ctx, x):
        y = np.exp(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_for_backward[0]


# --- ownership of gradients -----------------------------------------------------------------------------------------


def test_a_gradient_that_two_inputs_share_is_not_written_into():
    x = leaf(5)
    dy = upstream(5)
    ((x + x) + (x + x)).backward(dy)  # the inner sums' gradients are the very array dy
    np.testing.assert_array_equal(x.grad.array, 4 * dy)
    np.testing.assert_array_equal(dy, upstream(5))


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("uses", [1, 2, 3, 4, 7])
def test_every_use_of_a_value_counts_once(shape, uses):
    x = leaf(*shape)
    y = Double.apply(x)  # also at a value inside the graph; 0-d gradients are NumPy scalars, which += does not change
    total = y
    for _ in range(uses - 1):
        total = total + y
    dy = upstream(*shape)
    total.backward(dy)
    np.testing.assert_allclose(x.grad.array, 2 * uses * dy, rtol=1e-14)


def test_leaf_gradients_share_no_memory():
    a, b = leaf(4), leaf(4, seed=1)
    dy = upstream(4)
    (a + b).backward(dy)
    assert not np.shares_memory(a.grad.array, b.grad.array)
    assert not np.shares_memory(a.grad.array, dy)
    a.grad.array[...] = 0
    np.testing.assert_array_equal(b.grad.array, dy)


def test_backward_from_a_leaf_gives_it_a_copy_of_the_gradient():
    x, dy = leaf(3), upstream(3)
    x.backward(dy)
    np.testing.assert_array_equal(x.grad.array, dy)
    assert not np.shares_memory(x.grad.array, dy)


def test_a_gradient_that_a_hook_saw_or_gave_is_not_the_leaf_s_own():
    x, seen, given = leaf(3), [], np.ones(3)
    x.register_hook(seen.append)
    x.register_hook(lambda grad: Tensor(given))
    for _ in range(2):
        (x + x).backward(upstream(3))
    np.testing.assert_array_equal(seen[0].array, 2 * upstream(3))
    np.testing.assert_array_equal(x.grad.array, [2, 2, 2])
    np.testing.assert_array_equal(given, 1)


def test_backward_adds_to_the_gradients_that_are_there():
    x, dy = leaf(3), upstream(3)
    Square.apply(x).backward(dy)
    first = x.grad.array.copy()
    Double.apply(x).backward(dy)
    np.testing.assert_allclose(x.grad.array, first + 2 * dy, rtol=1e-14)


def test_a_leaf_s_gradient_lies_in_memory_as_the_leaf_does():
    x = Tensor(np.random.default_rng(0).standard_normal((2, 4, 5, 3)).transpose(0, 3, 1, 2), requires_grad=True)
    Double.apply(x).backward(upstream(2, 3, 4, 5))
    assert x.grad.array.strides == x.array.strides


def test_one_tensor_as_both_inputs_of_an_op():
    x = leaf(3)
    (x * x).backward(upstream(3))
    np.testing.assert_allclose(x.grad.array, 2 * x.array * upstream(3), rtol=1e-14)


def test_in_place_addition_in_a_residual_block():
    x = leaf(3)
    out = Square.apply(x)
    early = Exp.apply(out)
    before = out
    out += x
    assert out is before
    (early + Square.apply(out)).backward(upstream(3))
    a = x.array
    want = (2 * a * np.exp(a**2) + 2 * (a**2 + a) * (2 * a + 1)) * upstream(3)
    np.testing.assert_allclose(x.grad.array, want, rtol=1e-12)


# --- deep and wide graphs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("walked", [True, False])
def test_a_chain_of_100_000_nodes_runs_forward_and_backward_and_is_deleted(walked):
    class Accumulate(Function):
        @staticmethod
        def forward(ctx, y, x):
            return y + x

        @staticmethod
        def backward(ctx, dy):
            return dy, dy

    x = leaf(2)
    y = Accumulate.apply(x, x)
    first = weakref.ref(y.node)
    for _ in range(99_999):
        y = Accumulate.apply(y, x)
    if walked:
        y.backward(upstream(2))
        np.testing.assert_allclose(x.grad.array, 100_001 * upstream(2), rtol=1e-9)
    else:
        assert first() is not None
        del y  # the whole chain, in one go
    gc.collect()
    assert first() is None


def test_a_residual_stack_is_walked_once_and_not_once_per_path():
    x = leaf(3)
    visits = []

    class Half(Function):
        @staticmethod
        def forward(ctx, x):
            return x / 2

        @staticmethod
        def backward(ctx, dy):
            visits.append(1)
            return dy / 2

    h = x
    for _ in range(60):  # 2**60 paths
        h = h + Half.apply(h)
    h.backward(upstream(3))
    assert len(visits) == 60
    np.testing.assert_allclose(x.grad.array, 1.5**60 * upstream(3), rtol=1e-12)


# --- what is kept, and for how long ---------------------------------------------------------------------------------


def test_a_node_keeps_what_it_saved_and_nothing_else():
    x = leaf(3)
    kept, not_kept = Double.apply(x), Double.apply(x)
    alive = weakref.ref(kept.array), weakref.ref(not_kept.array)
    y, z = Square.apply(kept), Double.apply(not_kept)
    del kept, not_kept
    assert alive[0]() is not None and alive[1]() is None
    assert y.requires_grad and z.requires_grad


def test_saved_arrays_are_released_as_backward_passes():
    saved, alive_at = [], []

    class Watch(Function):
        @staticmethod
        def forward(ctx, x):
            kept = x + 1
            ctx.save_for_backward(kept)
            ctx.extra = np.zeros(3)
            saved.append((weakref.ref(kept), weakref.ref(ctx.extra)))
            return x + 1

        @staticmethod
        def backward(ctx, dy):
            alive_at.append([[r() is not None for r in refs] for refs in saved])
            return dy

    y, tensors = leaf(3), []
    for _ in range(3):
        y = Watch.apply(y)
        tensors.append(y)  # somebody holds the results, and so the nodes
    y.backward(upstream(3))
    here, gone = [True, True], [False, False]
    assert alive_at == [[here, here, here], [here, here, gone], [here, gone, gone]]
    assert not any(r() is not None for refs in saved for r in refs)
    assert all(t.node is not None for t in tensors)


def test_a_freed_graph_says_so():
    y = Square.apply(leaf(3))
    y.backward(upstream(3))
    with pytest.raises(RuntimeError, match=r"freed what Square saved.*retain_graph=True"):
        y.backward(upstream(3))


def test_retain_graph_allows_another_backward():
    x = leaf(3)
    y = Square.apply(x)
    y.backward(upstream(3), retain_graph=True)
    first = x.grad.array.copy()
    y.backward(upstream(3))
    np.testing.assert_array_equal(x.grad.array, 2 * first)


def test_where_backward_raises_no_leaf_has_changed_and_the_next_graph_works():
    class Fails(Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, dy):
            raise ZeroDivisionError("as it should")

    a, b = leaf(3), leaf(3, seed=1)
    with pytest.raises(ZeroDivisionError):
        (Double.apply(a) + Fails.apply(b)).backward(upstream(3))
    assert a.grad is None and b.grad is None
    Double.apply(a).backward(upstream(3))
    np.testing.assert_array_equal(a.grad.array, 2 * upstream(3))


@pytest.mark.parametrize("op", [Square, Exp])
@pytest.mark.parametrize("write", ["copy_", "data", "detach", "view"])
def test_writing_into_a_saved_tensor_is_noticed(op, write):
    x = Double.apply(leaf(4))
    y = op.apply(x)
    saved = x if op is Square else y
    target = saved.reshape(2, 2) if write == "view" else saved.detach() if write == "detach" else saved
    if write == "data":
        saved.data = np.zeros(4)
    else:
        target.data.copy_(np.zeros(target.shape))
    with pytest.raises(RuntimeError, match=f"backward of {op.__name__} needs a tensor that was written into"):
        y.backward(upstream(4))


def test_writing_into_a_tensor_that_nobody_saved_is_allowed():
    x = leaf(3)
    y = Double.apply(x)
    x.data.copy_(np.zeros(3))
    y.backward(upstream(3))
    np.testing.assert_array_equal(x.grad.array, 2 * upstream(3))


# --- hooks of tensors -----------------------------------------------------------------------------------------------


def test_a_tensor_s_hook_sees_the_whole_gradient_and_may_replace_it():
    x = leaf(3)
    y = Double.apply(x)
    seen = []
    y.register_hook(lambda grad: seen.append(grad.array.copy()))
    handle = y.register_hook(lambda grad: Tensor(10 * grad.array))
    assert isinstance(handle, Handle)
    (y + y).backward(upstream(3), retain_graph=True)
    np.testing.assert_array_equal(seen, [2 * upstream(3)])
    np.testing.assert_allclose(x.grad.array, 40 * upstream(3), rtol=1e-14)
    handle.remove()
    handle.remove()
    x.grad = None
    Double.apply(x).backward(upstream(3))
    np.testing.assert_array_equal(x.grad.array, 2 * upstream(3))


def test_a_hook_that_raises_leaves_the_hooks_in_place():
    x = leaf(3)
    with x.register_hook(lambda grad: 1 / 0), pytest.raises(ZeroDivisionError):
        Double.apply(x).backward(upstream(3))
    Double.apply(x).backward(upstream(3))
    np.testing.assert_array_equal(x.grad.array, 2 * upstream(3))


@pytest.mark.parametrize("given", [np.zeros(3, np.float32), np.zeros((3, 1)), np.zeros(())])
def test_a_hook_must_give_a_gradient_like_the_one_it_got(given):
    x = leaf(3)
    y = Double.apply(x)
    for at in (x, y):
        with (
            at.register_hook(lambda grad: Tensor(given)),
            pytest.raises(RuntimeError, match=r"a hook must keep float64 \(3,\), not"),
        ):
            y.backward(upstream(3), retain_graph=True)
    assert x.grad is None


def test_a_hook_needs_a_tensor_with_gradients_and_must_be_callable():
    with pytest.raises(RuntimeError, match="requires gradients"):
        Tensor(np.zeros(3)).register_hook(print)
    with pytest.raises(TypeError, match="must be callable"):
        leaf(3).register_hook(3)


def test_retain_grad_keeps_the_gradient_of_an_inner_tensor_but_not_the_tensor():
    x = leaf(3)
    y, z = Double.apply(x), Double.apply(x)
    y.retain_grad()
    y.retain_grad()
    z.retain_grad()
    loss = y + z + y
    alive = weakref.ref(z)
    del z
    assert alive() is None
    loss.backward(upstream(3), retain_graph=True)
    np.testing.assert_array_equal(y.grad.array, 2 * upstream(3))
    loss.backward(upstream(3))
    np.testing.assert_array_equal(y.grad.array, 4 * upstream(3))  # added up, as a leaf's


# --- grad mode ------------------------------------------------------------------------------------------------------


def test_no_grad_as_context_and_decorator():
    x = leaf(3)

    @no_grad()
    def without():
        return Square.apply(x)

    assert not without().requires_grad and not without().requires_grad
    with no_grad():
        y = Square.apply(x)
        with set_grad_enabled(True):
            assert Square.apply(x).requires_grad
        assert not Square.apply(x).requires_grad
    assert y.is_leaf and Square.apply(x).requires_grad


def test_grad_mode_survives_an_exception_and_belongs_to_its_thread():
    with pytest.raises(ZeroDivisionError), no_grad():
        raise ZeroDivisionError
    assert state.grad_enabled
    elsewhere = []
    with no_grad():
        thread = threading.Thread(target=lambda: elsewhere.append(Square.apply(leaf(2)).requires_grad))
        thread.start()
        thread.join()
    assert elsewhere == [True]


def test_without_gradients_nothing_is_kept():
    x = leaf(3)
    with no_grad():
        a = Double.apply(x)
        alive = weakref.ref(a.array)
        b = Square.apply(a)
        del a
    assert alive() is None and b.node is None


# --- errors ---------------------------------------------------------------------------------------------------------


def test_errors_name_the_remedy():
    x = leaf(2, 3)
    with pytest.raises(RuntimeError, match="requires gradients"):
        Tensor(np.zeros(3)).backward()
    with pytest.raises(ValueError, match=r"shape \(2, 3\) needs a `gradient`"):
        Double.apply(x).backward()
    with pytest.raises(ValueError, match=r"shape \(2, 3\) needs a `gradient`"):
        Double.apply(x).backward(np.zeros(3))
    with pytest.raises(ValueError, match="only floating tensors"):
        Tensor(np.zeros(3, int), requires_grad=True)
    with pytest.raises(ValueError, match="only floating tensors"):
        Tensor(np.zeros(3, int)).requires_grad_()
    with pytest.raises(RuntimeError, match="use detach"):
        Double.apply(x).requires_grad_(False)
    with pytest.raises(ValueError, match=r"shape \(3,\) into a tensor of shape \(2, 3\)"):
        x.copy_(np.zeros(3))


@pytest.mark.parametrize("wrong", [lambda dy: dy[:1], lambda dy: (dy, dy), lambda dy: ()])
def test_a_backward_that_returns_the_wrong_shapes_is_named(wrong):
    class Wrong(Function):
        @staticmethod
        def forward(ctx, x):
            return x + 0

        @staticmethod
        def backward(ctx, dy):
            return wrong(dy)

    with pytest.raises(RuntimeError, match="backward of Wrong returned shapes"):
        Wrong.apply(leaf(3)).backward(upstream(3))


def test_none_is_no_gradient():
    class Stops(Function):
        @staticmethod
        def forward(ctx, x, mask):
            assert ctx.needs_grad == (True, False)
            return x if mask is None else x * mask

        @staticmethod
        def backward(ctx, dy):
            return None, None

    x = leaf(3)
    (Stops.apply(x, None) + x).backward(upstream(3))
    np.testing.assert_array_equal(x.grad.array, upstream(3))


def test_numpy_scalars_become_arrays_and_the_loss_gradient_has_its_dtype():
    x = leaf(3, dtype=np.float32)
    y = Tensor(np.float32(2.0), requires_grad=True)
    assert isinstance(y.array, np.ndarray)
    (x.sum() * y).backward()
    assert x.grad.dtype == y.grad.dtype == np.float32 and isinstance(y.grad.array, np.ndarray)


def test_nodes_remember_the_running_module():
    outer = Scope("outer", None)
    state.scope = Scope("inner", outer)
    try:
        y = Double.apply(leaf(2))
    finally:
        state.scope = None
    assert (y.node.scope.module, y.node.scope.parent.module) == ("inner", "outer")
    assert Double.apply(leaf(2)).node.scope is None
