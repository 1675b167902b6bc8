"""The interpreter, opcode by opcode: against plain Python integers, or float64, on random and on extreme operands."""

import math
import struct

import ml_dtypes
import numpy as np
import pytest
from ptx_harness import dtype_of, evaluate

rng = np.random.default_rng(0)
N = 64
TESTED = set()


def _integers(kind):
    info = np.iinfo(dtype_of(kind))
    ends = [0, 1, info.max, info.min, info.max - 1, 7]
    return np.array(
        [*ends, *rng.integers(info.min, info.max, N - len(ends), dtype_of(kind), endpoint=True)], dtype_of(kind)
    )


def _floats(kind="f32", nan=True):
    ends = [0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, 3.25, *([math.nan] if nan else [])]
    values = rng.standard_normal(N - len(ends)) * np.exp2(rng.integers(-6, 7, N - len(ends)))
    return np.array([*ends, *values]).astype(dtype_of(kind))


def _wrap(value, kind):
    bits = 8 * dtype_of(kind).itemsize
    value = int(value) & (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> bits - 1 else value


def _bits(kind):
    return 8 * dtype_of(kind).itemsize


def _divide(a, b, kind):
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _shift_left(a, n, kind):
    return a << n if n < _bits(kind) else 0


def _shift_right(a, n, kind):
    return a >> min(n, 70)


def _unsigned(a, kind):
    return a & (1 << _bits(kind)) - 1


INTEGER = [
    ("add.{}", "s32 u32 s64 u64 s16", lambda a, b, k: a + b),
    ("sub.{}", "s32 u32 s64", lambda a, b, k: a - b),
    ("mul.lo.{}", "s32 u32 s64 s16", lambda a, b, k: a * b),
    ("mul.hi.{}", "s32 u32 s64 u64", lambda a, b, k: a * b >> _bits(k)),
    ("div.{}", "s32 u32 s64 u64", _divide),
    ("rem.{}", "s32 u32 s64", lambda a, b, k: a - _divide(a, b, k) * b if b else a),
    ("min.{}", "s32 u32 s64", lambda a, b, k: min(a, b)),
    ("max.{}", "s32 u32 s64", lambda a, b, k: max(a, b)),
    ("and.{}", "b32 b64 b16", lambda a, b, k: a & b),
    ("or.{}", "b32 b64", lambda a, b, k: a | b),
    ("xor.{}", "b32 b64", lambda a, b, k: a ^ b),
    ("add.sat.{}", "s32", lambda a, b, k: max(-(2**31), min(2**31 - 1, a + b))),
    ("abs.{}", "s32 s64", lambda a, k: abs(a)),
    ("neg.{}", "s32 s64", lambda a, k: -a),
    ("not.{}", "b32 b64", lambda a, k: ~a),
    ("cnot.{}", "b32", lambda a, k: a == 0),
    ("mov.{}", "u32 b64 u16", lambda a, k: a),
    ("brev.{}", "b32 b64", lambda a, k: int(f"{a:0{_bits(k)}b}"[::-1], 2)),
    ("mad.lo.{}", "s32 u32 s64", lambda a, b, c, k: a * b + c),
    ("mad.hi.{}", "s32 u32", lambda a, b, c, k: (a * b >> _bits(k)) + c),
    ("sad.{}", "s32 u32", lambda a, b, c, k: c + abs(a - b)),
]
INTEGER_CASES = [(text.format(kind), kind, fn) for text, kinds, fn in INTEGER for kind in kinds.split()]


@pytest.mark.parametrize("text, kind, fn", INTEGER_CASES, ids=[c[0] for c in INTEGER_CASES])
def test_integer_arithmetic(text, kind, fn):
    TESTED.add(text.partition(".")[0])
    sources = [rng.permutation(_integers(kind)) for _ in range(fn.__code__.co_argcount - 1)]
    got = evaluate(text, [(kind, a) for a in sources], kind)
    assert got.tolist() == [_wrap(fn(*map(int, values), kind), kind) for values in zip(*sources, strict=True)]


MIXED = [
    ("mul.wide.s32", "s32 s32", "s64", lambda a, b: a * b),
    ("mul.wide.u32", "u32 u32", "u64", lambda a, b: a * b),
    ("mul.wide.s16", "s16 s16", "s32", lambda a, b: a * b),
    ("mad.wide.s32", "s32 s32 s64", "s64", lambda a, b, c: a * b + c),
    ("mad.wide.u32", "u32 u32 u64", "u64", lambda a, b, c: a * b + c),
    ("popc.b32", "b32", "u32", lambda a: bin(a).count("1")),
    ("popc.b64", "b64", "u32", lambda a: bin(a).count("1")),
    ("clz.b32", "b32", "u32", lambda a: 32 - a.bit_length()),
    ("clz.b64", "b64", "u32", lambda a: 64 - a.bit_length()),
    ("bfind.u32", "u32", "u32", lambda a: a.bit_length() - 1),
    ("bfind.shiftamt.u32", "u32", "u32", lambda a: 32 - a.bit_length() if a else -1),
    ("bfind.s32", "s32", "u32", lambda a: (~a if a < 0 else a).bit_length() - 1),
    ("shl.b32", "b32 n", "b32", lambda a, n: _shift_left(a, n, "b32")),
    ("shl.b64", "b64 n", "b64", lambda a, n: _shift_left(a, n, "b64")),
    ("shr.u32", "u32 n", "u32", lambda a, n: _shift_right(a, n, "u32")),
    ("shr.s32", "s32 n", "s32", lambda a, n: _shift_right(a, n, "s32")),
    ("shr.s64", "s64 n", "s64", lambda a, n: _shift_right(a, n, "s64")),
    ("shf.l.wrap.b32", "b32 b32 n", "b32", lambda a, b, n: ((b << 32 | a) << (n & 31)) >> 32),
    ("shf.r.wrap.b32", "b32 b32 n", "b32", lambda a, b, n: (b << 32 | a) >> (n & 31)),
    ("shf.l.clamp.b32", "b32 b32 n", "b32", lambda a, b, n: ((b << 32 | a) << min(n, 32)) >> 32),
    ("bfe.u32", "u32 n n", "u32", lambda a, at, n: (a >> at) & ((1 << n) - 1)),
    ("selp.b32", "b32 b32 pred", "b32", lambda a, b, p: a if p else b),
    ("slct.u32.s32", "u32 u32 s32", "u32", lambda a, b, c: a if c >= 0 else b),
    ("set.lt.u32.s32", "s32 s32", "u32", lambda a, b: -1 if a < b else 0),
    ("cvt.s64.s32", "s32", "s64", lambda a: a),
    ("cvt.u64.u32", "u32", "u64", lambda a: a),
    ("cvt.u16.u32", "u32", "u16", lambda a: a),
    ("cvt.s32.s16", "s16", "s32", lambda a: a),
    ("cvt.u32.u64", "u64", "u32", lambda a: a),
    ("cvt.sat.u16.s32", "s32", "u16", lambda a: max(0, min(65535, a))),
    ("cvt.sat.s16.s64", "s64", "s16", lambda a: max(-32768, min(32767, a))),
    ("cvta.to.global.u64", "u64", "u64", lambda a: a),
]


@pytest.mark.parametrize("text, kinds, result, fn", MIXED, ids=[c[0] for c in MIXED])
def test_integers_of_several_types(text, kinds, result, fn):
    TESTED.add(text.partition(".")[0])
    kinds = kinds.split()
    sources = []
    for kind in kinds:
        small = rng.integers(0, 40, N).astype(np.uint32)
        sources.append(
            small if kind == "n" else rng.integers(0, 2, N) if kind == "pred" else rng.permutation(_integers(kind))
        )
    names = ["u32" if kind == "n" else kind for kind in kinds]
    got = evaluate(text, list(zip(names, sources, strict=True)), result)
    assert got.tolist() == [_wrap(fn(*map(int, values)), result) for values in zip(*sources, strict=True)]


def test_bits_that_a_sign_extends_or_a_field_replaces():
    TESTED.update({"bfe", "bfi", "lop3", "prmt"})
    a, b = _integers("s32"), rng.permutation(_integers("u32"))
    at, n = rng.integers(0, 32, N).astype(np.uint32), rng.integers(1, 20, N).astype(np.uint32)
    field = [(int(x) >> int(p)) & ((1 << int(m)) - 1) for x, p, m in zip(a, at, n, strict=True)]
    wanted = [f - (1 << int(m)) if f >> int(m) - 1 else f for f, m in zip(field, n, strict=True)]
    assert evaluate("bfe.s32", [("s32", a), ("u32", at), ("u32", n)], "s32").tolist() == wanted
    mask = [(((1 << int(m)) - 1) << int(p)) & 0xFFFFFFFF for p, m in zip(at, n, strict=True)]
    new = rng.integers(0, 2**32, N, np.uint32)
    wanted = [int(y) & ~k | (int(x) << int(p)) & k for x, y, p, k in zip(new, b, at, mask, strict=True)]
    assert evaluate("bfi.b32", [("u32", new), ("u32", b), ("u32", at), ("u32", n)], "u32").tolist() == wanted
    got = evaluate("lop3.b32", [("u32", new), ("u32", b), ("u32", at)], "u32", immediates=["0x96"])
    assert got.tolist() == (new ^ b ^ at).tolist()
    got = evaluate("lop3.b32", [("u32", new), ("u32", b), ("u32", at)], "u32", immediates=["0xE8"])
    assert got.tolist() == (new & b | new & at | b & at).tolist()
    eight = [struct.pack("<II", int(x), int(y)) for x, y in zip(new, b, strict=True)]
    wanted = [int.from_bytes(bytes([e[6], e[1], e[0], 255 if e[3] & 128 else 0]), "little") for e in eight]
    assert evaluate("prmt.b32", [("u32", new), ("u32", b)], "u32", immediates=["0xB016"]).tolist() == wanted


FLOAT = [
    ("add.{}", "f32 f64", lambda a, b: a + b),
    ("sub.{}", "f32 f64", lambda a, b: a - b),
    ("mul.{}", "f32 f64", lambda a, b: a * b),
    ("div.rn.{}", "f32 f64", lambda a, b: a / b),
    ("fma.rn.{}", "f32", lambda a, b, c: a * b + c),
    ("mad.rn.{}", "f32", lambda a, b, c: a * b + c),
    ("neg.{}", "f32 f64", lambda a: -a),
    ("abs.{}", "f32 f64", abs),
    ("copysign.{}", "f32", lambda a, b: np.copysign(b, a)),
    ("rcp.rn.{}", "f32 f64", lambda a: 1 / a),
    ("sqrt.rn.{}", "f32 f64", np.sqrt),
    ("rsqrt.approx.{}", "f32", lambda a: 1 / np.sqrt(a)),
    ("ex2.approx.{}", "f32", np.exp2),
    ("lg2.approx.{}", "f32", np.log2),
    ("sin.approx.{}", "f32", np.sin),
    ("cos.approx.{}", "f32", np.cos),
    ("tanh.approx.{}", "f32", np.tanh),
    ("cvt.f64.f32:f64", "f32", lambda a: a),
    ("cvt.rn.f32.f64:f32", "f64", lambda a: a),
    ("cvt.rmi.f32.f32:f32", "f32", np.floor),
    ("cvt.rni.f32.f32:f32", "f32", np.rint),
    ("cvt.rzi.f32.f32:f32", "f32", np.trunc),
    ("cvt.rpi.f32.f32:f32", "f32", np.ceil),
    ("cvt.sat.f32.f32:f32", "f32", lambda a: np.where(np.isnan(a), 0, np.clip(a, 0, 1))),
    ("add.{}", "f16 bf16", lambda a, b: a + b),
    ("mul.{}", "f16 bf16", lambda a, b: a * b),
    ("fma.rn.{}", "f16 bf16", lambda a, b, c: a * b + c),
    ("cvt.f32.{}:f32", "f16 bf16", lambda a: a),
    ("cvt.rn.bf16.f32:bf16", "f32", lambda a: a),
    ("cvt.rn.f16.f32:f16", "f32", lambda a: a),
]
FLOAT_CASES = [(text.format(kind), kind, fn) for text, kinds, fn in FLOAT for kind in kinds.split()]


@pytest.mark.parametrize("text, kind, fn", FLOAT_CASES, ids=[c[0] for c in FLOAT_CASES])
@pytest.mark.filterwarnings("ignore:.*encountered in")
def test_floating_point(text, kind, fn):
    """The definition in a wider type, rounded once."""
    TESTED.add(text.partition(".")[0])
    text, _, result = text.partition(":")
    count = 1 if isinstance(fn, np.ufunc) or fn is abs else fn.__code__.co_argcount
    sources = [rng.permutation(_floats(kind)) for _ in range(count)]
    got = evaluate(text, [(kind, a) for a in sources], result or kind)
    wide = np.longdouble if kind == "f64" else np.float64
    wanted = fn(*[a.astype(wide) for a in sources]).astype(dtype_of(result or kind))
    np.testing.assert_array_equal(got.astype(np.float64), wanted.astype(np.float64))


@pytest.mark.parametrize("mode, direction", [("rm", -1), ("rp", 1), ("rz", 0)])
@pytest.mark.parametrize("op", ["add", "mul", "fma", "div"])
def test_directed_rounding(op, mode, direction):
    """The rounded result lies on the right side of the exact one, and the next number does not."""
    a, b, c = (rng.standard_normal(N).astype(np.float32) for _ in range(3))
    sources = [a, b, c][: 3 if op == "fma" else 2]
    x, y, z = (v.astype(np.float64) for v in (a, b, c))
    exact = {"add": x + y, "mul": x * y, "fma": x * y + z, "div": x / y}[op]
    got = evaluate(f"{op}.{mode}.f32", [("f32", v) for v in sources], "f32")
    away = np.where(exact < 0, 1, -1) if mode == "rz" else np.full(N, direction)
    towards = np.where(away > 0, np.nextafter(got, np.float32(-np.inf)), np.nextafter(got, np.float32(np.inf)))
    assert ((got - exact) * away >= 0).all() and ((towards - exact) * away < 0).all()


def test_a_number_beats_nan_and_zeros_have_an_order():
    a = np.array([np.nan, 1, np.nan, 0.0, -0.0, 2], np.float32)
    b = np.array([3, np.nan, np.nan, -0.0, 0.0, 1], np.float32)
    small, large = (evaluate(f"{op}.f32", [("f32", a), ("f32", b)], "f32") for op in ("min", "max"))
    np.testing.assert_array_equal(small, [3, 1, np.nan, -0.0, -0.0, 1])
    np.testing.assert_array_equal(np.signbit(small[3:5]), [True, True])
    np.testing.assert_array_equal(large, [3, 1, np.nan, 0.0, 0.0, 2])
    np.testing.assert_array_equal(np.signbit(large[3:5]), [False, False])
    assert np.isnan(evaluate("max.NaN.f32", [("f32", a), ("f32", b)], "f32")[:3]).all()


def test_flush_to_zero_and_saturation():
    tiny = np.array([1e-40, -1e-40, 1.0, 1e-38], np.float32)
    assert evaluate("add.ftz.f32", [("f32", tiny), ("f32", np.zeros(4))], "f32").tolist() == [0, 0, 1, 0]
    assert evaluate("mul.f32", [("f32", tiny), ("f32", np.ones(4))], "f32").tolist() == tiny.tolist()
    values = np.array([-2, 0.25, 3, np.nan], np.float32)
    assert evaluate("add.sat.f32", [("f32", values), ("f32", np.zeros(4))], "f32").tolist() == [0, 0.25, 1, 0]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_packed_halves(kind):
    dtype = np.float16 if kind == "f16" else ml_dtypes.bfloat16
    a, b, c = (rng.standard_normal(2 * N).astype(dtype) for _ in range(3))
    sources = [(f"{kind}x2", v.view(np.uint32)) for v in (a, b, c)]
    got = evaluate(f"fma.rn.{kind}x2", sources, f"{kind}x2").view(dtype)
    wanted = (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(dtype)
    np.testing.assert_array_equal(got.astype(float), wanted.astype(float))
    low, high = _floats(), rng.permutation(_floats())
    got = evaluate(f"cvt.rn.{kind}x2.f32", [("f32", high), ("f32", low)], f"{kind}x2").view(dtype).reshape(-1, 2)
    np.testing.assert_array_equal(got[:, 0].astype(float), low.astype(dtype).astype(float))
    np.testing.assert_array_equal(got[:, 1].astype(float), high.astype(dtype).astype(float))


def test_rounding_to_tf32():
    a = _floats(nan=False)
    got = evaluate("cvt.rna.tf32.f32", [("f32", a)], "b32").view(np.float32).astype(float)
    finite = np.isfinite(a)
    got, kept = got[finite], a.astype(float)[finite]
    assert (np.abs(got - kept) <= 2.0**-11 * np.abs(kept)).all()
    assert not (got.astype(np.float32).view(np.uint32) & 0x1FFF).any()


def test_integers_from_floats():
    a = np.array([0.5, 1.5, -1.5, 2.5, -0.5, 3e9, -3e9, np.nan, np.inf, 1e-3], np.float32)
    top, low = 2**31 - 1, -(2**31)
    assert evaluate("cvt.rni.s32.f32", [("f32", a)], "s32").tolist() == [0, 2, -2, 2, 0, top, low, 0, top, 0]
    assert evaluate("cvt.rzi.s32.f32", [("f32", a)], "s32").tolist() == [0, 1, -1, 2, 0, top, low, 0, top, 0]
    assert evaluate("cvt.rmi.s32.f32", [("f32", a)], "s32").tolist() == [0, 1, -2, 2, -1, top, low, 0, top, 0]
    assert evaluate("cvt.rzi.u32.f32", [("f32", a)], "u32").tolist() == [
        0,
        1,
        0,
        2,
        0,
        3_000_000_000,
        0,
        0,
        2**32 - 1,
        0,
    ]
    wide = _integers("s32")
    assert evaluate("cvt.rn.f32.s32", [("s32", wide)], "f32").tolist() == wide.astype(np.float32).tolist()


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a < b or a > b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: not (a < b or a > b),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: not a >= b,
    "geu": lambda a, b: not a < b,
    "num": lambda a, b: a == a and b == b,
    "nan": lambda a, b: a != a or b != b,
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_setp(name):
    TESTED.add("setp")
    a, b = _floats(), rng.permutation(_floats())
    b[:20] = a[:20]
    got, inverse = evaluate(f"setp.{name}.f32", [("f32", a), ("f32", b)], "pred", second="pred")
    wanted = [COMPARISONS[name](float(x), float(y)) for x, y in zip(a, b, strict=True)]
    assert got.tolist() == wanted and inverse.tolist() == [not w for w in wanted]


def test_setp_of_integers_with_a_third_predicate():
    a, b = _integers("s32"), rng.permutation(_integers("s32"))
    p = rng.integers(0, 2, N)
    signed = evaluate("setp.lt.and.s32", [("s32", a), ("s32", b), ("pred", p)], "pred")
    assert signed.tolist() == ((a < b) & (p > 0)).tolist()
    unsigned = evaluate("setp.hi.or.u32", [("u32", a.view(np.uint32)), ("u32", b.view(np.uint32)), ("pred", p)], "pred")
    assert unsigned.tolist() == ((a.view(np.uint32) > b.view(np.uint32)) | (p > 0)).tolist()


def test_testp():
    TESTED.add("testp")
    a = _floats()
    assert evaluate("testp.finite.f32", [("f32", a)], "pred").tolist() == np.isfinite(a).tolist()
    assert evaluate("testp.notanumber.f32", [("f32", a)], "pred").tolist() == np.isnan(a).tolist()


# What lanes of a warp exchange


def _segment(lane, width):
    return lane // width * width


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("mode", ["idx", "up", "down", "bfly"])
def test_shuffle(mode, width):
    """CUDA's __shfl_*_sync: where the other lane is outside the segment, a lane keeps its own value."""
    TESTED.add("shfl")
    a = rng.integers(0, 2**32, 64, np.uint32)
    for b in (0, 1, 3, 5):
        clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
        got, valid = evaluate(f"shfl.sync.{mode}.b32", [("u32", a)], "u32", [str(b), str(clamp), "-1"], second="pred")
        for i in range(64):
            begin, lane = _segment(i % 32, width), i % 32
            other = {"idx": begin + b % width, "up": lane - b, "down": lane + b, "bfly": lane ^ b}[mode]
            inside = begin <= other < begin + width
            assert valid[i] == inside and got[i] == a[i // 32 * 32 + (other if inside else lane)]


def test_votes():
    TESTED.update({"vote", "match", "redux", "activemask", "elect"})
    p = rng.integers(0, 2, 64)
    p[32:] = 1
    words = [sum(1 << i for i in range(32) if p[w + i]) for w in (0, 32)]
    assert evaluate("vote.sync.ballot.b32", [("pred", p)], "u32", ["-1"]).tolist() == np.repeat(words, 32).tolist()
    assert evaluate("vote.sync.all.pred", [("pred", p)], "pred", ["-1"]).tolist() == [False] * 32 + [True] * 32
    assert evaluate("vote.sync.any.pred", [("pred", p)], "pred", ["-1"]).all()
    assert evaluate("vote.sync.uni.pred", [("pred", p)], "pred", ["-1"]).tolist() == [False] * 32 + [True] * 32
    a = rng.integers(-3, 3, 64).astype(np.int32)
    same = [sum(1 << j for j in range(32) if a[i // 32 * 32 + j] == a[i]) for i in range(64)]
    assert evaluate("match.any.sync.b32", [("b32", a.view(np.uint32))], "u32", ["-1"]).tolist() == same
    for op, fn in (("add", np.sum), ("min", np.min), ("max", np.max)):
        wanted = np.repeat([fn(a[:32]), fn(a[32:])], 32)
        assert evaluate(f"redux.sync.{op}.s32", [("s32", a)], "s32", ["-1"]).tolist() == wanted.tolist()
    u = a.view(np.uint32)
    wanted = np.repeat([np.bitwise_xor.reduce(u[:32]), np.bitwise_xor.reduce(u[32:])], 32)
    assert evaluate("redux.sync.xor.b32", [("b32", u)], "b32", ["-1"]).tolist() == wanted.tolist()
    got, every = evaluate("match.all.sync.b32", [("b32", np.repeat([5, 7], 32))], "u32", ["-1"], second="pred")
    assert every.all() and (got == 0xFFFFFFFF).all()
