"""The one source of random numbers: weights, dropout, shuffling and `randn` draw from it unless they are given another.

It is a NumPy generator on the CPU, whatever the device, so that a seed means the same numbers everywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

default_generator = np.random.default_rng()  # seeded by the operating system until manual_seed


def manual_seed(seed: int) -> np.random.Generator:
    """Start the default generator anew from `seed`, an integer from 0; returns the generator."""
    default_generator.bit_generator.state = np.random.default_rng(seed).bit_generator.state
    return default_generator


def get_rng_state() -> dict[str, Any]:
    """The state of the default generator, for `set_rng_state`; a dict of numbers and strings that JSON can hold."""
    return dict(default_generator.bit_generator.state)


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the default generator back into a state that `get_rng_state` returned."""
    default_generator.bit_generator.state = state
