"""Batch normalisation in plain NumPy: the definitions."""

from ..registry import kernel
from ..widened import widened
from .problem import (
    BATCHNORM2D_BWD,
    BATCHNORM2D_FPROP_INFER,
    BATCHNORM2D_FPROP_TRAIN,
    bwd_reference,
    fprop_infer_reference,
    fprop_train_reference,
)

kernel(BATCHNORM2D_FPROP_TRAIN, device="cpu", step=0, note="the definition, variance in two passes", dtypes=("any",))(
    fprop_train_reference
)
kernel(BATCHNORM2D_FPROP_INFER, device="cpu", step=0, note="the definition", dtypes=("any",))(fprop_infer_reference)
kernel(BATCHNORM2D_BWD, device="cpu", step=0, note="the definition: two sums, then dx", dtypes=("any",))(bwd_reference)

widened(BATCHNORM2D_FPROP_TRAIN, like=(0, 1, 1))  # mean and var as gamma
widened(BATCHNORM2D_FPROP_INFER)
widened(BATCHNORM2D_BWD, like=(0, 3, 3, 0))
