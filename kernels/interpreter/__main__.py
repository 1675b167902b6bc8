"""`python -m minires.kernels.interpreter`: step through a kernel on a machine without a GPU.

Without arguments, the example: the sum of 64 numbers by one block. Keys, each followed by Enter:

    (nothing)   the next instruction           b   one back
    l           the next source line           c   to the end, or the fault
    p NAME      watch a register; with a type: p %r4 f32
    m           all of shared memory           q   leave
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .ptx import parse
from .step import EXAMPLE, Moment, record, show, words


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 where the kernel is at fault, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m minires.kernels.interpreter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", help="a .ptx file, or a .cu file where NVRTC is installed")
    parser.add_argument("--kernel", help="its name; by default the first of the file")
    parser.add_argument("--grid", type=int, nargs="+", default=[1], help="blocks: x [y [z]]")
    parser.add_argument("--block", type=int, nargs="+", default=[64], help="threads of a block: x [y [z]]")
    parser.add_argument("--shared", type=int, default=0, help="bytes of dynamic shared memory")
    parser.add_argument(
        "--args", nargs="*", default=[], help="f32:64 (an array 0, 1, 2, ...), f32:64=0, i32=5", metavar="A"
    )
    parser.add_argument("--seed", type=int, help="run warps in bursts, in the order of this seed")
    parser.add_argument("--all", action="store_true", help="print every instruction and end")
    given = parser.parse_args(arguments)
    try:
        path = EXAMPLE if given.file is None else Path(given.file)
        text, source = _read(path)
        args = [_argument(a) for a in given.args or (["f32:64", "f32:1=0"] if given.file is None else [])]
        name = given.kernel or next(iter(parse(text).functions))
        moments = record(text, name, given.grid, given.block, args, given.shared, seed=given.seed)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, StopIteration, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    if given.all or not sys.stdin.isatty():
        for number, moment in enumerate(moments):
            print(show(moment, number, source))
    else:
        _walk(moments, source)
    for k, a in enumerate(args):
        if isinstance(a, np.ndarray):
            print(f"argument {k} afterwards: {np.array2string(a, threshold=16, precision=6)}")
    return 1 if moments and moments[-1].fault is not None else 0


def _read(path: Path) -> tuple[str, list[str]]:
    """(PTX, lines of the CUDA source where there is one)."""
    if path.suffix == ".cu":
        from ..cuda.compile import compile_ptx, whole_source

        return compile_ptx(whole_source(path), path.name, "sm_80"), path.read_text().splitlines()
    beside = path.with_suffix(".cu")
    return path.read_text(), beside.read_text().splitlines() if beside.is_file() else []


def _argument(text: str) -> Any:
    """ "f32:64" -> an array that counts, "f32:64=0" -> one of zeros, "i32=5" -> a number."""
    kind, _, value = text.partition("=")
    kind, _, size = kind.partition(":")
    kinds = {"f16": "f2", "f32": "f4", "f64": "f8", "i32": "i4", "u32": "u4", "i64": "i8", "u8": "u1", "u16": "u2"}
    if kind not in kinds or not (size or value):
        raise ValueError(
            f"argument {text!r}: write TYPE:SIZE, TYPE:SIZE=VALUE or TYPE=VALUE, TYPE of {', '.join(kinds)}"
        )
    dtype = np.dtype(kinds[kind])
    if not size:
        return dtype.type(float(value) if kind[0] == "f" else int(value))
    return np.arange(int(size)).astype(dtype) if not value else np.full(int(size), float(value)).astype(dtype)


def _walk(moments: list[Moment], source: list[str]) -> None:
    """Show one moment after another, as the keys say."""
    at, watched = 0, {}
    print((__doc__ or "").partition("\n\n")[2])
    while True:
        print(show(moments[at], at, source, watched))
        try:
            key, *rest = input("> ").split() or [""]
        except (EOFError, KeyboardInterrupt):
            return
        last = len(moments) - 1
        if key == "q" or (key == "" and at == last):
            return
        if key == "p" and rest:
            watched[rest[0]] = rest[1] if len(rest) > 1 else ""
        elif key == "m":
            print("\n".join(words(row, len(row)) for row in moments[at].shared))
        elif key == "l":
            here = moments[at].line
            at = next((k for k in range(at, last) if moments[k].line != here), last)
        else:
            at = {"b": max(0, at - 1), "c": last}.get(key, min(last, at + 1))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
