"""The last rungs of the convolution's ladder with one thing wrong in their source: the interpreter must catch it, or
the check of what comes out."""

from pathlib import Path

import minires.kernels  # noqa: F401  (registers)
import numpy as np
import pytest
from minires.kernels import registry
from minires.kernels.checking import Trial, Wrong
from minires.kernels.cuda import compile as compiler
from minires.kernels.cuda.launch import Launch, by_value, executed_by, is_array
from minires.kernels.cuda.tensor_map import TensorMap
from minires.kernels.interpreter import Fault, run
from needs import nvrtc

nvrtc()

FAULTS = [
    # what is wrong, problem and case, the text that is changed and what is put there, what is to be seen
    (
        "no barrier before the product",
        "conv2d_norm_act_fprop 3x3_stride2",
        "__syncthreads();  // this tile has arrived",
        "//",
        "race|uninitialised",
    ),
    (
        "pieces changed before they are there",
        "conv2d_norm_act_fprop 3x3_stride2",
        "cp.async.wait_group",
        "// cp.async.wait_group",
        "in flight|uninitialised",
    ),
    (
        "the padding is normalised, too",
        "conv2d_norm_act_fprop 3x3_3_channels",
        "if (!(copied[0] >> i & 1)) continue;",
        "",
        "wrong value",
    ),
    (
        "the newest tile's channel for the oldest tile",
        "conv2d_norm_act_fprop several_tiles",
        "channel[STAGES - 2] = l.channel();",
        "channel[0] = l.channel();",
        "wrong value",
    ),
    (
        "rows beyond the last pixel are counted",
        "conv2d_norm_act_fprop 3x3_stride2",
        "if (row_of(i, half) >= rows) return;",
        "",
        "wrong value",
    ),
    (
        "sums of columns without a barrier",
        "conv2d_norm_act_dgrad 3x3_stride2",
        "  __syncthreads();\n  for (int i = threadIdx.x; i < COUNT * BN",
        "  for (int i = threadIdx.x; i < COUNT * BN",
        "race|uninitialised",
    ),
    (
        "operands swapped",
        "conv2d_norm_act_dgrad 3x3_stride2",
        "u = fmaf(slope[v], wide(p2.v[v]), u)",
        "u = fmaf(slope[v], wide(p.v[v]), fmaf(scale[v], wide(p2.v[v]), shift[v]))",
        "wrong value",
    ),
    (
        "the mask's sign",
        "conv2d_norm_act_dgrad 1x1",
        "shift[c + odd]) > 0",
        "shift[c + odd]) < 0",
        "wrong value",
    ),
    (
        "ReLU is forgotten",
        "conv2d_norm_act_wgrad 3x3_3_channels",
        "COUNT == 1 && u <= 0 ?",
        "COUNT == 3 ?",
        "wrong value",
    ),
    (
        "the sum over tiles without a barrier",
        "conv2d_norm_act_fprop 1x1",
        "    __syncthreads();\n    if (threadIdx.y < half)",
        "    if (threadIdx.y < half)",
        "race",
    ),
    (
        "a stage released while it is read",
        "conv2d_fprop/fprop_wgmma 3x3_many_channels",
        "products_done<1>();",
        "products_done<2>();",
        "race|in flight",
    ),
    (
        "a stage read before it is full",
        "conv2d_fprop/fprop_wgmma vectors",
        "wait_for(full + s, step / STAGES & 1);",
        "",
        "race|in flight|uninitialised",
    ),
    (
        "fewer bytes expected than come",
        "conv2d_fprop/fprop_wgmma vectors",
        "arrive_and_expect(full + s, STAGE)",
        "arrive_and_expect(full + s, A_BYTES)",
        "race|in flight|bad use|deadlock",
    ),
    (
        "the parity of the first turn",
        "conv2d_fprop/fprop_wgmma vectors",
        "(turn & 1) ^ 1",
        "turn & 1",
        "deadlock",
    ),
    (
        "barriers used before they are made",
        "conv2d_fprop/fprop_wgmma vectors",
        "__syncthreads();",
        "",
        "race|uninitialised",
    ),
    (
        "the descriptor's stride",
        "conv2d_fprop/fprop_wgmma vectors",
        "64ull << 32",
        "32ull << 32",
        "wrong value",
    ),
    (
        "the swizzle of the descriptor",
        "conv2d_fprop/fprop_wgmma vectors",
        "1ull << 62",
        "2ull << 62",
        "bad descriptor",
    ),
    (
        "rows and columns swapped",
        "conv2d_fprop/fprop_wgmma vectors",
        "matrix(a + 32 * k), matrix(b + 32 * k)",
        "matrix(b + 32 * k), matrix(a + 32 * k)",
        "wrong value",
    ),
    (
        "results beyond the image",
        "conv2d_fprop/fprop_wgmma vectors",
        "if (q >= z.Q || p >= z.P || n >= z.N) continue;",
        "",
        "out of bounds|race|wrong value",
    ),
    (
        "results read before the products are done",
        "conv2d_fprop/fprop_wgmma vectors",
        "products_done<0>();",
        "",
        "in flight",
    ),
]


@pytest.mark.parametrize("where, old, new, kinds", [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_fault_in_our_own_kernel_is_caught(where, old, new, kinds):
    name = where.split()[1]
    problem, _, own = where.split()[0].partition("/")
    kernel = next(k for k in registry.kernels(problem, "cuda") if "bfloat16" in k.dtypes and own in k.name)
    case = next(c for c in kernel.problem.cases if c.name == name)
    assert seen(kernel, case, "bfloat16", "there is no such text", "") == "right"
    assert seen(kernel, case, "bfloat16", old, new) in kinds.split("|")


def _bytes(value):
    return np.asarray(by_value(value)).tobytes()


def seen(kernel, case, dtype, old, new) -> str:
    """What comes of a kernel whose source is changed: "right", "wrong value", or the kind of the fault."""
    changed = 0

    def execute(launch: Launch) -> None:
        nonlocal changed
        function = launch.function
        source = compiler.whole_source(Path(function.file))
        changed += old in source
        text = compiler.compile_ptx(source.replace(old, new), function.file.name, function.archs[0], function.options)
        args = [a if is_array(a) or isinstance(a, TensorMap) else _bytes(a) for a in launch.args]
        run(text, function.entry, launch.grid, launch.block, args, launch.shared)

    trial = Trial(kernel.problem, case, dtype)
    with executed_by(execute):
        try:
            trial.compare(trial.run(kernel, "channels_last"), kernel)
        except Wrong as wrong:
            return wrong.__cause__.kind if isinstance(wrong.__cause__, Fault) else wrong.failure
    assert changed or not new, "the text is not in the source any more"
    return "right"
