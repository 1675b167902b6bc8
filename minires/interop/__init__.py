"""Weights of other frameworks: PyTorch's files read and written without PyTorch, and its names mapped onto ours.

report = minires.interop.load_weights(model, "resnet18-f37072fd.pth")
"""

from ..serialization import CheckpointError
from .load import load
from .names import find_state_dict
from .weights import LoadReport, load_weights, read_weights

__all__ = ["CheckpointError", "LoadReport", "find_state_dict", "load", "load_weights", "read_weights"]
