"""A PTX interpreter: runs CUDA kernels on a machine without a GPU, slowly, and watches every access. See README.md."""

from .faults import KINDS, Fault
from .launch import Report, interpret, prepare, run
from .ptx import parse
from .step import Moment, record, show
from .tensor_map import TensorMap

__all__ = [
    "KINDS",
    "Fault",
    "Moment",
    "Report",
    "TensorMap",
    "interpret",
    "parse",
    "prepare",
    "record",
    "run",
    "show",
]
