"""Every registered kernel on every test case, in every dtype and memory layout that it takes."""

import minires.kernels  # noqa: F401  (registers)
import numpy as np
import pytest
from minires.kernels import registry
from minires.kernels.checking import DTYPES, Trial, check_case, dtypes_of
from minires.kernels.cpu.features import amx
from minires.kernels.cpu.jit import get_num_threads, set_num_threads
from minires.kernels.registry import HALVES
from numba.core.config import NUMBA_NUM_THREADS

TRIALS = {
    problem.name: [
        Trial(problem, case, dtype) for case in problem.cases if "test" in case.tags for dtype in (*DTYPES, *HALVES)
    ]
    for problem in registry.problems()
}


def _taken(kernel):
    """The trials whose case and dtype the kernel is checked in."""
    return [t for t in TRIALS[kernel.problem.name] if t.dtype in dtypes_of(kernel) and t.suits(kernel)]


def _skip_without_tiles(kernel):
    if "_amx" in kernel.name and not amx():
        pytest.skip("no AMX tiles here; test_amx.py runs them by emulation")


PAIRS = [
    (k, case) for k in registry.kernels(device="cpu") for case in {t.case.name: t.case for t in _taken(k)}.values()
]


@pytest.mark.parametrize("kernel, case", PAIRS, ids=[f"{k.problem.name}-{k.name}-{c.name}" for k, c in PAIRS])
def test_kernel_is_right(kernel, case):
    wrong = [str(result) for result in check_case(kernel, case) if not result.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "name, n, c, hw, k",
    [
        ("wgrad_pointwise", 65, 32, (15, 17), 96),  # pixels: an odd number, shares of several blocks; several panels
        ("fprop_pointwise", 1, 1024, (3, 5), 320),  # two blocks of the sum, two of panels, a tile that hangs over
        ("dgrad_pointwise", 1, 320, (3, 5), 1024),
        ("bias_act_pointwise", 1, 1024, (3, 5), 320),
    ],
)
def test_large_1x1_is_right(name, n, c, hw, k):
    """What these kernels alone cut into several parts; the slow ones, and the interpreter, would take long."""
    kernel = next(kernel for kernel in registry.kernels(device="cpu") if kernel.name == name)
    params = dict(n=n, c=c, hw=hw, k=k, rs=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)
    results = list(check_case(kernel, registry.Case("1x1_stride2", params)))  # a case of this name has z and ReLU
    assert {r.dtype for r in results} == set(dtypes_of(kernel)) and all(r.ok for r in results), results


@pytest.mark.parametrize("kernel", registry.kernels(), ids=lambda k: f"{k.problem.name}-{k.name}")
def test_kernel_takes_a_case_in_every_dtype_that_it_names(kernel):
    """Nothing is left out above in silence: a kernel that takes no case would not be tested at all."""
    _skip_without_tiles(kernel)
    assert {t.dtype for t in _taken(kernel)} == set(dtypes_of(kernel))


@pytest.mark.parametrize("problem", registry.problems(), ids=lambda p: p.name)
def test_problem_is_complete(problem):
    definition = [k for k in registry.kernels(problem.name, "cpu") if k.step == 0]
    assert [k.fn for k in definition] == [problem.reference], "step 0 on the CPU is the definition"
    assert definition[0].dtypes == ("any",)
    assert len({case.name for case in problem.cases}) == len(problem.cases)
    assert any("bench" in case.tags for case in problem.cases)


@pytest.mark.skipif(NUMBA_NUM_THREADS == 1, reason="this process has one thread")
@pytest.mark.parametrize(
    "kernel",
    [k for k in registry.kernels(device="cpu") if k.dtypes != ("any",)],
    ids=lambda k: f"{k.problem.name}-{k.name}",
)
def test_same_bits_on_any_number_of_threads(kernel):
    """On a layer of real size, where the work is split."""
    _skip_without_tiles(kernel)
    trial = next(
        t
        for case in kernel.problem.cases
        if "bench" in case.tags
        for t in [Trial(kernel.problem, case, dtypes_of(kernel)[0])]
        if t.suits(kernel)
    )
    threads = get_num_threads()
    try:
        set_num_threads(NUMBA_NUM_THREADS)
        many = trial.run(kernel)
        set_num_threads(1)
        one = trial.run(kernel)
    finally:
        set_num_threads(threads)
    for a, b in zip(many, one, strict=True):
        np.testing.assert_array_equal(a, b)
