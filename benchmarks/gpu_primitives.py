"""Units of `gpu_report` that ask the hardware what single instructions do, and compare the interpreter's answer.

Most primitives are small PTX kernels of one warp: a lane loads 8 words, does what is asked and stores 8. Those of
Hopper, which need tensor maps, warpgroups and barriers, are in gpu_hopper.py. What the hardware answered stands in the
report, bit by bit, as golden outputs: `tests/test_interpreter_golden.py` holds the interpreter to every report in
`benchmarks/results`, on machines without a GPU.

Sums on tensor cores are exact where all products are small whole numbers: there, which number goes where is checked
bit by bit. Their rounding, and that of .approx instructions, is the hardware's own: `allowed` says how far it may be.
"""

from __future__ import annotations

import base64
import importlib
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .gpu_hopper import HOPPER

Row = dict[str, Any]
LANES, WORDS = 32, 8
_BODY = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 src, .param .u64 dst)
{{
.reg .b32 %r<8>, %q<8>, %lane; .reg .f32 %f<8>; .reg .b64 %at, %to, %off, %w<4>; .reg .b16 %h<4>; .reg .pred %p<2>;
.reg .b32 %s, %s2;
.shared .align 16 .b8 space[1024];
ld.param.u64 %at, [src]; ld.param.u64 %to, [dst]; mov.u32 %lane, %tid.x;
mul.wide.u32 %off, %lane, 32; add.s64 %at, %at, %off; add.s64 %to, %to, %off;
{loads}
{body}
{stores}
ret;
}}
"""


@dataclass(frozen=True)
class Primitive:
    """body: PTX from %r0 to %r7 (words of the lane) to %q0 to %q7. draw: the words, (32, 8) uint32. allowed: the
    largest relative difference of the results as float32; 0: bit by bit."""

    body: str
    draw: Callable[[np.random.Generator], np.ndarray]
    allowed: float = 0.0

    def ptx(self) -> str:
        loads = [f"mov.b32 %q{i}, 0; ld.global.u32 %r{i}, [%at+{4 * i}];" for i in range(WORDS)]
        stores = [f"st.global.u32 [%to+{4 * i}], %q{i};" for i in range(WORDS)]
        return _BODY.format(loads="\n".join(loads), body=self.body, stores="\n".join(stores))

    def answer(self, words: Any) -> Any:
        """What the interpreter answers where the words are NumPy's, and the GPU where they are CuPy's: there, the
        driver compiles the PTX."""
        if isinstance(words, np.ndarray):
            from minires.kernels.interpreter import run  # pyright: ignore[reportMissingImports]

            answer = np.zeros_like(words)
            run(self.ptx(), "k", 1, LANES, [words.copy(), answer])
            return answer
        cupy: Any = importlib.import_module("cupy")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "primitive.ptx"  # the folder's name is new each time: CuPy remembers modules by path
            path.write_text(self.ptx())
            kernel = cupy.RawModule(path=str(path)).get_function("k")
        answer = cupy.zeros_like(words)
        kernel((1,), (LANES,), (words, answer))
        return answer


def _bits(rng: np.random.Generator) -> np.ndarray:
    words = rng.integers(0, 2**32, (LANES, WORDS), np.uint32)
    words[:4] = np.array([0, 1, 0x7FFFFFFF, 0x80000000], np.uint32)[:, None]
    return words


def _floats(rng: np.random.Generator) -> np.ndarray:
    values = rng.standard_normal((LANES, WORDS)) * np.exp2(rng.integers(-20, 21, (LANES, WORDS)))
    values[:6, 0] = 0.0, -0.0, np.inf, -np.inf, 1.0, 1e-40
    return values.astype(np.float32).view(np.uint32)


def _positive(rng: np.random.Generator) -> np.ndarray:
    return np.exp2(rng.uniform(-20, 20, (LANES, WORDS))).astype(np.float32).view(np.uint32)


def _whole(kind: str) -> Callable[[np.random.Generator], np.ndarray]:
    """Whole numbers from -8 to 8, packed as tensor cores take them."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        if kind == "tf32":
            return rng.integers(-8, 9, (LANES, WORDS)).astype(np.float32).view(np.uint32)
        values = rng.integers(-8, 9, (LANES, 2 * WORDS)).astype(np.float32)
        halves = values.astype(np.float16).view(np.uint16) if kind == "f16" else (values.view(np.uint32) >> 16)
        return np.ascontiguousarray(halves.astype(np.uint16)).view(np.uint32)

    return draw


def _normal_bf16(rng: np.random.Generator) -> np.ndarray:
    values = rng.standard_normal((LANES, 2 * WORDS)).astype(np.float32)
    return np.ascontiguousarray((values.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint32)


def _of_floats(*lines: str) -> str:
    """f0, f1, f2 from the words; %q0 from f3."""
    takes = "mov.b32 %f0, %r0; mov.b32 %f1, %r1; mov.b32 %f2, %r2;"
    return "\n".join([takes, *lines, "mov.b32 %q0, %f3;"])


def _mma(shape: str, kind: str, words_a: int, words_b: int) -> str:
    a = ", ".join(f"%r{i}" for i in range(words_a))
    b = ", ".join(f"%r{words_a + i}" for i in range(words_b))
    d = "%f0, %f1, %f2, %f3"
    zero = "mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;"
    back = " ".join(f"mov.b32 %q{i}, %f{i};" for i in range(4))
    return f"{zero}\nmma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{{d}}}, {{{a}}}, {{{b}}}, {{{d}}};\n{back}"


_STAGE = "mov.u32 %s, space; shl.b32 %s2, %lane, 5; add.u32 %s, %s, %s2;"  # the lane's 32 bytes
_STORE = " ".join(f"st.shared.u32 [%s+{4 * i}], %r{i};" for i in range(WORDS))
_ROWS = "bar.sync 0; mov.u32 %s, space; shl.b32 %s2, %lane, 4; add.u32 %s, %s, %s2;"  # a row of 16 bytes per lane
_SHUFFLE = {"idx": "and.b32 %s, %r1, 31;", "up": "mov.u32 %s, 3;", "down": "mov.u32 %s, 5;", "bfly": "mov.u32 %s, 9;"}

PRIMITIVES: dict[str, dict[str, Any]] = {
    "integers": {
        "mul.hi.u64": Primitive(
            "mov.b64 %w0, {%r0, %r1}; mov.b64 %w1, {%r2, %r3}; mul.hi.u64 %w2, %w0, %w1; mov.b64 {%q0, %q1}, %w2;",
            _bits,
        ),
        "mul.wide.u32": Primitive("mul.wide.u32 %w0, %r0, %r1; mov.b64 {%q0, %q1}, %w0;", _bits),
        "mad.lo.s32": Primitive("mad.lo.s32 %q0, %r0, %r1, %r2;", _bits),
        "shl.b32 of any distance": Primitive("and.b32 %s, %r1, 63; shl.b32 %q0, %r0, %s;", _bits),
        "shr.s32 of any distance": Primitive("and.b32 %s, %r1, 63; shr.s32 %q0, %r0, %s;", _bits),
        "prmt": Primitive("prmt.b32 %q0, %r0, %r1, %r2;", _bits),
        "bfe.s32": Primitive("bfe.s32 %q0, %r0, 5, 11;", _bits),
        "popc, clz": Primitive("popc.b32 %q0, %r0; clz.b32 %q1, %r0;", _bits),
        "lop3": Primitive("lop3.b32 %q0, %r0, %r1, %r2, 0xe8;", _bits),
    },
    "floats": {
        "fma.rn": Primitive(_of_floats("fma.rn.f32 %f3, %f0, %f1, %f2;"), _floats),
        "div.rn": Primitive(_of_floats("div.rn.f32 %f3, %f1, %f2;"), _floats),
        "sqrt.rn": Primitive(_of_floats("sqrt.rn.f32 %f3, %f1;"), _positive),
        "min, max": Primitive(_of_floats("min.f32 %f4, %f0, %f1; max.f32 %f3, %f4, %f2;"), _floats),
        "cvt to f16": Primitive("mov.b32 %f0, %r0; cvt.rn.f16.f32 %h0, %f0; cvt.u32.u16 %q0, %h0;", _floats),
        "cvt to bf16": Primitive("mov.b32 %f0, %r0; cvt.rn.bf16.f32 %h0, %f0; cvt.u32.u16 %q0, %h0;", _floats),
        "cvt to tf32": Primitive("mov.b32 %f0, %r1; cvt.rna.tf32.f32 %q0, %f0;", _floats),
        "cvt to s32": Primitive("mov.b32 %f0, %r0; cvt.rzi.s32.f32 %q0, %f0; cvt.rni.s32.f32 %q1, %f0;", _floats),
        "ex2.approx": Primitive(_of_floats("cos.approx.f32 %f4, %f1; ex2.approx.f32 %f3, %f4;"), _positive, 2.0**-16),
        "rcp.approx": Primitive(_of_floats("rcp.approx.f32 %f3, %f0;"), _positive, 2.0**-20),
        "rsqrt.approx": Primitive(_of_floats("rsqrt.approx.f32 %f3, %f0;"), _positive, 2.0**-20),
    },
    "warps": {
        **{
            f"shfl.{mode}": Primitive(
                f"{distance} shfl.sync.{mode}.b32 %q0|%p0, %r0, %s, {0 if mode == 'up' else 31}, 0xffffffff; "
                "selp.u32 %q1, 1, 0, %p0;",
                _bits,
            )
            for mode, distance in _SHUFFLE.items()
        },
        "vote.ballot": Primitive("setp.gt.s32 %p0, %r0, 0; vote.sync.ballot.b32 %q0, %p0, 0xffffffff;", _bits),
    },
    "matrices": {
        "mma bf16": Primitive(_mma("m16n8k16", "bf16", 4, 2), _whole("bf16")),
        "mma f16": Primitive(_mma("m16n8k16", "f16", 4, 2), _whole("f16")),
        "mma tf32": Primitive(_mma("m16n8k8", "tf32", 4, 2), _whole("tf32")),
        "mma bf16, rounding": Primitive(_mma("m16n8k16", "bf16", 4, 2), _normal_bf16, 2.0**-18),
        "ldmatrix.x4": Primitive(
            f"{_STAGE} {_STORE} {_ROWS} ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%q0, %q1, %q2, %q3}}, [%s];", _bits
        ),
        "ldmatrix.x2.trans": Primitive(
            f"{_STAGE} {_STORE} {_ROWS} ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{%q0, %q1}}, [%s];", _bits
        ),
    },
    "copies": {
        "cp.async": Primitive(
            f"{_STAGE} cp.async.cg.shared.global [%s], [%at], 16; cp.async.commit_group; cp.async.wait_group 0; "
            "bar.sync 0; ld.shared.u32 %q0, [%s]; ld.shared.u32 %q3, [%s+12];",
            _bits,
        ),
        "cp.async, zeros behind 8 bytes": Primitive(
            f"{_STAGE} cp.async.cg.shared.global [%s], [%at], 16, 8; cp.async.commit_group; cp.async.wait_group 0; "
            "bar.sync 0; ld.shared.u32 %q0, [%s+4]; ld.shared.u32 %q1, [%s+8];",
            _bits,
        ),
    },
}
PRIMITIVES |= HOPPER


def primitives(argument: str) -> Iterator[Row]:
    """A group of primitives on the GPU and in the interpreter; raises where one differs by more than is allowed."""
    if argument in HOPPER and (lacking := not_hopper()):
        yield {"group": argument, "skipped": lacking}
        return
    wrong = []
    for name, primitive in PRIMITIVES[argument].items():
        words = drawn(primitive)
        real = on_device(primitive, words)
        off = difference(primitive, interpreted(primitive, words), real)
        wrong += [name] * (off > primitive.allowed)
        row = {"group": argument, "primitive": name, "difference": off, "allowed": primitive.allowed}
        yield row | {"golden": _packed(real)}
    if wrong:
        raise RuntimeError(f"the interpreter is not like the hardware in {', '.join(wrong)}")


def not_hopper() -> str:
    """Why this GPU has no instructions of sm_90a; "" where it has them."""
    capability = importlib.import_module("cupy").cuda.Device().compute_capability
    return "" if capability == "90" else f"sm_90a needs compute capability 9.0, this GPU has {int(capability) / 10}"


def drawn(primitive: Any) -> np.ndarray:
    """The words that a primitive is asked with, the same ones always."""
    return np.ascontiguousarray(primitive.draw(np.random.default_rng(0)))


def interpreted(primitive: Any, words: np.ndarray) -> np.ndarray:
    """What the interpreter answers, as words."""
    return primitive.answer(words).view(np.uint32)


def on_device(primitive: Any, words: np.ndarray) -> np.ndarray:
    """What the hardware answers, as words."""
    return primitive.answer(importlib.import_module("cupy").asarray(words)).get().view(np.uint32)


def difference(primitive: Any, got: np.ndarray, wanted: np.ndarray) -> float:
    """0 where the bits are equal; else the largest difference as float32, relative to the largest number; infinite
    where bits had to be equal, or one is NaN."""
    if np.array_equal(got, wanted):
        return 0.0
    if not primitive.allowed:
        return float("inf")
    a, b = got.view(np.float32), wanted.view(np.float32)
    off = float(np.abs(a.astype(float) - b).max() / np.abs(b).max(initial=np.float32(1e-30)))
    return float("inf") if np.isnan(off) else off


def golden(line: Row) -> Iterator[tuple[str, Any, np.ndarray]]:
    """(name, primitive, the hardware's answer) of every row of a line of a report."""
    for row in line["rows"]:
        primitive = PRIMITIVES.get(row.get("group"), {}).get(row.get("primitive"))
        if primitive is not None:
            yield row["primitive"], primitive, _unpacked(row["golden"])


def _packed(words: np.ndarray) -> str:
    """Words as text: their shape, and their bytes deflated, in base 64."""
    data = zlib.compress(np.ascontiguousarray(words, "<u4").tobytes(), 9)
    return f"{'x'.join(map(str, words.shape))}:{base64.b64encode(data).decode()}"


def _unpacked(text: str) -> np.ndarray:
    shape, _, data = text.partition(":")
    return np.frombuffer(zlib.decompress(base64.b64decode(data)), "<u4").reshape([*map(int, shape.split("x"))])
