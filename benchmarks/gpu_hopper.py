"""Primitives of Hopper for `gpu_primitives`: tiles by TMA, products by wgmma, phases of mbarriers (`gpu_hopper.cu`).

They are launched as our kernels are: NumPy arrays run in the interpreter, CuPy's on the GPU. What step 7 of the
convolutions relies on is asked piece by piece: where a swizzled tile lies in shared memory and what it has outside the
tensor, which numbers a matrix descriptor means, and when a phase of an mbarrier is over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from minires.kernels.cuda.launch import (  # pyright: ignore[reportMissingImports]
    STORED_AS,
    Function,
    Launch,
    launch,
)
from minires.kernels.cuda.tensor_map import TensorMap  # pyright: ignore[reportMissingImports]
from minires.kernels.memory import empty  # pyright: ignore[reportMissingImports]

_SOURCE = Path(__file__).with_name("gpu_hopper.cu")
_CORNER = np.dtype([("axes", np.int32), ("c", np.int32, 4)])  # struct Corner
_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# Bytes of a row, and bits of a matrix descriptor: leading and stride offset in units of 16 bytes, the swizzle's mode.
_LAYOUTS = {"128B": (128, 1 << 16 | 64 << 32 | 1 << 62), "64B": (64, 1 << 16 | 32 << 32 | 2 << 62)}
_LAYOUTS |= {"32B": (32, 1 << 16 | 16 << 32 | 3 << 62)}
_TURNS = 7


def _function(entry: str, *options: str) -> Any:
    return Function.unlisted(_SOURCE, entry, options, archs=("sm_90a",), alignment=16)


@dataclass(frozen=True)
class Tile:
    """A box of a tensor of 16-bit numbers, none of which is 0. at: its corner. All with coordinate 0 first."""

    sizes: tuple[int, ...]
    box: tuple[int, ...]
    at: tuple[int, ...]
    swizzle: str = "128B"
    steps: tuple[int, ...] | None = None
    allowed: float = 0.0

    function: ClassVar[Any] = _function("tile")

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return (1 + rng.permutation(math.prod(self.sizes))).astype(np.uint16).view(np.float16).reshape(self.sizes[::-1])

    def answer(self, numbers: Any) -> Any:
        count = 2 * math.prod(self.box)
        out = empty((count // 4,), np.dtype("uint32"), like=numbers)
        corner = np.array((len(self.at), (*self.at, 0, 0)[:4]), _CORNER)
        args = (TensorMap(numbers, self.box, self.swizzle, self.steps), corner, count, out)
        launch(Launch(self.function, (1,), (128,), args, 1024 + -(-count // 1024) * 1024 + 16))
        return out


@dataclass(frozen=True)
class Product:
    """wgmma of 64 x 16 by 16 x columns, `times` times along the sum; whole numbers, whose sums are exact, or normal."""

    dtype: str
    columns: int
    times: int = 1
    swizzle: str = "128B"
    whole: bool = True
    allowed: float = 0.0

    def function(self) -> Any:
        sizes = (f"-DCOLUMNS={self.columns}", f"-DTIMES={self.times}")
        return _function("product", f"-DNUMBER={STORED_AS[self.dtype]}", *sizes)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        shape = (64 + self.columns, _LAYOUTS[self.swizzle][0] // 2)
        values = rng.integers(-8, 9, shape) if self.whole else rng.standard_normal(shape)
        return values.astype(_DTYPES[self.dtype])

    def answer(self, numbers: Any) -> Any:
        row, mode = _LAYOUTS[self.swizzle]
        out = empty((64 * self.columns,), np.dtype("float32"), like=numbers)
        a, b = (TensorMap(part, (row // 2, len(part)), self.swizzle) for part in (numbers[:64], numbers[64:]))
        shared = 1024 + (64 + self.columns) * row + 16
        launch(Launch(self.function(), (1,), (128,), (a, b, np.uint64(mode), row, out), shared))
        return out


@dataclass(frozen=True)
class Phases:
    """Numbers handed from one warp to another, `_TURNS` times through two places."""

    allowed: float = 0.0

    function: ClassVar[Any] = _function("phases")

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, 2**32, (_TURNS, 32), np.uint32)

    def answer(self, numbers: Any) -> Any:
        out = empty(numbers.shape, np.dtype("uint32"), like=numbers)
        launch(Launch(self.function, (1,), (64,), (numbers, out, _TURNS)))
        return out


HOPPER: dict[str, dict[str, Any]] = {
    "tiles": {
        "TMA 2D": Tile((64, 12), (64, 8), (0, 4)),
        "TMA 2D, swizzle 64B": Tile((32, 20), (32, 16), (0, 2), "64B"),
        "TMA 2D, swizzle 32B": Tile((24, 16), (16, 16), (8, 0), "32B"),
        "TMA 2D, no swizzle": Tile((40, 9), (24, 8), (8, 1), "none"),
        "TMA 2D, outside on all sides": Tile((40, 9), (64, 16), (-8, -3)),
        "TMA 3D, one filter tap": Tile((64, 3, 16), (64, 1, 16), (0, 2, 0)),
        "TMA 3D, more channels than there are": Tile((40, 3, 12), (64, 1, 16), (0, 1, 0)),
        "TMA 4D, padding": Tile((64, 5, 6, 2), (64, 8, 4, 2), (0, -1, -1, 0)),
        "TMA 4D, every second pixel": Tile((64, 9, 7, 2), (64, 4, 4, 2), (0, -1, -1, 1), steps=(1, 2, 2, 1)),
        "TMA 4D, none of it inside": Tile((64, 5, 6, 2), (64, 4, 2, 1), (0, 5, 0, 0)),
    },
    "warpgroups": {
        "wgmma m64n64k16 bf16": Product("bfloat16", 64),
        "wgmma m64n128k16 bf16": Product("bfloat16", 128),
        "wgmma m64n64k16 f16": Product("float16", 64),
        "wgmma m64n128k16 f16": Product("float16", 128),
        "wgmma, four along a row of 128 bytes": Product("bfloat16", 64, times=4),
        "wgmma, two along a row of 64 bytes": Product("float16", 64, times=2, swizzle="64B"),
        "wgmma, rows of 32 bytes": Product("bfloat16", 128, swizzle="32B"),
        "wgmma bf16, rounding": Product("bfloat16", 64, times=4, whole=False, allowed=2.0**-18),
        "wgmma f16, rounding": Product("float16", 64, times=4, whole=False, allowed=2.0**-18),
    },
    "barriers": {"mbarrier phases": Phases()},
}
