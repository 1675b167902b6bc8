"""A `.cu` file of one's own as a registered kernel, with no line of Python beside it but its launch.

The file begins with a comment that names the problem and holds, in Python, the body of its launcher:

    /* minires: relu_fprop
    y = empty(x.shape)
    my_relu[cdiv(x.size, 256), 256](dense(x), y, x.size)
    return y
    */
    extern "C" __global__ void my_relu(const float* x, float* y, int n) { ... }

The body sees the arguments of the problem's definition, `name[grid, block]` or `name[grid, block, shared]` for every
extern "C" kernel of the file, and: empty(shape, dtype) and empty_nhwc(n, c, h, w, dtype), which is (logical view,
memory), both of the first argument's dtype by default; dense(x), C-contiguous; to_nhwc(x), as (N, H, W, C);
cdiv(n, d); np. Headers of kernels/cuda/include can be included. The kernel is for float32.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from .. import registry
from ..memory import empty, empty_nhwc, namespace, to_nhwc
from .launch import ARCHS, SM_80, Function, Launch, blocks, launch

_HEADER = re.compile(r"/\*\s*minires:\s*(\w+)[ \t]*\n(.*?)\*/", re.DOTALL)
_ENTRY = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s+)?(\w+)\s*\(')
_STEP = 99  # chosen before ours by dispatch, once it is loaded


def load(path: Path) -> None:
    """Register the kernel of a `.cu` file. FileNotFoundError, or ValueError in one line for what is wrong with it."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    text = path.read_text()
    header, entries = _HEADER.search(text), _ENTRY.findall(text)
    if header is None:
        raise ValueError(f"{path} does not say what it computes: begin it with /* minires: PROBLEM, its launch, and */")
    if not entries:
        raise ValueError(f'{path} has no kernel: declare one as extern "C" __global__ void NAME(...)')
    known = {p.name: p for p in registry.problems()}
    if header[1] not in known:
        raise ValueError(f"{path}: no problem is named {header[1]!r}; known: {', '.join(known)}")
    archs = SM_80 if re.search(r"cp\.async|ldmatrix|\bmma\.", text) else ARCHS
    found = {entry: _Entry(Function.unlisted(path.resolve(), entry, archs=archs)) for entry in entries}
    fn = _launcher(path, known[header[1]], header[2], found)
    register = registry.kernel(
        known[header[1]], device="cuda", step=_STEP, note=f"from {path.name}", dtypes=("float32",), name=path.stem
    )
    register(fn)


class _Entry:
    """`entry[grid, block, shared](*args)` launches."""

    def __init__(self, function: Function):
        self.function = function

    def __getitem__(self, shape: tuple) -> Any:
        if not isinstance(shape, tuple) or len(shape) not in (2, 3):
            raise ValueError(f"{self.function.entry}[grid, block] or [grid, block, shared], not [{shape}]")
        grid, block = (n if isinstance(n, tuple) else (n,) for n in shape[:2])
        shared = shape[2] if len(shape) == 3 else 0
        return lambda *args: launch(Launch(self.function, grid, block, tuple(map(_address, args)), shared))


def _launcher(path: Path, problem: registry.Problem, body: str, entries: dict[str, _Entry]) -> Any:
    """The function whose signature is that of the problem's definition, and whose body is the header's."""
    signature = inspect.signature(problem.reference)
    first = next(iter(signature.parameters))
    text = f"def launcher{signature}:\n" + textwrap.indent(
        f"empty = lambda shape, dtype=None: _empty(shape, dtype or {first}.dtype, {first})\n"
        f"empty_nhwc = lambda n, c, h, w, dtype=None: _empty_nhwc(n, c, h, w, dtype or {first}.dtype, {first})\n"
        + textwrap.dedent(body),
        "    ",
    )
    names: dict[str, Any] = dict(entries)
    names.update(np=np, cdiv=blocks, to_nhwc=to_nhwc, dense=_dense, _empty=empty, _empty_nhwc=empty_nhwc)
    try:
        exec(compile(text, f"the header of {path}", "exec"), names)
    except SyntaxError as error:
        raise ValueError(
            f"{path}: the launch in its header is no Python: {error.msg}: {(error.text or '').strip()}"
        ) from error
    return names["launcher"]


def _address(arg: Any) -> Any:
    """An array without axes as one that has one: it is passed by address, too."""
    return arg.reshape(1) if isinstance(arg, np.ndarray) and not arg.ndim else arg


def _dense(a: Any) -> Any:
    return namespace(a).ascontiguousarray(a)
