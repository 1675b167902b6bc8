"""A PTX interpreter: runs CUDA kernels on a machine without a GPU, slowly, and watches every access. See README.md."""

from .faults import KINDS, Fault
from .launch import Report, interpret, prepare, run
from .ptx import parse

__all__ = ["KINDS", "Fault", "Report", "interpret", "parse", "prepare", "run"]
