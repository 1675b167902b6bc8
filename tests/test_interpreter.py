"""The interpreter's parser, memory, control flow and launches, on kernels written in PTX."""

import numpy as np
import pytest
from minires.kernels.interpreter import Fault, parse, prepare, run
from minires.kernels.interpreter.opcodes import TABLE
from minires.kernels.interpreter.ptx import Address, Immediate, Register, Vector
from ptx_harness import HEADER, entry

rng = np.random.default_rng(0)

INDEX = """
    .reg .b32 %t, %c, %n, %i, %v, %w, %a; .reg .b64 %x, %y, %o, %g; .reg .pred %p, %q;
    mov.u32 %t, %tid.x; mov.u32 %c, %ctaid.x; mov.u32 %n, %ntid.x; mad.lo.u32 %i, %c, %n, %t;
    ld.param.u64 %x, [x]; ld.param.u64 %y, [y]; mul.wide.u32 %o, %i, 4; add.s64 %x, %x, %o; add.s64 %y, %y, %o;
"""
XY = [("u64", "x"), ("u64", "y")]


def mapped(body, x, blocks=1, declared="", **settings):
    """y[i] of a kernel that finds &x[i], &y[i], the index %i and registers in INDEX."""
    y = np.zeros_like(x)
    run(entry(f"{INDEX}\n{body}\nret;", XY, declared), "k", blocks, len(x) // blocks, [x, y], **settings)
    return y


# The parser


def test_parse_reads_what_a_compiler_writes():
    module = parse(
        """
.version 9.0
.target sm_80, debug
.address_size 64
.const .align 4 .b8 table[8] = {0, 0, 128, 63, 1, 2, 3, 4};
.global .align 4 .f32 one = 0f3F800000;
.extern .shared .align 16 .b8 dynamic[];
.visible .entry scale(
    .param .u64 .ptr .global .align 4 scale_param_0,
    .param .align 8 .b8 scale_param_1[24]
)
.maxntid 256, 1, 1
{
    .reg .pred  %p<3>;
    .reg .b32   %r<4>;
    .loc 1 7 3
    // a comment
    ld.param.u32    %r1, [scale_param_1+16];
    .loc 1 3 1, function_name $L__info0, inlined_at 1 9 5
    @!%p1 bra   $L__BB0_2;
    { .reg .b32 %r1; mov.b32 %r1, -1; }
    ld.global.nc.v2.u32 {%r2, %r3}, [%r1+-8];
$L__BB0_2:
    ret;
}
    .file   1 "/home/someone/scale.cu"
    .section .debug_str { .b8 1, 2 }
"""
    )
    kernel = module.function("scale")
    assert [(p.name, p.offset, p.size) for p in kernel.parameters] == [
        ("scale_param_0", 0, 8),
        ("scale_param_1", 8, 24),
    ]
    assert module.variables["table"].initial == bytes([0, 0, 128, 63, 1, 2, 3, 4])
    assert module.variables["one"].initial == np.float32(1).tobytes() and module.variables["dynamic"].size == 0
    load, branch, inner, vector, _ = kernel.instructions
    assert load.opcode == "ld" and load.modifiers == ("param", "u32") and load.operands[1].offset == 16
    assert branch.guard is not None and branch.guard[1] and kernel.labels["$L__BB0_2"] == 4
    assert inner.operands[1] == Immediate(-1) and inner.operands[0] != load.operands[0]  # a scope of its own
    assert isinstance(vector.operands[0], Vector) and isinstance(vector.operands[1], Address)
    assert vector.operands[1].offset == -8 and isinstance(vector.operands[1].base, Register)
    assert module.where(load) == "scale.cu:7" and module.where(branch) == "scale.cu:3, inlined at scale.cu:9"
    assert kernel.limits == {"maxntid": (256, 1, 1)} and module.target == "sm_80"
    assert vector.text == "ld.global.nc.v2.u32 {%r2, %r3}, [%r1+-8]"


@pytest.mark.parametrize(
    "body, error, message",
    [
        ("mov.u32 %r, 1; ret;", SyntaxError, "'%r' is not declared"),
        (
            ".reg .b32 %r; frobnicate.b32 %r, 1; ret;",
            NotImplementedError,
            "PTX line .*`frobnicate.b32 %r, 1`.*opcode table",
        ),
        (".reg .b32 %r; shfl.up.b32 %r, %r, 1, 0; ret;", NotImplementedError, "without .sync"),
        (
            ".reg .b32 %r; mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r}, {%r}, {%r}, {%r};",
            NotImplementedError,
            "mma",
        ),
        (".reg .b32 %r; mov.u32 %r, %envreg1; st.shared.u32 [0], %r; ret;", NotImplementedError, "%envreg1"),
        (".reg .b32 %r; cvt.rz.bf16.f32 %r, %r;", NotImplementedError, "another rounding"),
        ("bra NOWHERE;", SyntaxError, "'NOWHERE' is not declared"),
        ("call.uni f;", NotImplementedError, "inline them"),
        ("` ;", SyntaxError, "unexpected '`'"),
    ],
)
def test_what_is_not_known_is_named(body, error, message):
    with pytest.raises(error, match=message):
        run(entry(body, []), "k", 1, 32, [])


def test_every_opcode_of_the_table_is_tested_somewhere():
    """Names of opcodes in the sources of these tests: a new entry of the table comes with a test."""
    from pathlib import Path

    text = "".join(p.read_text() for p in Path(__file__).parent.glob("test_interpreter*.py"))
    hints = {"prefetch", "prefetchu", "discard", "applypriority", "nanosleep", "griddepcontrol", "setmaxnreg"}
    untested = [name for name in TABLE if name not in hints and f"{name}." not in text and f"{name};" not in text]
    assert not untested, untested


# Memory


def test_spaces():
    """Constant, local, shared, parameter and generic addresses all name what they say."""
    x = rng.integers(0, 100, 32).astype(np.uint32)
    body = """
    .local .align 4 .b8 depot[16]; .shared .align 4 .b8 s[128]; .reg .b64 %l, %d;
    mov.u64 %l, depot; cvta.local.u64 %g, %l; add.s64 %g, %g, 8;
    ld.global.u32 %v, [%x]; st.u32 [%g], %v; ld.local.u32 %w, [%l+8];
    mul.wide.u32 %o, %t, 4; mov.u64 %d, s; add.s64 %d, %d, %o; cvta.shared.u64 %g, %d;
    st.u32 [%g], %w; cvta.to.shared.u64 %g, %g; cvt.u32.u64 %a, %g; ld.shared.u32 %w, [%a];
    and.b32 %v, %t, 3; mul.wide.u32 %o, %v, 4; mov.u64 %d, table; add.s64 %d, %d, %o; ld.const.u32 %v, [%d];
    add.u32 %w, %w, %v; st.global.u32 [%y], %w;"""
    got = mapped(body, x, declared=".const .align 4 .u32 table[4] = {10, 20, 30, 40};")
    assert got.tolist() == [int(v) + 10 * (i % 4 + 1) for i, v in enumerate(x)]


def test_vectors_and_small_types():
    x = rng.integers(0, 2**32, 32, np.uint32)
    body = """
    .reg .b16 %h<4>; ld.global.v4.u8 {%h0, %h1, %h2, %h3}, [%x]; st.global.v2.u8 [%y], {%h3, %h2};
    ld.global.s8 %v, [%x+1]; st.global.u16 [%y+2], %v;"""
    got = mapped(body.replace("st.global.u16 [%y+2], %v;", "cvt.u16.u32 %h0, %v; st.global.u16 [%y+2], %h0;"), x)
    parts = x.view(np.uint8).reshape(-1, 4)
    wanted = np.zeros((32, 4), np.uint8)
    wanted[:, 0], wanted[:, 1] = parts[:, 3], parts[:, 2]
    wanted.view(np.uint16)[:, 1] = parts[:, 1].view(np.int8).astype(np.int16).view(np.uint16)
    np.testing.assert_array_equal(got.view(np.uint8).reshape(-1, 4), wanted)


def test_arguments_by_value_and_views_of_one_array():
    """A struct by value; two arguments that are parts of one array share its memory."""
    base = np.arange(64, dtype=np.float32)
    body = """
    .reg .b32 %t; .reg .f32 %f, %g; .reg .b64 %x, %y, %o; mov.u32 %t, %tid.x; mul.wide.u32 %o, %t, 4;
    ld.param.u64 %x, [x]; ld.param.u64 %y, [y]; add.s64 %x, %x, %o; add.s64 %y, %y, %o;
    ld.param.f32 %g, [z+8]; ld.global.f32 %f, [%x]; mul.f32 %f, %f, %g; st.global.f32 [%y], %f; ret;"""
    text = entry(body, [("u64", "x"), ("u64", "y"), ("align 8 .b8", "z[16]")])
    struct = np.array((1, 2.5), "i8,f4")
    run(text, "k", 1, 32, [base[:32], base[32:], struct.tobytes() + bytes(4)])
    np.testing.assert_array_equal(base[32:], 2.5 * np.arange(32))
    whole = np.arange(64, dtype=np.float32)
    run(text, "k", 1, 32, [whole, whole[32:], struct.tobytes() + bytes(4)])
    np.testing.assert_array_equal(whole[32:], 2.5 * np.arange(32))


@pytest.mark.parametrize(
    "args, error, message",
    [
        (lambda x: [x], TypeError, "2 parameters, and 1"),
        (lambda x: [x, 3.0], TypeError, "argument 1 is 3.0"),
        (lambda x: [x, np.int32(3)], TypeError, "has 4 bytes; the kernel takes 8"),
        (lambda x: [x, np.zeros((4, 4))[:, ::2]], ValueError, "not C-contiguous"),
        (lambda x: [x[:20], x[10:]], ValueError, "overlap"),
    ],
)
def test_arguments_that_do_not_fit(args, error, message):
    with pytest.raises(error, match=message):
        run(entry("ret;", XY), "k", 1, 32, args(np.zeros(32, np.float32)))


def test_launches_that_do_not_fit():
    text = entry("ret;", [])
    for grid, block, message in (
        (1, 2048, "1,024 is the most"),
        (0, 32, "at least 1"),
        ((1, 1, 1, 1), 32, "one to three"),
    ):
        with pytest.raises(ValueError, match=message):
            run(text, "k", grid, block, [])
    with pytest.raises(ValueError, match="blocks of 64 threads"):
        run(text.replace("()", "() .maxntid 64"), "k", 1, 128, [])
    with pytest.raises(KeyError, match="no kernel 'other'; it has k"):
        prepare(text, "other")


def test_a_read_only_array_is_not_written():
    x = np.zeros(32, np.uint32)
    y = np.zeros(32, np.uint32)
    y.flags.writeable = False
    with pytest.raises(ValueError, match="writes into argument 1, which is a read-only array"):
        run(entry(INDEX + "st.global.u32 [%y], %i; ret;", XY), "k", 1, 32, [x, y])


ATOMICS = {
    "add": (lambda old, v: old + v, "u32"),
    "min": (min, "s32"),
    "max": (max, "u32"),
    "and": (lambda old, v: old & v, "b32"),
    "or": (lambda old, v: old | v, "b32"),
    "xor": (lambda old, v: old ^ v, "b32"),
    "exch": (lambda old, v: v, "b32"),
    "inc": (lambda old, v: 0 if old >= v else old + 1, "u32"),
    "dec": (lambda old, v: v if old == 0 or old > v else old - 1, "u32"),
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("op", ATOMICS)
def test_atom(op, space):
    """Lanes take their turns; each finds what the one before it left."""
    fn, kind = ATOMICS[op]
    x = rng.integers(0, 30, 32).astype(np.uint32)
    start = int(x[0])
    place = "[s]" if space == "shared" else "[%g]"
    body = f"""
    .shared .align 4 .b8 s[4]; ld.global.u32 %v, [%x]; ld.param.u64 %g, [x]; setp.eq.u32 %p, %t, 0;
    @%p st.shared.u32 [s], %v; bar.sync 0; atom.{space}.{op}.{kind} %w, {place}, %v; st.global.u32 [%y], %w;"""
    x_after = x.copy()
    got, left = mapped(body.replace("ld.global.u32 %v", "ld.relaxed.global.u32 %v"), x_after), start
    for i in range(32):
        assert got[i] == left
        left = fn(left, int(x[i])) & 0xFFFFFFFF
    assert space == "shared" or x_after[0] == left


def test_compare_and_swap_and_reductions_without_a_result():
    x = np.zeros(64, np.uint32)
    body = """
    ld.param.u64 %g, [x]; atom.global.cas.b32 %w, [%g], %t, 7; red.global.add.u32 [%g+4], 3; fence.acq_rel.gpu;
    membar.gl; st.global.u32 [%y], %w;"""
    got = mapped(body, x)
    assert got.tolist() == [0] + [7] * 63 and x[:2].tolist() == [7, 192]
    f = np.zeros(1, np.float32)
    run(entry(".reg .b64 %x; ld.param.u64 %x, [x]; red.global.add.f32 [%x], 0f3F000000; ret;", XY[:1]), "k", 4, 64, [f])
    assert f[0] == 128


# Threads, warps, blocks


def test_places_of_threads_in_three_dimensions():
    text = entry(
        """
    .reg .b32 %r<14>; .reg .b64 %y, %o; ld.param.u64 %y, [y];
    mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z; mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ctaid.y;
    mov.u32 %r5, %ntid.x; mov.u32 %r6, %ntid.y; mov.u32 %r7, %nctaid.x; mov.u32 %r13, %ctaid.z;
    mad.lo.u32 %r8, %r2, %r6, %r1; mad.lo.u32 %r8, %r8, %r5, %r0; mad.lo.u32 %r9, %r4, %r7, %r3;
    mad.lo.u32 %r9, %r13, 6, %r9; mad.lo.u32 %r10, %r9, 24, %r8; mul.wide.u32 %o, %r10, 4; add.s64 %y, %y, %o;
    mov.u32 %r11, %laneid; mov.u32 %r12, %warpid; mad.lo.u32 %r11, %r12, 32, %r11; st.global.u32 [%y], %r11; ret;""",
        [("u64", "y")],
    )
    y = np.full((2, 2, 3, 24), 99, np.uint32)
    run(text, "k", (3, 2, 2), (4, 3, 2), [y], lanes=50)  # two blocks at once
    assert (y == np.arange(24)).all()


@pytest.mark.parametrize("seed", [None, 3])
def test_lanes_part_and_meet_again(seed):
    """Collatz: every lane takes its own number of turns, and all are together afterwards (the vote needs all)."""
    x = np.arange(1, 65, dtype=np.uint32)
    body = """
    ld.global.u32 %v, [%x]; mov.u32 %w, 0;
    LOOP: setp.eq.u32 %p, %v, 1; @%p bra DONE;
    add.u32 %w, %w, 1; and.b32 %c, %v, 1; setp.eq.u32 %q, %c, 0; @%q bra EVEN;
    mad.lo.u32 %v, %v, 3, 1; bra.uni LOOP;
    EVEN: shr.u32 %v, %v, 1; bra LOOP;
    DONE: vote.sync.ballot.b32 %c, %p, -1; popc.b32 %c, %c; mad.lo.u32 %w, %c, 1000, %w; st.global.u32 [%y], %w;"""

    def turns(n):
        return 0 if n == 1 else 1 + turns(3 * n + 1 if n % 2 else n // 2)

    assert mapped(body, x, seed=seed).tolist() == [32000 + turns(int(n)) for n in x]


def test_who_is_active_and_who_leads():
    x = np.zeros(64, np.uint32)
    body = """
    setp.lt.u32 %p, %t, 40; @!%p bra OUT; activemask.b32 %v; elect.sync %w|%q, %v; selp.u32 %w, 1, 0, %q;
    mad.lo.u32 %w, %w, 1000, %v; st.global.u32 [%y], %w; OUT:"""
    got = mapped(body, x)
    assert got[0] == (0xFFFFFFFF + 1000) % 2**32 and (got[1:32] == 0xFFFFFFFF).all()
    assert got[32] == 255 + 1000 and (got[33:40] == 255).all() and not got[40:].any()


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_named_barriers(seed):
    """Warp 0 hands numbers to warp 1 alone, through barrier 1; warps 2 and 3 take no part and do not wait."""
    x = rng.integers(0, 99, 128).astype(np.uint32)
    body = """
    .shared .align 4 .b8 s[128]; mov.u32 %a, s; and.b32 %v, %t, 31; mad.lo.u32 %a, %v, 4, %a; ld.global.u32 %v, [%x];
    setp.ge.u32 %p, %t, 64; @%p bra OUT; setp.ge.u32 %q, %t, 32; @%q bra TAKE;
    st.shared.u32 [%a], %v; bar.arrive 1, 64; bra OUT;
    TAKE: barrier.sync 1, 64; ld.shared.u32 %v, [%a];
    OUT: st.global.u32 [%y], %v;"""
    assert mapped(body, x, seed=seed).tolist() == [*x[:32], *x[:32], *x[64:]]
    with pytest.raises(Fault) as caught:
        mapped(body.replace("barrier.sync 1, 64; ", "").replace("bar.arrive 1, 64; ", ""), x, seed=seed)
    assert caught.value.kind in ("race", "uninitialised")


def test_exited_threads_do_not_hold_up_a_barrier():
    x = np.arange(64, dtype=np.uint32)
    body = "setp.gt.u32 %p, %t, 50; @%p bra OUT; bar.sync 0; st.global.u32 [%y], %t; bra OUT; OUT:"
    assert mapped(body, x).tolist() == [i if i <= 50 else 0 for i in range(64)]
    assert mapped(body.replace("@%p bra OUT;", "@%p exit;"), x).tolist() == [i if i <= 50 else 0 for i in range(64)]


def test_a_kernel_that_does_not_end():
    with pytest.raises(Fault, match="deadlock: the kernel still runs after 1,000 instructions, in `bra HERE`"):
        run(entry("HERE: bra HERE;", []), "k", 1, 32, [], limit=1000)


def test_trap():
    with pytest.raises(Fault, match=r"thread \(5, 0, 0\).*it traps"):
        mapped("setp.eq.u32 %p, %t, 5; @%p trap;", np.zeros(32, np.uint32))


def test_dynamic_shared_memory_has_the_size_of_the_launch():
    text = entry(
        ".reg .b32 %t, %a; mov.u32 %t, %tid.x; mov.u32 %a, d; mad.lo.u32 %a, %t, 4, %a; st.shared.u32 [%a], %t; ret;",
        [],
        ".extern .shared .align 16 .b8 d[];",
    )
    run(text, "k", 1, 64, [], 256)
    with pytest.raises(Fault, match="byte 252 of shared memory, and 4 bytes from there; the block has 252"):
        run(text, "k", 1, 64, [], 252)


def test_many_blocks_run_in_several_waves():
    x = rng.integers(0, 2**32, 40 * 32, np.uint32)
    report = run(
        entry(INDEX + "ld.global.u32 %v, [%x]; st.global.u32 [%y], %v; ret;", XY), "k", 40, 32, [x, x.copy()], lanes=100
    )
    assert report.counts.lanes == 12 * x.size and "thread instructions" in str(report)


def test_half_a_module_header():
    assert parse(HEADER).functions == {}


# A struct of addresses: one launch for many arrays

_TABLE = entry(
    """
    .reg .b32 %t, %b, %v; .reg .b64 %at, %from, %to; .reg .pred %some;
    mov.u32 %t, %tid.x; mov.u32 %b, %ctaid.x;
    setp.ge.u32 %some, %t, 20; @%some bra done;
    mul.wide.u32 %at, %b, 8; mov.b64 %from, table; add.s64 %at, %from, %at;
    ld.param.u64 %from, [%at]; ld.param.u64 %to, [%at+24];
    mul.wide.u32 %at, %t, 4; add.s64 %from, %from, %at; add.s64 %to, %to, %at;
    ld.global.u32 %v, [%from]; add.u32 %v, %v, 1; st.global.u32 [%to], %v;
    done: ret;
    """,
    [("align 8 .b8", "table[48]")],
)


def test_a_tuple_of_arrays_is_a_struct_of_their_addresses():
    """Each block reads and writes arrays of its own, with a part of its threads."""
    sources, results = (
        [np.arange(20, dtype=np.uint32) * i for i in range(3)],
        [np.zeros(20, np.uint32) for _ in range(3)],
    )
    for seed in (None, 0, 1):
        run(_TABLE, "k", 3, 32, [(*sources, *results)], seed=seed)
        for x, y in zip(sources, results, strict=True):
            assert np.array_equal(y, x + 1)
            y[:] = 0


def test_an_address_that_is_none_is_no_array():
    with pytest.raises(Fault) as caught:
        run(_TABLE, "k", 3, 32, [(*[np.ones(20, np.uint32)] * 3, None, None, None)])
    assert caught.value.kind == "out of bounds"
