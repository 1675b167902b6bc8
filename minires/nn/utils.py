"""What is done to all parameters at once: clipping of gradients, and one long vector of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..device import is_cuda_array, namespace_of
from ..engine import Tensor


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale all gradients by one factor, so that the norm of them all, as one vector, is at most max_norm.

    norm_type: p of the p-norm, or inf. Returns the norm before, a Tensor without axes. The factor is
    max_norm / (norm + 1e-6), as in PyTorch. Raises RuntimeError for a norm of NaN or inf with error_if_nonfinite.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type={norm_type} must be above 0, or inf")
    owners = [p for p in _listed(parameters) if p.grad is not None]
    grads: list[Any] = [p.grad.array for p in owners if p.grad is not None]
    if not grads:
        return Tensor(namespace_of().zeros(()))
    xp = namespace_of(*grads)
    if is_cuda_array(grads[0]) and not error_if_nonfinite:
        return Tensor(_clipped_on_device(owners, grads, max_norm, norm_type))
    if norm_type == math.inf:
        norm = max((float(abs(g).max()) for g in grads if g.size), default=0.0)
    else:
        norm = sum(float((abs(g) ** norm_type).sum()) for g in grads) ** (1 / norm_type)
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(f"the norm of the gradients is {norm}; they cannot be clipped")
    scale = max_norm / (norm + 1e-6)
    if not scale >= 1:  # NaN too: it must be seen in the parameters
        for p, g in zip(owners, grads, strict=True):
            p.grad = Tensor(g * scale)
    return Tensor(xp.asarray(norm, grads[0].dtype))


def _clipped_on_device(owners: list[Tensor], grads: list[Any], max_norm: float, norm_type: float) -> Any:
    """The same without a look at a number: nothing waits for the GPU, and a CUDA graph can hold it."""
    xp = namespace_of(*grads)
    total = xp.zeros((), "float64")
    for g in grads:
        if norm_type == math.inf and g.size:
            total = xp.maximum(total, abs(g).max())
        elif norm_type != math.inf:
            total += (abs(g) ** norm_type).sum()
    norm = total if norm_type == math.inf else total ** (1 / norm_type)
    if max_norm != math.inf:
        scale = max_norm / (norm + 1e-6)
        scale = xp.where(scale >= 1, 1.0, scale)
        for p, g in zip(owners, grads, strict=True):
            p.grad = Tensor(g * scale.astype(g.dtype))
    return norm.astype(grads[0].dtype)


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """Clip every element of the gradients to [-clip_value, clip_value]."""
    for p in _listed(parameters):
        if p.grad is not None:
            p.grad = Tensor(p.grad.array.clip(-float(clip_value), float(clip_value)))


def parameters_to_vector(parameters: Iterable[Tensor]) -> Tensor:
    """The values of all parameters, each in C order, as one detached vector."""
    arrays = [p.array.reshape(-1) for p in parameters]
    return Tensor(namespace_of(*arrays).concatenate(arrays))


def vector_to_parameters(vec: Tensor, parameters: Iterable[Tensor]) -> None:
    """Write a vector of `parameters_to_vector` back. ValueError where its length is another one."""
    listed = list(parameters)
    total = sum(p.array.size for p in listed)
    if vec.shape != (total,):
        raise ValueError(f"the vector has shape {vec.shape}, the parameters have {total} elements")
    start = 0
    for p in listed:
        p.data = vec.array[start : start + p.array.size].reshape(p.shape)
        start += p.array.size


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)
