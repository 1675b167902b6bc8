"""Every CUDA kernel of the registry, its PTX interpreted without a GPU, against the float64 definition.

What passes here is "interpreted", not verified on hardware. Launchers, compiler and kernels are those that a GPU runs.
"""

from pathlib import Path

import minires.kernels  # noqa: F401  (registers)
import numpy as np
import pytest
from minires.kernels import registry
from minires.kernels.checking import Trial, dtypes_of
from minires.kernels.conv2d.cuda_shapes import slices_of
from minires.kernels.cuda import compile as compiler
from minires.kernels.cuda.launch import Launch, executed_by
from minires.kernels.interpreter import Fault, run
from minires.kernels.interpreter.check import SCHEDULE, check_interpreted
from needs import nvrtc

nvrtc()

TRIPLES = [
    (kernel, case, dtype)
    for kernel in registry.kernels(device="cuda")
    for case in kernel.problem.cases
    if "test" in case.tags
    for dtype in dtypes_of(kernel)
    if Trial(kernel.problem, case, dtype).suits(kernel)
]
IDS = [f"{k.problem.name}-{k.name}-{c.name}-{d}" for k, c, d in TRIPLES]
LAST = {(k, d): (k, c, d) for k, c, d in TRIPLES}  # one case for each kernel and dtype


@pytest.mark.parametrize("kernel, case, dtype", TRIPLES, ids=IDS)
def test_kernel_is_right_when_interpreted(kernel, case, dtype):
    result = check_interpreted(kernel, case, dtype)
    assert result.ok, result


@pytest.mark.parametrize("kernel, case, dtype", LAST.values(), ids=[f"{k.problem.name}-{k.name}-{d}" for k, d in LAST])
def test_kernel_is_right_when_warps_run_in_bursts(kernel, case, dtype):
    result = check_interpreted(kernel, case, dtype, SCHEDULE)
    assert result.ok, result


# The shared-memory GEMM and the tensor-core convolution of the ladder, with one thing wrong in their source.

_CONV = next(c for c in registry.problem("conv2d_fprop").cases if "test" in c.tags and c.name)
SABOTAGE = [
    # kernel, dtype, what is taken out of the source (all files of it) and what is put there, the failure
    ("fprop_implicit", "float32", "__syncthreads();", ";", "race"),
    ("fprop_vectorised", "float32", "__syncthreads();", ";", "race"),
    ("fprop_tensor", "float16", "__syncthreads();", ";", "race|in flight|uninitialised"),
    ("fprop_tensor", "float16", "cp.async.wait_group", "// cp.async.wait_group", "in flight|uninitialised"),
]


@pytest.mark.parametrize("name, dtype, old, new, kind", SABOTAGE, ids=[f"{s[0]} without {s[2]}" for s in SABOTAGE])
def test_sabotage_of_our_own_kernels_is_caught(name, dtype, old, new, kind):
    kernel = next(k for k in registry.kernels("conv2d_fprop", "cuda") if k.name == name)
    cases = [c for k, c, d in TRIPLES if k is kernel and d == dtype]
    kinds, changed = set(), 0

    def execute(launch: Launch) -> None:
        nonlocal changed
        function = launch.function
        source = compiler.whole_source(Path(function.file))
        changed += old in source
        text = compiler.compile_ptx(source.replace(old, new), function.file.name, function.archs[0], function.options)
        args = [a if isinstance(a, np.ndarray) and a.ndim else np.asarray(_value(a)).tobytes() for a in launch.args]
        run(text, function.entry, launch.grid, launch.block, args, launch.shared)

    for case in cases:
        trial = Trial(kernel.problem, case, dtype)
        with executed_by(execute):
            try:
                kernel(*[None if a is None else a.copy() for a in trial.arrays.values()], **trial.params)
            except Fault as fault:
                kinds.add(fault.kind)
    assert changed and kinds and kinds <= set(kind.split("|")), kinds


def _value(argument):
    from minires.kernels.cuda.launch import by_value

    return by_value(argument)


@pytest.mark.parametrize("seed", [None, SCHEDULE], ids=["in step", "in bursts"])
@pytest.mark.parametrize("name", ["wgrad_vectorised", "wgrad_tensor"])
def test_many_slices_of_a_weight_gradient_are_added_by_several_threads(name, seed):
    """More pixels than the cases have: at least 16 slices, and several threads for a weight."""
    kernel = next(k for k in registry.kernels("conv2d_wgrad", "cuda") if k.name == name)
    about = dict(n=5, c=8, hw=(16, 16), k=8, rs=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)
    assert slices_of(5 * 16 * 16, 1, 32)[0] >= 16 <= slices_of(5 * 16 * 16, 1, 16)[0]
    result = check_interpreted(kernel, registry.Case("many_slices", about), dtypes_of(kernel)[0], seed)
    assert result.ok, result


@pytest.mark.parametrize("pixels, tiles", [(131072, 2), (802816, 5), (50176, 36), (12544, 144), (12544, 700), (40, 1)])
def test_slices_cover_all_pixels_and_fill_the_gpu(pixels, tiles):
    """At layers of ResNet-20 and -50: whole steps, no empty slice, and about as many blocks as run at once, or few
    more than tiles where these are enough already."""
    slices, each = slices_of(pixels, tiles, 32)
    assert each % 32 == 0 and (slices - 1) * each < pixels <= slices * each
    assert slices == 1 or 200 <= slices * tiles <= 4 * 264
    assert slices == 1 or tiles < 264
