"""Unscaling in plain NumPy: the definition."""

from ..registry import kernel
from .problem import UNSCALE, unscale_reference

kernel(UNSCALE, device="cpu", step=0, note="the definition", dtypes=("any",))(unscale_reference)
