"""An exponential moving average of the weights: often a better network than the last step's, at no extra step.

    average <- d * average + (1 - d) * weights          d = min(decay, (1 + t) / (10 + t)) with warm-up, else decay

t counts the updates, so that early on, when the weights move fast, the average forgets fast. Buffers (the running
statistics of batch normalisation) are copied: they are moving averages already.

Source: Polyak & Juditsky 1992 (SIAM J. Control Optim. 30); Tarvainen & Valpola 2017 (arXiv:1703.01780), eq. 1; the
warm-up is TensorFlow's `ExponentialMovingAverage(num_updates=...)`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..device import to_device
from ..engine import Tensor
from ..nn import Module

_COUNT = "ema_updates"  # its key in the state dict; no module has a parameter of that name


class EMA:
    """The moving average of a model's parameters, and a copy of its buffers.

    model: complete, and on its device. decay: from 0 to below 1; 1 / (1 - decay) is about how many steps are averaged.
    warmup: see above. updates: how many there were. Raises ValueError for a decay that cannot be.
    """

    def __init__(self, model: Module, decay: float = 0.999, warmup: bool = True):
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay={decay} must be from 0 to below 1")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self._learned = dict(model.named_parameters())
        self._tensors = {**self._learned, **dict(model.named_buffers())}
        self._averages = {name: tensor.array.copy(order="K") for name, tensor in self._tensors.items()}
        self._applied = False

    def update(self) -> None:
        """Take in the weights after a step."""
        self._not_applied("update()")
        d = self.decay if not self.warmup else min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, tensor in self._tensors.items():
            average = self._averages[name]
            if name in self._learned:
                change = tensor.array - average
                change *= 1 - d
                average += change
            else:
                average[...] = tensor.array
        self.updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model has the averaged weights; afterwards, whatever happens, its own.

        What is written into the model within it (`recalibrate`: buffers) is written into the average.
        """
        self._not_applied("a second applied()")
        self._swap()
        self._applied = True
        try:
            yield
        finally:
            self._applied = False
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the model's names, and the count of updates; later updates change them."""
        self._not_applied("state_dict()")
        return {**{name: Tensor(a) for name, a in self._averages.items()}, _COUNT: Tensor(np.array(self.updates))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, bit for bit. ValueError names what does not fit."""
        self._not_applied("load_state_dict()")
        arrays = {name: v.array if isinstance(v, Tensor) else np.asarray(v) for name, v in state.items()}
        if odd := sorted(arrays.keys() ^ {*self._averages, _COUNT}):
            raise ValueError(f"EMA: the state of another model: {odd[0]!r} is in only one of them")
        for name, average in self._averages.items():
            if arrays[name].shape != average.shape:
                shapes = f"{arrays[name].shape} in the state, {average.shape} in the model"
                raise ValueError(f"EMA: the state of another model: {name!r} has shape {shapes}")
        for name, average in self._averages.items():
            average[...] = to_device(arrays[name], self._tensors[name].device)
        self.updates = int(arrays[_COUNT])

    def _swap(self) -> None:
        for name, tensor in self._tensors.items():
            kept = tensor.array.copy(order="K")
            tensor.data = self._averages[name]
            self._averages[name][...] = kept

    def _not_applied(self, what: str) -> None:
        if self._applied:
            raise RuntimeError(f"EMA: {what} within applied() would mix up the averages and the weights")
