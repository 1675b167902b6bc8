"""Matrices of tensor cores in the interpreter, against the element positions that the PTX ISA writes down."""

import ml_dtypes
import numpy as np
import pytest
from minires.kernels.interpreter import run
from minires.kernels.interpreter.tensor_map import TensorMap, swizzled
from minires.kernels.interpreter.wgmma import element_places
from ptx_harness import entry

rng = np.random.default_rng(0)
HALF = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}


def _positions(k, bits):
    """{(operand, row, column): (lane, element)} as the figures of "Matrix Fragments for mma" put it."""
    found = {}
    for lane in range(32):
        group, quad = lane // 4, lane % 4
        for i in range(4):
            found["c", group + (8 if i >= 2 else 0), quad * 2 + (i & 1)] = (lane, i)
        if bits == 16:
            for i in range(k // 2):
                row = group + (8 if i & 2 else 0)
                found["a", row, quad * 2 + (i & 1) + (8 if i >= 4 else 0)] = (lane, i)
            for i in range(k // 4):
                found["b", quad * 2 + (i & 1) + (8 if i >= 2 else 0), group] = (lane, i)
        else:
            for i in range(k // 2):
                found["a", group + (8 if i & 1 else 0), quad + (4 if i >= 2 else 0)] = (lane, i)
            for i in range(k // 4):
                found["b", quad + (4 if i else 0), group] = (lane, i)
    return found


def _held(operand, matrix, positions):
    """A matrix as the lanes hold it: (lanes, elements)."""
    places = {key[1:]: at for key, at in positions.items() if key[0] == operand}
    result = np.zeros((32, 1 + max(e for _, e in places.values())), matrix.dtype)
    for (row, column), (lane, element) in places.items():
        result[lane, element] = matrix[row, column]
    return np.ascontiguousarray(result)


def _mma(text, registers):
    """A kernel of one warp: loads the registers of a, b and c, multiplies, stores d."""
    lines = [".reg .b32 %t; mov.u32 %t, %tid.x;"]
    lists = []
    for name, count in zip("abcd", registers, strict=True):
        names = [f"%{name}{i}" for i in range(count)]
        lists.append("{" + ", ".join(names) + "}")
        lines += [f".reg .b64 %p{name}, %o{name}; .reg .b32 {', '.join(names)}; ld.param.u64 %p{name}, [{name}];"]
        lines += [f"mul.wide.u32 %o{name}, %t, {4 * count}; add.s64 %p{name}, %p{name}, %o{name};"]
        lines += [f"ld.global.b32 {r}, [%p{name}+{4 * i}];" for i, r in enumerate(names) if name != "d"]
    lines += [f"{text} {lists[3]}, {lists[0]}, {lists[1]}, {lists[2]};"]
    lines += [f"st.global.b32 [%pd+{4 * i}], %d{i};" for i in range(registers[3])]
    return entry("\n".join([*lines, "ret;"]), [("u64", n) for n in "abcd"])


_SHAPES = [("f16", 16), ("bf16", 16), ("f16", 8), ("bf16", 8), ("tf32", 8), ("tf32", 4)]


@pytest.mark.parametrize(
    "kind, k, accumulator", [(*s, "f32") for s in _SHAPES] + [("f16", 16, "f16"), ("f16", 8, "f16")]
)
def test_mma(kind, k, accumulator):
    bits = 32 if kind == "tf32" else 16
    positions = _positions(k, bits)
    a, b = rng.standard_normal((16, k)).astype(np.float32), rng.standard_normal((k, 8)).astype(np.float32)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    sums = np.float32 if accumulator == "f32" else np.float16
    if kind != "tf32":
        a, b = a.astype(HALF[kind]), b.astype(HALF[kind])
    c = c.astype(sums)
    held = [_held(name, m, positions).reshape(32, -1).view(np.uint32) for name, m in (("a", a), ("b", b), ("c", c))]
    d = np.zeros((32, 4), sums).view(np.uint32)
    text = f"mma.sync.aligned.m16n8k{k}.row.col.{accumulator}.{kind}.{kind}.{accumulator}"
    run(_mma(text, [h.shape[1] for h in [*held, d]]), "k", 1, 32, [*held, d])
    if kind == "tf32":  # the low 13 bits do not count
        a, b = ((m.view(np.uint32) & 0xFFFFE000).view(np.float32) for m in (a, b))
    wanted = a.astype(float) @ b.astype(float) + c.astype(float)
    eps = np.finfo(sums).eps
    got = d.view(sums).astype(float)
    np.testing.assert_allclose(got, _held("c", wanted, positions), rtol=0, atol=16 * eps * np.abs(wanted).max())


_LDMATRIX = """
.shared .align 16 .b8 s[512];
.reg .b32 %t, %a, %o, %w, %r0, %r1, %r2, %r3; .reg .b64 %x, %y, %off;
mov.u32 %t, %tid.x; mov.u32 %a, s; ld.param.u64 %x, [x]; ld.param.u64 %y, [y];
mul.wide.u32 %off, %t, 16; add.s64 %x, %x, %off; add.s64 %y, %y, %off;
mad.lo.u32 %a, %t, 16, %a;
ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%x];
st.shared.v4.b32 [%a], {%r0, %r1, %r2, %r3};
bar.warp.sync -1;
LDMATRIX
st.global.v4.b32 [%y], {%r0, %r1, %r2, %r3};
ret;
"""


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed):
    x = rng.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    y = np.zeros((32, 4, 2), np.uint16)
    load = f"ldmatrix.sync.aligned.m8n8.x4{'.trans' if transposed else ''}.shared.b16 {{%r0, %r1, %r2, %r3}}, [%a];"
    run(entry(_LDMATRIX.replace("LDMATRIX", load), [("u64", "x"), ("u64", "y")]), "k", 1, 32, [x, y])
    for lane in range(32):
        for m in range(4):
            for h in range(2):
                row, column = lane // 4, 2 * (lane % 4) + h
                assert y[lane, m, h] == (x[m, column, row] if transposed else x[m, row, column])


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix_undoes_ldmatrix(transposed):
    x, y = rng.integers(0, 2**16, (4, 8, 8)).astype(np.uint16), np.zeros((4, 8, 8), np.uint16)
    trans, four = ".trans" if transposed else "", "{%r0, %r1, %r2, %r3}"
    text = (
        f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {four}, [%a]; bar.warp.sync -1;"
        f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%a], {four}; bar.warp.sync -1;"
        f"ld.shared.v4.b32 {four}, [%a];"
    )
    run(entry(_LDMATRIX.replace("LDMATRIX", text), [("u64", "x"), ("u64", "y")]), "k", 1, 32, [x, y])
    np.testing.assert_array_equal(x, y)


def test_movmatrix():
    x = rng.integers(0, 2**16, (8, 8)).astype(np.uint16)
    y = np.zeros((8, 8), np.uint16)
    body = """
    .reg .b32 %t, %a, %d; .reg .b64 %x, %y, %o;
    mov.u32 %t, %tid.x; ld.param.u64 %x, [x]; ld.param.u64 %y, [y]; mul.wide.u32 %o, %t, 4;
    add.s64 %x, %x, %o; add.s64 %y, %y, %o; ld.global.b32 %a, [%x];
    movmatrix.sync.aligned.m8n8.trans.b16 %d, %a; st.global.b32 [%y], %d; ret;"""
    run(entry(body, [("u64", "x"), ("u64", "y")]), "k", 1, 32, [x, y])
    np.testing.assert_array_equal(x.T, y)


# Descriptors: the canonical layouts of wgmma's shared memory operands ("Shared Memory Matrix Layout")


def _descriptor(begin, leading, stride, mode):
    return begin >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


@pytest.mark.parametrize("mode, width", [(1, 128), (2, 64), (3, 32)])
def test_descriptor_of_a_tile_that_runs_along_k(mode, width):
    """Rows of `width` bytes one under the other, 16-byte chunks permuted within 8 rows."""
    rows, size = 64, 2
    places = element_places(_descriptor(1024, 16, 8 * width, mode), rows, 16, size, transposed=False)
    for r in (0, 1, 7, 8, 63):
        for k in (0, 5, 15):
            linear = 1024 + r * width + k * size
            chunk = linear >> 4 & width // 16 - 1
            turned = chunk ^ (r if width == 128 else r >> 1 if width == 64 else r >> 2) & width // 16 - 1
            assert places[r, k] == linear + 16 * (turned - chunk)
    assert len(np.unique(places)) == rows * 16


def test_descriptor_without_swizzle():
    """Blocks of 8 rows by 16 bytes: the leading offset leads on along k, the stride offset to the next 8 rows."""
    places = element_places(_descriptor(2048, 128, 256, 0), 16, 16, 2, transposed=False)
    assert places[3, 2] == 2048 + 3 * 16 + 4
    assert places[3, 10] == 2048 + 128 + 3 * 16 + 4
    assert places[11, 10] == 2048 + 256 + 128 + 3 * 16 + 4


def test_descriptor_of_a_tile_that_runs_along_rows():
    """Steps of k one under the other, each 64 rows long."""
    places = element_places(_descriptor(1024, 8192, 1024, 1), 64, 16, 2, transposed=True)
    for r in (0, 9, 63):
        for k in (0, 3, 8, 15):
            linear = 1024 + k * 128 + r * 2
            assert places[r, k] == linear ^ (linear >> 7 & 7) << 4


def test_swizzle_is_a_permutation_of_each_block():
    at = np.arange(4096)
    for mode in (1, 2, 3):
        turned = swizzled(at, mode)
        assert sorted(turned) == at.tolist() and (turned // (1 << (7 + mode)) == at // (1 << (7 + mode))).all()
    np.testing.assert_array_equal(swizzled(at, 0), at)


def test_tensor_map_refuses_what_the_driver_refuses():
    a = np.zeros((4, 64), np.float16)
    for steps, message in (((2, 1), "the first 1"), ((1, 9), "1 to 8"), ((1,), "one per axis"), ((1, 2), "1 to 256")):
        with pytest.raises(ValueError, match=message):
            TensorMap(a, (64, 200), steps=steps)
    for box, swizzle, message in (
        ((64,), "none", "one size per axis"),
        ((64, 300), "none", "1 to 256"),
        ((64, 4), "96B", "one of"),
        ((60, 4), "none", "16 bytes"),
        ((128, 4), "128B", "longer than the swizzle"),
    ):
        with pytest.raises(ValueError, match=message):
            TensorMap(a, box, swizzle)
