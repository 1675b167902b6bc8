"""PyTorch's own samples of its operators (its OpInfo database): minires gives the same values and gradients.

Every sample of every op below is run, at float64. Those that minires does not take are listed in UNSUPPORTED with the
reason, and must raise an error that says so: a sample is never left out in silence.
"""

import warnings

import numpy as np
import pytest

from minires import Tensor, ops

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
pytest.importorskip("expecttest")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

NAMES = {  # OpInfo's (name, variant): ours
    ("nn.functional.conv2d", ""): ops.conv2d,
    ("nn.functional.batch_norm", ""): ops.batch_norm,
    ("nn.functional.relu", ""): ops.relu,
    ("nn.functional.linear", ""): ops.linear,
    ("nn.functional.cross_entropy", ""): ops.cross_entropy,
    ("nn.functional.nll_loss", ""): ops.nll_loss,
    ("nn.functional.mse_loss", ""): ops.mse_loss,
    ("nn.functional.max_pool2d", ""): ops.max_pool2d,
    ("nn.functional.avg_pool2d", ""): ops.avg_pool2d,
    ("nn.functional.adaptive_avg_pool2d", ""): ops.adaptive_avg_pool2d,
    ("nn.functional.pad", "constant"): ops.pad,
    ("log_softmax", ""): ops.log_softmax,
    ("log_softmax", "with_dtype"): ops.log_softmax,
    ("softmax", ""): ops.softmax,
    ("softmax", "with_dtype"): ops.softmax,
    ("matmul", ""): ops.matmul,
    ("add", ""): ops.add,
    ("sub", ""): ops.sub,
    ("mul", ""): ops.mul,
    ("div", "no_rounding_mode"): ops.div,
    ("pow", ""): ops.pow,
    ("abs", ""): ops.abs,
    ("exp", ""): ops.exp,
    ("log", ""): ops.log,
    ("sqrt", ""): ops.sqrt,
    ("tanh", ""): ops.tanh,
    ("sigmoid", ""): ops.sigmoid,
    ("sum", ""): ops.sum,
    ("mean", ""): ops.mean,
    ("var", ""): ops.var,
    ("std", ""): ops.std,
    ("norm", ""): ops.norm,
    ("norm", "fro"): ops.norm,
    ("amax", ""): ops.amax,
    ("amin", ""): ops.amin,
    ("argmax", ""): ops.argmax,
    ("max", "reduction_no_dim"): ops.max,
    ("max", "reduction_with_dim"): ops.max,
    ("maximum", ""): ops.maximum,
    ("minimum", ""): ops.minimum,
    ("clamp", ""): ops.clamp,
    ("topk", ""): ops.topk,
    ("cat", ""): ops.cat,
    ("stack", ""): ops.stack,
    ("reshape", ""): ops.reshape,
    ("flatten", ""): ops.flatten,
    ("permute", ""): ops.permute,
    ("transpose", ""): ops.transpose,
    ("squeeze", ""): ops.squeeze,
    ("unsqueeze", ""): ops.unsqueeze,
    ("expand", ""): ops.expand,
    ("__getitem__", ""): ops.getitem,
}
LEAST = {"nn.functional.conv2d": 30, "nn.functional.max_pool2d": 60, "nn.functional.cross_entropy": 20, "matmul": 15}


def _axis_of_a_number(x, *args, **kwargs):
    return x.ndim == 0 and (bool(args) or kwargs.get("dim", ()) != ())


# Which samples minires does not take, and why.
NO_AXIS = [(_axis_of_a_number, "PyTorch lets one name axis 0 of a single number; here it has none, as in NumPy")]
CORRECTION = (
    lambda *_, **kwargs: kwargs.get("correction", 1) is None,
    "`correction=None` says nothing",
)
UNSUPPORTED = {
    **dict.fromkeys(["sum", "mean", "amax", "amin", "max", "topk", "transpose", "squeeze"], NO_AXIS),
    "var": [CORRECTION],
    "std": [CORRECTION],
    "norm": [
        (lambda x, p=2, dim=None, *_, **__: isinstance(p, (int, float)) and p < 1, "not a norm: p must be at least 1"),
        (lambda x, p=2, dim=None, *_, **__: x.ndim == 0 and dim is not None, NO_AXIS[0][1]),
    ],
    "nn.functional.pad": [(lambda x, pad, *_: min(pad) < 0, "negative padding crops; that is what slices are for")],
}
INFOS = {(info.name, info.variant_test_name): info for info in op_db}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: "-".join(filter(None, name)))
def test_samples_agree(name):
    info, ours = INFOS[name], NAMES[name]
    samples = list(info.sample_inputs("cpu", torch.float64, requires_grad=True))
    if name[0] == "nn.functional.max_pool2d":  # 1,440: every combination of parameters; we have no return_indices
        samples = [s for s in samples if not s.kwargs.pop("return_indices", False)][::12]
    assert len(samples) >= LEAST.get(name[0], 1)
    wrong = []
    for number, sample in enumerate(samples):
        arguments = (sample.input, *sample.args)
        reason = next((why for takes, why in UNSUPPORTED.get(name[0], []) if takes(*arguments, **sample.kwargs)), None)
        try:
            if reason is None:
                _compare(info.op, ours, arguments, sample.kwargs, np.random.default_rng(number))
            else:
                with pytest.raises((ValueError, TypeError, NotImplementedError)):
                    ours(*_ours(arguments, []), **_ours(sample.kwargs, []))
        except (Exception, pytest.fail.Exception) as error:
            shown = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in arguments]
            wrong.append(f"{number}: {shown} {list(sample.kwargs.items())}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def _compare(op, ours, arguments, kwargs, rng):
    theirs, tensors = [], []
    theirs_arguments, theirs_kwargs = _theirs(arguments, theirs), _theirs(kwargs, theirs)
    our_arguments, our_kwargs = _ours(arguments, tensors), _ours(kwargs, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = op(*theirs_arguments, **theirs_kwargs)
    got = ours(*our_arguments, **our_kwargs)
    values = want if isinstance(want, torch.Tensor) else want[0]
    result = got if isinstance(got, Tensor) else got[0]
    _close(result.array, values, "the value")
    assert result.array.dtype.name == str(values.dtype).removeprefix("torch.")
    if not isinstance(want, torch.Tensor):
        np.testing.assert_array_equal(got[1].array, want[1].numpy())
    for tensor, their in zip(tensors, theirs, strict=True):
        _close(tensor.array, their, "an argument after the call (running statistics)")
    assert result.requires_grad == values.requires_grad
    if values.requires_grad:
        dy = rng.standard_normal(tuple(values.shape))
        result.backward(Tensor(np.asarray(dy)))
        values.backward(torch.tensor(dy))
        for i, (tensor, their) in enumerate(zip(tensors, theirs, strict=True)):
            if their.requires_grad:
                grad = torch.zeros_like(their) if their.grad is None else their.grad
                _close(
                    np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.array,
                    grad,
                    f"gradient of tensor {i}",
                )


def _close(got, want, what):
    want = want.detach().numpy()
    assert got.shape == want.shape, f"{what} has shape {got.shape}, not {want.shape}"
    size = np.abs(want[np.isfinite(want)]).max(initial=1)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-13 * size, err_msg=what)


def _ours(value, tensors):
    """A sample's argument for minires; the tensors in it are also appended to `tensors`, in order."""
    if isinstance(value, torch.Tensor):
        floating = value.dtype.is_floating_point
        tensors.append(Tensor(value.detach().numpy().copy(), requires_grad=floating and value.requires_grad))
        return tensors[-1]
    if isinstance(value, dict):
        return {key: _ours(v, tensors) for key, v in value.items()}
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (list, tuple)):
        parts = [_ours(v, tensors) for v in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def _theirs(value, tensors):
    """The same for torch: fresh leaves."""
    if isinstance(value, torch.Tensor):
        tensors.append(value.detach().clone().requires_grad_(value.requires_grad))
        return tensors[-1]
    if isinstance(value, dict):
        return {key: _theirs(v, tensors) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_theirs(v, tensors) for v in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value
