"""Inference with fewer passes over memory: batch normalisation becomes a part of the convolution before it.

In evaluation batch normalisation is a fixed line per channel, and a convolution is linear in its weights, so

    gamma * (conv(x; w, b) - mean) * inv_std + beta = conv(x; scale * w, (b - mean) * scale + beta)

with scale = gamma * inv_std per output channel. The addition of the skip and the ReLU follow while the output is in
the cache (`ops.conv_bias_act`).

No graph is searched: a module names its pairs in `conv_bn`, as the blocks of our ResNets do, and neighbours in a
Sequential are pairs by themselves. In the copy the convolution's place holds an Identity, and that of its batch
normalisation a `FoldedConv2d`, which takes the same arguments: a forward that says `self.bn1(self.conv1(x), relu=True)`
runs as it is.

Source: Jacob et al. 2018 (arXiv:1712.05877), section 3.2.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..device import CPU, to_device
from ..dispatch import constant
from ..engine import Tensor, state
from ..ops.fused import conv_bias_act
from .batch_norm import BatchNorm2d
from .containers import Sequential
from .conv import Conv2d
from .module import Module, Parameter
from .shape import Identity


class FoldedConv2d(Conv2d):
    """A convolution that a batch normalisation was folded into; the arguments of forward are those of BatchNorm2d."""

    def __init__(self, conv: Conv2d, bn: BatchNorm2d):
        Module.__init__(self)
        for name in ("in_channels", "out_channels", "groups", "kernel_size", "stride", "dilation", "padding"):
            setattr(self, name, getattr(conv, name))
        self.padding_mode = conv.padding_mode
        w, b = _folded(conv, bn)
        device, dtype = conv.weight.device, conv.weight.dtype
        self.weight, self.bias = (Parameter(to_device(a.astype(dtype), device)) for a in (w, b))

    def forward(self, x: Tensor, add: Tensor | None = None, relu: bool = False) -> Tensor:
        """conv(x); with `add` conv(x) + add; with `relu` max(. , 0) of it."""
        assert self.bias is not None
        geometry = self.stride, self.padding, self.dilation, self.groups
        if state.grad_enabled:
            return conv_bias_act(x, self.weight, self.bias, add, *geometry, relu=relu)
        with constant(self.weight.array, self.weight.version), constant(self.bias.array, self.bias.version):
            return conv_bias_act(x, self.weight, self.bias, add, *geometry, relu=relu)


def fuse_for_inference(model: Module) -> Module:
    """A copy of `model` in evaluation mode whose batch normalisations are folded into the convolutions before them.

    It computes the same up to rounding, faster and with less memory. What stays as it is: a batch normalisation that no
    convolution comes before (the first of a pre-activation block, and the last of such a network), that has no running
    statistics, or whose convolution other modules share. Hooks are not copied. The copy's state dict has its own names
    and does not fit the model; train and save the model, and fuse what you infer with. Under `no_grad` kernels keep
    what they made of its weights until a Tensor's method, an optimizer or `load_state_dict` writes into them; a write
    by NumPy into `.array` they do not see.

    A module of yours names its pairs in the class attribute `conv_bn = (("conv1", "bn1"), ...)`: the output of conv1
    must go to bn1 and nowhere else.
    """
    fused = copy.deepcopy(model)
    uses: dict[int, int] = {}
    for module in fused.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks):
            hooks.clear()
        for child in module._modules.values():
            uses[id(child)] = uses.get(id(child), 0) + 1
    for module in list(fused.modules()):
        for conv_name, bn_name in _pairs(module):
            conv, bn = module._modules.get(conv_name), module._modules.get(bn_name)
            if not (isinstance(conv, Conv2d) and isinstance(bn, BatchNorm2d)) or bn.running_mean is None:
                continue
            if uses[id(conv)] == uses[id(bn)] == 1:
                setattr(module, conv_name, Identity())
                setattr(module, bn_name, FoldedConv2d(conv, bn))
    return fused.eval()


def _pairs(module: Module) -> Iterator[tuple[str, str]]:
    """Names of children of which the second takes what the first gives, and nothing else does."""
    yield from getattr(module, "conv_bn", ())
    if isinstance(module, Sequential):
        names = list(module._modules)
        yield from itertools.pairwise(names)


def _folded(conv: Conv2d, bn: BatchNorm2d) -> tuple[Any, Any]:
    """Weight and bias in float64."""
    w, mean, var = (_wide(t, 0) for t in (conv.weight, bn.running_mean, bn.running_var))
    scale = _wide(bn.weight, 1) / np.sqrt(var + bn.eps)
    return w * scale[:, None, None, None], _wide(bn.bias, 0) + (_wide(conv.bias, 0) - mean) * scale


def _wide(t: Tensor | None, absent: float) -> Any:
    """The values in float64; what stands for them where there are none."""
    return absent if t is None else to_device(t.array, CPU).astype(np.float64)
