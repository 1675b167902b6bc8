"""Weights of other frameworks: PyTorch's files read and written without PyTorch, and its names mapped onto ours.

report = minires.interop.load_weights(model, "resnet18-f37072fd.pth")
"""

from ..serialization import CheckpointError
from .load import load
from .names import find_state_dict, our_names
from .torch_writer import write_torch_checkpoint
from .weights import LoadReport, load_weights, read_weights

__all__ = [
    "CheckpointError",
    "LoadReport",
    "find_state_dict",
    "load",
    "load_weights",
    "our_names",
    "read_weights",
    "write_torch_checkpoint",
]
