"""Penalties on the weights, added to their gradients before each step.

    L1      l1 * sum |w|                            gradient  l1 * sign(w)
    L2-SP   l2_sp / 2 * sum (w - start)^2           gradient  l2_sp * (w - start)

L2-SP holds weights near where they started, the pretrained ones, so that what they know is not unlearned; a plain L2
penalty (the optimizer's weight_decay), which pulls to zero, is left for what has no start: a new head. Losses that a
run reports are without penalties.

Source: Tibshirani 1996 (lasso); Li, Grandvalet & Davoine 2018 (arXiv:1802.01483), eq. 3 (L2-SP).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..device import namespace_of, to_device
from ..engine import Tensor
from ..nn import Module


class Penalty:
    """L1 of all parameters that are trained, L2-SP of those that `start` has by name.

    model: on its device. decay_norm: L1 on vectors (biases, batch normalisation) too. start: Tensors or arrays.
    """

    def __init__(self, model: Module, start: Mapping[str, Any], l1: float = 0.0, l2_sp: float = 0.0, decay_norm=True):
        self.l1, self.l2_sp = l1, l2_sp
        named = dict(model.named_parameters())
        self._sparse = [p for p in named.values() if l1 and (decay_norm or p.ndim > 1)]
        self._pulled = []
        for name, p in named.items():
            if l2_sp and name in start:
                value = start[name].array if isinstance(start[name], Tensor) else start[name]
                self._pulled.append((p, to_device(value, p.device)))

    def add_gradients(self) -> None:
        """Add the penalties' gradients to those of the loss, where there are any: frozen weights have none."""
        for p in self._sparse:
            if p.grad is not None:
                p.grad = Tensor(p.grad.array + self.l1 * namespace_of(p.array).sign(p.array))
        for p, start in self._pulled:
            if p.grad is not None:
                p.grad = Tensor(p.grad.array + self.l2_sp * (p.array - start))
