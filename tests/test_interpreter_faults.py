"""What the interpreter must catch: kernels that are right, and the same with one thing wrong, each named."""

import ml_dtypes
import numpy as np
import pytest
from minires.kernels.interpreter import KINDS, Fault, run
from minires.kernels.interpreter.tensor_map import TensorMap
from ptx_harness import entry

rng = np.random.default_rng(0)
SCHEDULES = [None, 0, 1, 2]

# 64 threads hand their numbers round a block: y[i] = x[(i + 40) % 64], through shared memory.

ROTATE = entry(
    """
    .shared .align 16 .b8 s[256];
    .reg .b32 %t, %a, %b, %i, %v; .reg .b64 %x, %y, %o; .reg .pred %p;
    ld.param.u64 %x, [x]; ld.param.u64 %y, [y];
    mov.u32 %t, %tid.x; mul.wide.u32 %o, %t, 4; add.s64 %x, %x, %o; add.s64 %y, %y, %o;
    mov.u32 %b, s; mad.lo.u32 %a, %t, 4, %b; setp.lt.u32 %p, %t, 16;
    mov.u32 %v, 0; st.shared.u32 [%a], %v; bar.sync 0;
    ld.global.u32 %v, [%x];
    st.shared.u32 [%a], %v;
    bar.sync 0;
    add.s32 %i, %t, 40; and.b32 %i, %i, 63; mad.lo.u32 %a, %i, 4, %b;
    ld.shared.u32 %v, [%a];
    st.global.u32 [%y], %v;
    bar.sync 0;
    ret;""",
    [("u64", "x"), ("u64", "y")],
)

# The same from global memory straight into shared memory, by an asynchronous copy.

COPY = ROTATE.replace(
    "ld.global.u32 %v, [%x];\n    st.shared.u32 [%a], %v;",
    "cp.async.ca.shared.global [%a], [%x], 4; cp.async.commit_group; cp.async.wait_group 0;",
)
assert "cp.async" in COPY


def rotate(text, seed, n=64):
    x, y = rng.integers(0, 2**32, n, np.uint32), np.zeros(64, np.uint32)
    run(text, "k", 1, 64, [x, y], seed=seed)
    return np.array_equal(y, np.roll(x, -40))


# Sums over the lanes of a warp through shared memory, ordered by bar.warp.sync.

WARP = entry(
    """
    .shared .align 4 .b8 s[128];
    .reg .b32 %t, %a, %b, %v; .reg .b64 %y, %o;
    mov.u32 %t, %tid.x; mov.u32 %b, s; mad.lo.u32 %a, %t, 4, %b;
    st.shared.u32 [%a], %t;
    bar.warp.sync -1;
    xor.b32 %v, %t, 1; mad.lo.u32 %a, %v, 4, %b; ld.shared.u32 %v, [%a];
    ld.param.u64 %y, [y]; mul.wide.u32 %o, %t, 4; add.s64 %y, %y, %o; st.global.u32 [%y], %v; ret;""",
    [("u64", "y")],
)


def warp(text, seed):
    y = np.zeros(32, np.uint32)
    run(text, "k", 1, 32, [y], seed=seed)
    return y.tolist() == [i ^ 1 for i in range(32)]


# Two blocks write a row each of y.

BLOCKS = entry(
    """
    .reg .b32 %t, %c, %n, %i, %v; .reg .b64 %y, %o;
    mov.u32 %t, %tid.x; mov.u32 %c, %ctaid.x; mov.u32 %n, 32;
    mad.lo.u32 %i, %c, %n, %t;
    ld.param.u64 %y, [y]; mul.wide.u32 %o, %i, 4; add.s64 %y, %y, %o;
    st.global.u32 [%y], %i; ret;""",
    [("u64", "y")],
)


def blocks(text, seed):
    y = np.zeros(96, np.uint32)
    run(text, "k", 2, 32, [y], seed=seed)
    return y[:64].tolist() == list(range(64))


# Each of two blocks leaves 32 numbers; the one that comes last adds them up.

LAST = entry(
    """
    .shared .align 4 .b8 s[4];
    .reg .b32 %t, %c, %i, %v, %w; .reg .b64 %x, %y, %o, %n; .reg .pred %p;
    ld.param.u64 %x, [x]; ld.param.u64 %y, [y]; ld.param.u64 %n, [n];
    mov.u32 %t, %tid.x; mov.u32 %c, %ctaid.x; mad.lo.u32 %i, %c, 32, %t; mul.wide.u32 %o, %i, 4; add.s64 %o, %x, %o;
    st.global.u32 [%o], %i;
    membar.gl;
    bar.sync 0;
    setp.eq.u32 %p, %t, 0;
    @%p atom.global.add.u32 %v, [%n], 1;
    @%p st.shared.u32 [s], %v;
    bar.sync 0;
    ld.shared.u32 %v, [s]; setp.ne.u32 %p, %v, 1; @%p bra END;
    mul.wide.u32 %o, %t, 4; add.s64 %x, %x, %o; add.s64 %y, %y, %o;
    ld.global.u32 %v, [%x]; ld.global.u32 %w, [%x+128]; add.u32 %v, %v, %w; st.global.u32 [%y], %v;
END:
    ret;""",
    [("u64", "x"), ("u64", "y"), ("u64", "n")],
)


def last(text, seed):
    y = np.zeros(32, np.uint32)
    run(text, "k", 2, 32, [np.zeros(64, np.uint32), y, np.zeros(1, np.uint32)], seed=seed)
    return y.tolist() == [2 * i + 32 for i in range(32)]


# D = A B^T for A (64 x 256) and B (8 x 256): a producer fills two stages by TMA, a warpgroup multiplies (wgmma), and an
# mbarrier each says when a stage is full and when it is empty again.

_MULTIPLY = "\n".join(
    f"""
    add.s64 %da, %a0, {2 * k}; add.s64 %db, %b0, {2 * k}; setp.ne.u32 %p, %it, {0 if k == 0 else 99};
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%d0, %d1, %d2, %d3}}, %da, %db, %p, 1, 1, 0, 0;"""
    for k in range(4)
)
PIPELINE = entry(
    f"""
    .shared .align 1024 .b8 s[18464];
    .reg .b32 %t, %s, %it, %n, %st, %ph, %one, %fu, %em, %at, %c, %l, %row, %col; .reg .b32 %d0, %d1, %d2, %d3;
    .reg .b64 %y, %o, %a0, %b0, %da, %db, %w, %ma, %mb; .reg .pred %p, %q;
    mov.u32 %t, %tid.x; mov.u32 %s, s; ld.param.u32 %n, [n]; mov.u32 %it, 0; setp.eq.u32 %p, %t, 0;
    @%p mbarrier.init.shared::cta.b64 [%s+18432], 1;
    @%p mbarrier.init.shared::cta.b64 [%s+18440], 1;
    @%p mbarrier.init.shared::cta.b64 [%s+18448], 1;
    @%p mbarrier.init.shared::cta.b64 [%s+18456], 1;
    bar.sync 0;
    setp.ge.u32 %q, %t, 128; @%q bra CONSUMER;
    setp.ne.u32 %q, %t, 0; @%q bra END;
    mov.b64 %ma, a; mov.b64 %mb, b; cvta.param.u64 %ma, %ma; cvta.param.u64 %mb, %mb;
PRODUCER:
    setp.ge.u32 %q, %it, %n; @%q bra END;
    and.b32 %st, %it, 1; shr.u32 %ph, %it, 1; and.b32 %ph, %ph, 1; xor.b32 %one, %ph, 1;
    mad.lo.u32 %fu, %st, 8, %s; add.u32 %em, %fu, 18448; add.u32 %fu, %fu, 18432;
EMPTY:
    mbarrier.try_wait.parity.shared::cta.b64 %q, [%em], %one;
    @!%q bra EMPTY;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%fu], 9216;
    shl.b32 %c, %it, 6; mad.lo.u32 %at, %st, 8192, %s;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%at], [%ma, {{%c, 0}}], [%fu];
    mad.lo.u32 %at, %st, 1024, %s; add.u32 %at, %at, 16384;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%at], [%mb, {{%c, 0}}], [%fu];
    add.u32 %it, %it, 1; bra PRODUCER;
CONSUMER:
    setp.ge.u32 %q, %it, %n; @%q bra STORE;
    and.b32 %st, %it, 1; shr.u32 %ph, %it, 1; and.b32 %ph, %ph, 1;
    mad.lo.u32 %fu, %st, 8, %s; add.u32 %em, %fu, 18448; add.u32 %fu, %fu, 18432;
FULL:
    mbarrier.try_wait.parity.shared::cta.b64 %q, [%fu], %ph;
    @!%q bra FULL;
    mad.lo.u32 %at, %st, 8192, %s; shr.u32 %at, %at, 4; cvt.u64.u32 %a0, %at;
    mad.lo.u32 %at, %st, 1024, %s; add.u32 %at, %at, 16384; shr.u32 %at, %at, 4; cvt.u64.u32 %b0, %at;
    mov.b64 %w, 0x4000004000010000; or.b64 %a0, %a0, %w; or.b64 %b0, %b0, %w;
    wgmma.fence.sync.aligned; {_MULTIPLY}
    wgmma.commit_group.sync.aligned;
    setp.eq.u32 %p, %t, 128;
    wgmma.wait_group.sync.aligned 0;
    @%p mbarrier.arrive.shared::cta.b64 _, [%em];
    add.u32 %it, %it, 1; bra CONSUMER;
STORE:
    ld.param.u64 %y, [y]; sub.u32 %t, %t, 128; and.b32 %l, %t, 31; shr.u32 %row, %t, 5;
    shl.b32 %row, %row, 4; shr.u32 %c, %l, 2; add.u32 %row, %row, %c; and.b32 %col, %l, 3; shl.b32 %col, %col, 1;
    mad.lo.u32 %row, %row, 8, %col; mul.wide.u32 %o, %row, 4; add.s64 %y, %y, %o;
    st.global.v2.b32 [%y], {{%d0, %d1}}; st.global.v2.b32 [%y+256], {{%d2, %d3}};
END:
    ret;""",
    [("align 64 .b8", "a[128]"), ("align 64 .b8", "b[128]"), ("u64", "y"), ("u32", "n")],
)
_WAIT, _RELEASE = "wgmma.wait_group.sync.aligned 0;", "@%p mbarrier.arrive.shared::cta.b64 _, [%em];"


def pipeline(text, seed, tiles=5):
    a, b = (rng.standard_normal((rows, 64 * tiles)).astype(ml_dtypes.bfloat16) for rows in (64, 8))
    y = np.full((64, 8), np.nan, np.float32)
    args = [TensorMap(a, (64, 64)), TensorMap(b, (64, 8)), y, np.uint32(tiles)]
    run(text, "k", 1, 256, args, seed=seed)
    wanted = a.astype(float) @ b.astype(float).T
    return bool(np.abs(y - wanted).max() <= 1e-4 * np.abs(wanted).max())


# A warpgroup fills shared memory with ones (bf16) by ordinary stores, and multiplies 64 x 64 by 64 x 8.

STORED = entry(
    f"""
    .shared .align 1024 .b8 s[9216];
    .reg .b32 %t, %s, %at, %it, %d0, %d1, %d2, %d3; .reg .b64 %y, %o, %a0, %b0, %da, %db, %w; .reg .pred %p;
    mov.u32 %t, %tid.x; mov.u32 %s, s; mad.lo.u32 %at, %t, 72, %s; mov.u32 %it, 0;
FILL:
    st.shared.b32 [%at], 0x3F803F80; add.u32 %at, %at, 4; add.u32 %it, %it, 1; setp.lt.u32 %p, %it, 18;
    @%p bra FILL;
    fence.proxy.async;
    bar.sync 0;
    mov.u32 %it, 0; shr.u32 %at, %s, 4; cvt.u64.u32 %a0, %at; add.u64 %b0, %a0, 512;
    mov.b64 %w, 0x4000004000010000; or.b64 %a0, %a0, %w; or.b64 %b0, %b0, %w;
    wgmma.fence.sync.aligned; {_MULTIPLY}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    ld.param.u64 %y, [y]; mul.wide.u32 %o, %t, 16; add.s64 %y, %y, %o;
    st.global.v4.b32 [%y], {{%d0, %d1, %d2, %d3}}; ret;""",
    [("u64", "y")],
)


def stored(text, seed):
    y = np.zeros((128, 4), np.float32)
    run(text, "k", 1, 128, [y], seed=seed)
    return bool((y == 64).all())


RIGHT = {"rotate": (rotate, ROTATE), "copy": (rotate, COPY), "warp": (warp, WARP), "blocks": (blocks, BLOCKS)}
RIGHT |= {"pipeline": (pipeline, PIPELINE), "stored": (stored, STORED), "last": (last, LAST)}


@pytest.mark.parametrize("seed", SCHEDULES)
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_pass_under_every_schedule(name, seed):
    check, text = RIGHT[name]
    assert check(text, seed)


FAULTS = [
    # what was done, to which kernel, by replacing what with what, the kind of fault
    ("a missing barrier", "rotate", "bar.sync 0;\n    add", "add", "race"),
    (
        "a missing barrier before memory is used again",
        "rotate",
        "bar.sync 0;\n    ret;",
        "mad.lo.u32 %a, %t, 4, %b; st.shared.u32 [%a], %t; ret;",
        "race",
    ),
    ("a divergent barrier", "rotate", "bar.sync 0;\n    ret;", "@%p bar.sync 0; bar.sync 0; ret;", "divergent"),
    (
        "shared memory that nobody wrote",
        "rotate",
        "st.shared.u32 [%a], %v; bar.sync 0;\n    ld.global.u32 %v, [%x];\n    st.shared.u32 [%a], %v;",
        "",
        "uninitialised",
    ),
    ("an index past the end of shared memory", "rotate", "and.b32 %i, %i, 63;", "", "out of bounds"),
    (
        "a vector load at an odd place",
        "rotate",
        "ld.shared.u32 %v, [%a]",
        "ld.shared.v2.u32 {%v, %i}, [%a]",
        "misaligned",
    ),
    (
        "a vector load at an odd place of global memory",
        "rotate",
        "ld.global.u32 %v",
        "ld.global.v2.u32 {%v, %i}",
        "misaligned",
    ),
    ("a null pointer", "rotate", "ld.param.u64 %x, [x];", "mov.u64 %x, 0;", "out of bounds"),
    ("an array read as constant and written", "rotate", "[%y], %v;", "[%x], %v; ld.global.nc.u32 %v, [%x];", "race"),
    ("a copy read before it was waited for", "copy", "wait_group 0", "wait_group 1", "in flight"),
    ("a copy never committed", "copy", "cp.async.commit_group;", "", "in flight"),
    ("a copy read by others without a barrier", "copy", "bar.sync 0;\n    add", "add", "race|in flight"),
    ("a missing barrier within a warp", "warp", "bar.warp.sync -1;", "", "race"),
    ("two blocks that write the same numbers", "blocks", "mov.u32 %n, 32;", "mov.u32 %n, 16;", "race"),
    ("a block that reads what another writes", "blocks", "ret;", "ld.global.u32 %v, [%y+64]; ret;", "race"),
    ("a counter without a fence before it", "last", "membar.gl;", "", "race"),
    ("a sum before the counter says so", "last", "@%p bra END;", "", "race"),
    ("an early stage release", "pipeline", f"{_WAIT}\n    {_RELEASE}", f"{_RELEASE}\n    {_WAIT}", "race"),
    ("stores that the tensor core may not see", "stored", "fence.proxy.async;", "", "race"),
    ("stores that it may not see yet", "stored", "bar.sync 0;", "", "race|uninitialised"),
    ("products that are never waited for", "pipeline", _WAIT, "", "race"),
    (
        "accumulators read before the wait",
        "pipeline",
        "commit_group.sync.aligned;",
        "commit_group.sync.aligned; add.f32 %d0, %d0, %d0;",
        "in flight",
    ),
    ("a descriptor of another swizzle", "pipeline", "0x4000004000010000", "0x8000004000010000", "bad descriptor"),
    ("a descriptor that leads out of memory", "pipeline", "0x4000004000010000", "0x4000104000010000", "bad descriptor"),
    ("mbarriers used before they are initialised", "pipeline", "bar.sync 0;", "", "race|uninitialised"),
    ("a stage that nobody releases", "pipeline", _RELEASE, "", "deadlock"),
    ("a promise of too many bytes", "pipeline", "9216", "9232", "deadlock"),
    ("a destination that the swizzle does not allow", "pipeline", "[%at], [%ma", "[%at+16], [%ma", "misaligned"),
]


@pytest.mark.parametrize("seed", SCHEDULES)
@pytest.mark.parametrize("what, name, old, new, kind", FAULTS, ids=[f[0] for f in FAULTS])
def test_planted_fault_is_caught_under_every_schedule(what, name, old, new, kind, seed):
    check, text = RIGHT[name]
    assert old in text
    body, _, rest = text.partition(old)
    with pytest.raises(Fault) as caught:
        check(body + new + rest, seed)
    assert caught.value.kind in kind.split("|"), caught.value
    assert "PTX line" in str(caught.value)


WRONG_VALUES = [
    ("a swapped operand", "pipeline", "%da, %db, %p", "%db, %da, %p"),
    ("a sum that is not started afresh", "pipeline", "setp.ne.u32 %p, %it, 0;", "setp.ne.u32 %p, %it, 99;"),
    ("a descriptor one step of k too far", "pipeline", "add.s64 %db, %b0, 2;", "add.s64 %db, %b0, 4;"),
    ("a neighbour's number", "rotate", "add.s32 %i, %t, 40;", "add.s32 %i, %t, 41;"),
]


@pytest.mark.parametrize("what, name, old, new", WRONG_VALUES, ids=[w[0] for w in WRONG_VALUES])
def test_wrong_operands_give_wrong_values_or_a_fault(what, name, old, new):
    """What breaks no rule is caught by comparison with the definition."""
    check, text = RIGHT[name]
    assert old in text
    try:
        assert not check(text.replace(old, new), None)
    except Fault as fault:
        assert fault.kind in ("bad descriptor", "in flight", "uninitialised", "race")


def test_every_kind_of_fault_is_planted():
    assert {f[4] for f in FAULTS if "|" not in f[4]} | {"bad use"} == set(KINDS)


def test_a_message_names_thread_array_and_place():
    with pytest.raises(
        Fault, match=r"thread \(63, 0, 0\) of block \(0, 0, 0\): it reads 4 bytes at byte 252 of the input"
    ):
        run(ROTATE, "k", 1, 64, [np.zeros(63, np.uint32), np.zeros(64, np.uint32)], names=("the input", "the output"))


def test_a_value_from_a_lane_that_is_not_there():
    text = entry(
        """.reg .b32 %t, %v; .reg .pred %p; mov.u32 %t, %tid.x; setp.gt.u32 %p, %t, 20; @%p bra END;
        shfl.sync.down.b32 %v, %t, 1, 31, 0x1FFFFF;
        END: ret;""",
        [],
    )
    with pytest.raises(Fault, match="lane 21, which is not there"):
        run(text, "k", 1, 32, [])
