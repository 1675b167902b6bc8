"""Elementwise kernels in plain NumPy: the definitions. NumPy keeps the memory layout of the inputs."""

from ..registry import kernel
from ..widened import widened
from .problem import (
    ACCUMULATE,
    ADD_FPROP,
    CAST,
    RELU_BWD,
    RELU_FPROP,
    accumulate_reference,
    add_fprop_reference,
    cast_reference,
    relu_bwd_reference,
    relu_fprop_reference,
)

kernel(RELU_FPROP, device="cpu", step=0, note="the definition", dtypes=("any",))(relu_fprop_reference)
kernel(RELU_BWD, device="cpu", step=0, note="the definition", dtypes=("any",))(relu_bwd_reference)
kernel(ADD_FPROP, device="cpu", step=0, note="the definition", dtypes=("any",))(add_fprop_reference)
kernel(ACCUMULATE, device="cpu", step=0, note="the definition", dtypes=("any",))(accumulate_reference)
kernel(CAST, device="cpu", step=0, note="the definition", dtypes=("any",))(cast_reference)

widened(RELU_FPROP)
widened(RELU_BWD)
widened(ADD_FPROP)
