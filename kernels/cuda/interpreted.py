"""Runs launches on the CPU: the kernel's PTX in `kernels/interpreter`, on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from .launch import Launch, by_value, is_array


def run(launch: Launch, **how: Any) -> Any:
    """Interpret `launch`; its arrays are written when this returns. how: `interpreter.interpret`'s keywords, such as
    seed. Raises interpreter.Fault where the kernel does what it must not."""
    from ..interpreter import interpret

    args = [a if is_array(a) else _bytes(a) for a in launch.args]
    text, entry = launch.function.ptx(), launch.function.entry
    return interpret(text, entry, launch.grid, launch.block, args, launch.shared, **how)


def _bytes(arg: Any) -> bytes:
    return np.asarray(by_value(arg)).tobytes()
