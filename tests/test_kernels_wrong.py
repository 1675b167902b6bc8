"""Deliberately wrong kernels: each is rejected, and by the check that is named for what is wrong with it."""

import inspect

import minires.kernels  # noqa: F401  (registers)
import ml_dtypes
import numpy as np
import pytest
from minires.kernels import registry
from minires.kernels.checking import check_case
from minires.kernels.conv2d.winograd import F4
from minires.kernels.memory import empty

DEFINITION = {p.name: p.reference for p in registry.problems()}
WRONG = []
rng = np.random.default_rng(0)


def wrong(problem, failure, **fields):
    """Note the decorated function as a wrong kernel of `problem`, to be rejected as `failure`."""

    def note(fn):
        WRONG.append(pytest.param(_kernel(registry.problem(problem), fn, **fields), failure, id=fn.__name__))
        return fn

    return note


def _kernel(problem, fn, **fields):
    return registry.Kernel(problem, fn.__name__, "cpu", 1, "wrong", fn, dtypes=("any",), **fields)


def _test_cases(problem):
    return [case for case in problem.cases if "test" in case.tags]


# Convolution


@wrong("conv2d_fprop", "wrong value")
def padding_off_by_one(x, w, *, stride, padding, dilation, groups):
    above, below = (0, 0), (0, 0)
    shifted = np.pad(x, (above, below, (padding[0] + 1, max(padding[0] - 1, 0)), (padding[1],) * 2))
    taller = shifted if padding[0] else shifted[:, :, :-1]
    return DEFINITION["conv2d_fprop"](taller, w, stride=stride, padding=(0, 0), dilation=dilation, groups=groups)


@wrong("conv2d_fprop", "wrong value")
def inputs_rounded_to_tf32(x, w, *, stride, padding, dilation, groups):
    def rounded(a):  # 10 bits of mantissa
        bits = a.astype(np.float32).view(np.uint32) + np.uint32(0x1000)
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(a.dtype)

    params = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    return DEFINITION["conv2d_fprop"](rounded(x), rounded(w), **params)


@wrong("conv2d_fprop", "wrong value")
def groups_interleaved(x, w, *, stride, padding, dilation, groups):
    n, c, *hw = x.shape
    x = x.reshape(n, c // groups, groups, *hw).swapaxes(1, 2).reshape(x.shape)
    return DEFINITION["conv2d_fprop"](x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)


@wrong("conv2d_fprop", "wrong value")
def filter_axes_swapped(x, w, *, stride, padding, dilation, groups):
    w = w.swapaxes(2, 3) if w.shape[2] == w.shape[3] else w
    return DEFINITION["conv2d_fprop"](x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)


@wrong("conv2d_fprop", "wrong value")
def convolution_instead_of_correlation(x, w, *, stride, padding, dilation, groups):
    w = w[:, :, ::-1, ::-1]
    return DEFINITION["conv2d_fprop"](x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)


@wrong("conv2d_fprop", "unwritten output")
def last_tile_forgotten(x, w, *, stride, padding, dilation, groups):
    right = DEFINITION["conv2d_fprop"](x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)
    y = empty(right.shape, right.dtype)
    whole = w.shape[0] // 8 * 8 or w.shape[0]  # channels in whole vectors of 8
    y[:, :whole] = right[:, :whole]
    return y


@wrong("conv2d_fprop", "unwritten output")
def accumulates_into_uninitialised_memory(x, w, *, stride, padding, dilation, groups):
    right = DEFINITION["conv2d_fprop"](x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)
    y = empty(right.shape, right.dtype)
    y += right
    return y


@wrong("conv2d_fprop", "layout")
def strided_memory_read_as_contiguous(x, w, *, stride, padding, dilation, groups):
    memory = x if x.base is None else x.base
    x = memory.reshape(-1)[: x.size].reshape(x.shape)
    return DEFINITION["conv2d_fprop"](x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)


@wrong("conv2d_fprop", "dtype")
def answers_in_float64(x, w, *, stride, padding, dilation, groups):
    params = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    return DEFINITION["conv2d_fprop"](x.astype(np.float64), w.astype(np.float64), **params)


@wrong("conv2d_fprop", "shape")
def answers_flattened(x, w, *, stride, padding, dilation, groups):
    params = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    return DEFINITION["conv2d_fprop"](x, w, **params).reshape(len(x), -1)


@wrong("conv2d_fprop", "input changed")
def scales_its_input(x, w, *, stride, padding, dilation, groups):
    y = DEFINITION["conv2d_fprop"](x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)
    memory = x if x.base is None else x.base
    memory *= 2
    return y


@wrong("conv2d_fprop", "not deterministic")
def last_bit_by_chance(x, w, *, stride, padding, dilation, groups):
    y = DEFINITION["conv2d_fprop"](x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return y + np.finfo(y.dtype).eps * y * rng.integers(-1, 2, y.shape).astype(y.dtype)


_buffers = {}


@wrong("conv2d_fprop", "stale output")
def output_buffer_used_again(x, w, *, stride, padding, dilation, groups):
    y = DEFINITION["conv2d_fprop"](x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)
    buffer = _buffers.setdefault((y.shape, y.dtype), y)
    buffer[...] = y
    return buffer


_packed = {}


@wrong("conv2d_fprop", "stale output")
def packed_weights_kept_by_shape(x, w, *, stride, padding, dilation, groups):
    # "new" per process and per case: the first call is right
    key = (x.shape, w.shape, w.dtype, w.strides, stride, padding, dilation)
    w = _packed.setdefault(key, w.copy())
    return DEFINITION["conv2d_fprop"](x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)


@wrong("conv2d_fprop", "raised")
def refuses_groups(x, w, *, stride, padding, dilation, groups):
    if groups > 1:
        raise ValueError("no groups here")
    return DEFINITION["conv2d_fprop"](x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)


@wrong("conv2d_fprop", "signature")
def parameters_in_another_order(w, x, *, stride, padding, dilation, groups):
    return DEFINITION["conv2d_fprop"](x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)


@wrong("conv2d_dgrad", "unwritten output")
def pixels_that_no_window_saw_forgotten(dy, w, *, stride, padding, dilation, groups, input_hw):
    params = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, input_hw=input_hw)
    dx, seen = (
        DEFINITION["conv2d_dgrad"](dy, w, **params),
        DEFINITION["conv2d_dgrad"](np.ones_like(dy), np.ones_like(w), **params),
    )
    memory = empty(dx.shape, dx.dtype)
    memory[seen > 0] = dx[seen > 0]
    return memory


@wrong("conv2d_wgrad", "wrong value")
def last_image_forgotten(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    params = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, kernel_hw=kernel_hw)
    n = max(1, len(x) - 1)
    return DEFINITION["conv2d_wgrad"](x[:n], dy[:n], **params)


# Winograd convolution, each with the bound that the right one declares


def _like(problem):
    """The fields of the Winograd kernel of `problem` that say how it is judged."""
    real = next(k for k in registry.kernels(problem, "cpu") if k.name.endswith("_winograd") and "float32" in k.dtypes)
    return dict(supports=real.supports, error_scale=real.error_scale, error_factor=real.error_factor, exact=False)


def _winograd(x, w, padding, *, left=F4.input, right=F4.input, taps=F4.filter, outputs=F4.output):
    """F(4x4, 3x3) in plain NumPy, B' x B with two matrices that should be the same."""
    left, right, taps, outputs = (np.array(m, x.dtype) for m in (left, right, taps, outputs))
    p, q = (n + 2 * a - 2 for n, a in zip(x.shape[2:], padding, strict=True))
    down, across = F4.tiles_of(p), F4.tiles_of(q)
    far = [(a, 4 * t + 2 - a - n) for a, t, n in zip(padding, (down, across), x.shape[2:], strict=True)]
    padded = np.pad(x, [(0, 0), (0, 0), *((a, max(0, b)) for a, b in far)])[:, :, : 4 * down + 2, : 4 * across + 2]
    patches = np.lib.stride_tricks.sliding_window_view(padded, (6, 6), axis=(2, 3))[:, :, ::4, ::4]
    m = np.einsum("ncijab,kcab->nkijab", left @ patches @ right.T, taps @ w @ taps.T)
    y = (outputs @ m @ outputs.T).swapaxes(3, 4)
    return y.reshape(*y.shape[:2], 4 * down, 4 * across)[:, :, :p, :q]


def test_winograd_in_numpy_is_right():
    """The wrong ones below are wrong for the reason that they are named for."""

    def right(x, w, *, stride, padding, dilation, groups):
        return _winograd(x, w, padding)

    kernel = _kernel(registry.problem("conv2d_fprop"), right, **_like("conv2d_fprop"))
    results = [r for case in _test_cases(kernel.problem) for r in check_case(kernel, case)]
    assert results and all(r.ok for r in results), "\n".join(map(str, results))


@wrong("conv2d_fprop", "wrong value", **_like("conv2d_fprop"))
def winograd_transform_swapped_on_one_side(x, w, *, stride, padding, dilation, groups):
    return _winograd(x, w, padding, right=np.array(F4.input)[[0, 2, 1, 3, 4, 5]])


@wrong("conv2d_fprop", "wrong value", **_like("conv2d_fprop"))
def winograd_filter_of_other_points(x, w, *, stride, padding, dilation, groups):
    return _winograd(x, w, padding, taps=np.array(F4.filter)[[0, 1, 2, 4, 3, 5]])


@wrong("conv2d_fprop", "wrong value", **_like("conv2d_fprop"))
def winograd_outputs_without_infinity(x, w, *, stride, padding, dilation, groups):
    return _winograd(x, w, padding, outputs=np.array(F4.output) * (np.arange(6) < 5))


@wrong("conv2d_fprop", "wrong value", **_like("conv2d_fprop"))
def winograd_border_tile_without_its_last_row(x, w, *, stride, padding, dilation, groups):
    y = _winograd(x, w, padding)
    last = (y.shape[2] - 1) // 4 * 4 + 3 - padding[0]  # a row of x that the last tiles see
    if 0 <= last < x.shape[2]:
        x = x.copy()
        x[:, :, last] = 0
        y[:, :, last // 4 * 4 :] = _winograd(x, w, padding)[:, :, last // 4 * 4 :]
    return y


@wrong("conv2d_fprop", "wrong value", **_like("conv2d_fprop"))
def winograd_of_inputs_rounded_to_tf32(x, w, *, stride, padding, dilation, groups):
    return inputs_rounded_to_tf32(x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)


@wrong("conv2d_dgrad", "wrong value", **_like("conv2d_dgrad"))
def winograd_filter_not_turned_round(dy, w, *, stride, padding, dilation, groups, input_hw):
    rows, columns = (slice(max(0, a - 2), n - max(0, a - 2)) for a, n in zip(padding, dy.shape[2:], strict=True))
    return _winograd(dy[:, :, rows, columns], w.swapaxes(0, 1), [max(0, 2 - a) for a in padding])


@wrong("conv2d_wgrad", "wrong value", **_like("conv2d_wgrad"))
def winograd_last_tile_forgotten(x, dy, *, stride, padding, dilation, groups, kernel_hw):
    dy = dy.copy()
    dy[-1, :, (dy.shape[2] - 1) // 4 * 4 :, (dy.shape[3] - 1) // 4 * 4 :] = 0
    params = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, kernel_hw=kernel_hw)
    return DEFINITION["conv2d_wgrad"](x, dy, **params)


# Batch normalisation


@wrong("batchnorm2d_fprop_train", "wrong value")
def variance_as_difference_of_squares(x, gamma, beta, z, *, eps, relu):
    x = np.ascontiguousarray(x)  # NumPy's sums depend on strides in the last bits
    mean = x.mean((0, 2, 3))
    var = np.maximum((x * x).mean((0, 2, 3)) - mean * mean, 0)
    inv_std = 1 / np.sqrt(var + x.dtype.type(eps))
    return DEFINITION["batchnorm2d_fprop_infer"](x, gamma, beta, mean, inv_std, z, relu=relu), mean, var


@wrong("batchnorm2d_fprop_train", "wrong value")
def unbiased_variance(x, gamma, beta, z, *, eps, relu):
    y, mean, var = DEFINITION["batchnorm2d_fprop_train"](x, gamma, beta, z, eps=eps, relu=relu)
    m = x.size // x.shape[1]
    return y, mean, var * x.dtype.type(m / max(m - 1, 1))


@wrong("batchnorm2d_fprop_train", "shape")
def statistics_not_returned(x, gamma, beta, z, *, eps, relu):
    return DEFINITION["batchnorm2d_fprop_train"](x, gamma, beta, z, eps=eps, relu=relu)[0]


@wrong("batchnorm2d_fprop_infer", "wrong value")
def residual_added_after_relu(x, gamma, beta, mean, inv_std, z, *, relu):
    y = DEFINITION["batchnorm2d_fprop_infer"](x, gamma, beta, mean, inv_std, None, relu=relu)
    return y if z is None else y + z


@wrong("batchnorm2d_bwd", "wrong value")
def gradient_through_the_variance_forgotten(dy, x, y, gamma, beta, mean, inv_std, *, training, relu, residual):
    params = dict(training=training, relu=relu, residual=residual)
    dx, dgamma, dbeta, dz = DEFINITION["batchnorm2d_bwd"](dy, x, y, gamma, beta, mean, inv_std, **params)
    if training:
        m = x.size // x.shape[1]
        x_hat = (x - mean[:, None, None]) * inv_std[:, None, None]
        dx = dx + (gamma * inv_std * dgamma / m)[:, None, None] * x_hat
    return dx, dgamma, dbeta, dz


@wrong("batchnorm2d_bwd", "wrong value")
def relu_mask_forgotten(dy, x, y, gamma, beta, mean, inv_std, *, training, relu, residual):
    params = dict(training=training, relu=relu, residual=residual)
    return DEFINITION["batchnorm2d_bwd"](dy, x, x * 0 + 1, gamma, beta, mean, inv_std, **params)


# Elementwise and pooling


@wrong("relu_fprop", "non-finite lost")
def nan_becomes_zero(x):
    return np.where(x > 0, x, x.dtype.type(0))


@wrong("relu_bwd", "wrong value")
def gradient_passes_at_zero(dy, y):
    return np.where(y >= 0, dy, dy.dtype.type(0))


@wrong("maxpool2d_fprop", "wrong value")
def last_of_equal_maxima(x, *, kernel, stride, padding, dilation, ceil_mode):
    params = dict(kernel=kernel, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode)
    y = DEFINITION["maxpool2d_fprop"](x, **params)[0]
    nudged = x + np.arange(x.shape[2] * x.shape[3]).reshape(x.shape[2:]).astype(x.dtype) / 1024
    return y, DEFINITION["maxpool2d_fprop"](nudged, **params)[1]


@wrong("maxpool2d_fprop", "non-finite lost")
def nan_never_greater(x, *, kernel, stride, padding, dilation, ceil_mode):
    params = dict(kernel=kernel, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode)
    return DEFINITION["maxpool2d_fprop"](np.where(np.isnan(x), x.dtype.type(-np.inf), x), **params)


@wrong("avgpool2d_fprop", "wrong value")
def padding_never_counted(x, *, kernel, stride, padding, ceil_mode, count_include_pad):
    params = dict(kernel=kernel, stride=stride, padding=padding, ceil_mode=ceil_mode, count_include_pad=False)
    return DEFINITION["avgpool2d_fprop"](x, **params)


# The head of a network, and the optimizer


@wrong("linear_fprop", "wrong value")
def bias_forgotten(x, w, b):
    return DEFINITION["linear_fprop"](x, w, None)


@wrong("linear_wgrad", "shape")
def transposed(x, dy):
    return DEFINITION["linear_wgrad"](dy, x)


@wrong("softmax_cross_entropy_fprop", "wrong value")
def maximum_not_subtracted(logits, target):
    exponentials = np.exp(logits)
    log_probs = np.log(exponentials / exponentials.sum(1, keepdims=True))
    return -log_probs[np.arange(len(target)), target], log_probs


@wrong("softmax_cross_entropy_bwd", "wrong value")
def one_hot_forgotten(dloss, log_probs, target):
    return dloss[:, None] * np.exp(log_probs)


@wrong("sgd_step", "input changed")
def weight_decay_added_to_the_gradient(lr, found, *tensors, momentum, dampening, weight_decay, nesterov, first):
    step = dict(momentum=momentum, dampening=dampening, nesterov=nesterov, first=first)
    DEFINITION["sgd_step"](lr, found, *tensors, weight_decay=weight_decay, **step)
    g = tensors[len(tensors) // (3 if momentum else 2)]
    memory = g if g.base is None else g.base
    memory += 1


@wrong("sgd_step", "wrong value")
def result_returned_and_not_written(lr, found, *tensors, momentum, dampening, weight_decay, nesterov, first):
    return [t - lr[0] for t in tensors]


@wrong("sgd_step", "wrong value")
def dampened_from_the_first_step(lr, found, *tensors, momentum, dampening, weight_decay, nesterov, first):
    step = dict(momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    DEFINITION["sgd_step"](lr, found, *tensors, **step, dampening=dampening or 0.5, first=False)


@wrong("sgd_step", "wrong value")
def a_step_in_spite_of_what_was_found(lr, found, *tensors, momentum, dampening, weight_decay, nesterov, first):
    step = dict(momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, first=first)
    DEFINITION["sgd_step"](lr, None, *tensors, **step)


@wrong("sgd_step", "wrong value")
def the_first_tensor_left_out(lr, found, *tensors, momentum, dampening, weight_decay, nesterov, first):
    step = dict(momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, first=first)
    some = [t for i, t in enumerate(tensors) if i % (len(tensors) // (3 if momentum else 2))]
    DEFINITION["sgd_step"](lr, found, *some, **step)


@wrong("unscale", "wrong value")
def only_nan_found(inverse_scale, found, *gradients):
    for g in gradients:
        found[0] = 1 if np.isnan(g).any() else found[0]
        g *= inverse_scale[0]


@wrong("adamw_step", "wrong value")
def bias_correction_forgotten(factors, found, *tensors, beta1, beta2, eps, penalty, amsgrad):
    settings = dict(beta1=beta1, beta2=beta2, eps=eps, penalty=penalty, amsgrad=amsgrad)
    DEFINITION["adamw_step"](factors * [1, 0, 1] + [0, 1, 0], found, *tensors, **settings)


@wrong("augment", "wrong value")
def mirrored_before_the_crop(images, rows, places, scale, shift, border, *, padding, dtype):
    window = dict(padding=padding, dtype=dtype)
    places = places.copy()
    places[:, 1] = np.where(places[:, 2], 2 * padding - places[:, 1], places[:, 1])
    return DEFINITION["augment"](images, rows, places, scale, shift, border, **window)


@wrong("cast", "wrong value")
def cut_off_and_not_rounded(x, *, dtype):
    eps = float(ml_dtypes.finfo(dtype).eps)
    return (x * (1 - eps / 2)).astype(dtype) if np.dtype(dtype).itemsize < x.dtype.itemsize else x.astype(dtype)


@pytest.mark.parametrize("kernel, failure", WRONG)
def test_wrong_kernel_is_rejected_by_name(kernel, failure):
    results = [r for case in _test_cases(kernel.problem) for r in check_case(kernel, case)]
    assert {r.failure for r in results} - {""} == {failure}, "\n".join(map(str, results))


@pytest.mark.parametrize("problem", [p for p in registry.problems() if not p.writes], ids=lambda p: p.name)
def test_bound_is_sharp(problem):
    """The definition, one element off by 24 units of rounding, is right; off by 40 units it is wrong."""
    case = _test_cases(problem)[-1]
    assert {r.failure for r in check_case(_kernel(problem, _nudged(problem, 24)), case)} == {""}
    assert {r.failure for r in check_case(_kernel(problem, _nudged(problem, 40)), case)} == {"wrong value"}


def _nudged(problem, units):
    def nudged(*arrays, **params):
        of_arrays = (a.dtype for a in arrays if a is not None and a.dtype.kind == "f")
        dtype = np.dtype(params.get("dtype") or next(of_arrays, None))  # None: no floats, so it does not matter
        doubles = [a if a is None or a.dtype.kind != "f" else a.astype(np.float64) for a in arrays]
        outputs, scales = problem.reference(*doubles, **params), problem.error_scale(*doubles, **params)
        if not isinstance(outputs, tuple):
            return one(outputs, scales, dtype)
        return tuple(one(y, scale, dtype) for y, scale in zip(outputs, scales, strict=True))

    def one(y, scale, dtype):
        if y is None or y.dtype.kind != "f":
            return y if y is None or units < 32 else y + y.dtype.type(1)
        scale = np.broadcast_to(scale, y.shape)
        at = np.unravel_index(np.argmax(scale), y.shape)
        y[at] += units * np.finfo(dtype).eps * scale[at]
        y = y.astype(dtype)
        if units > 32 and not scale[at]:  # exact: the least that it can be off
            y[at] = np.nextafter(y[at], np.inf)
        return y

    nudged.__signature__ = inspect.signature(problem.reference)
    return nudged
