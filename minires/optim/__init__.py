"""Optimizers and learning-rate schedules, with PyTorch's names."""

from . import lr_scheduler
from .adamw import Adam, AdamW
from .lars import LARS
from .optimizer import Optimizer
from .sgd import SGD

__all__ = ["LARS", "SGD", "Adam", "AdamW", "Optimizer", "lr_scheduler"]
