"""True averages in batch normalisation, in place of moving ones.

A running statistic mixes those of many batches, each of them from other weights: after a step that was large, or with
averaged weights, it fits none. With the final weights and n batches of training images

    running mean = (1/n) sum of the batches' means        running variance = (1/n) sum of their unbiased variances

Source: He et al.'s released networks ("BN parameters are computed by average, not moving average, on a sufficiently
large training batch after the training procedure", KaimingHe/deep-residual-networks).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..engine import Tensor
from ..nn import BatchNorm1d, BatchNorm2d, Module
from ..state import no_grad


@no_grad()
def recalibrate(model: Module, batches: Iterable[Any]) -> int:
    """Replace the running statistics of the model's BatchNorms by the true averages over `batches`; returns how many.

    batches: of training images, each a Tensor or a tuple that begins with one, all as large as in training. The rest
    of the model runs in evaluation mode: the statistics are of what will be met there (without dropout). A BatchNorm
    that was frozen, in evaluation mode within a model in training mode, keeps its statistics. Modes and momenta are put
    back, and, where a batch raises, the statistics too. ValueError where there are no batches.
    """
    norms = [m for m in model.modules() if isinstance(m, (BatchNorm1d, BatchNorm2d)) and m.running_mean is not None]
    norms = [m for m in norms if m.training or not model.training]
    momenta = [m.momentum for m in norms]
    modes = [(m, m.training) for m in model.modules()]
    before = [(buffer, buffer.array.copy()) for m in norms for buffer in m.buffers()]
    count = 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches since
            norm.train()
        for batch in batches:
            model(batch if isinstance(batch, Tensor) else batch[0])
            count += 1
        if count == 0:
            raise ValueError("recalibrate: there are no batches; give it at least one of training images")
    except BaseException:
        for buffer, array in before:
            buffer.copy_(array)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode  # its own alone: train() would reach below
    return count
