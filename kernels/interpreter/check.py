"""The check of a CUDA kernel without a GPU: interpreted, and compared with the definition in float64.

Its verdict is "interpreted", not "right": it says what the PTX means, as we read the PTX ISA. What ptxas and a GPU make
of it is another matter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from ..checking import Result, Trial, Wrong, dtypes_of
from ..cuda.launch import Launch, executed_by
from ..memory import poisoned
from ..registry import Case, Kernel
from .faults import Fault
from .launch import interpret

SCHEDULE = 1  # the seed of the one other schedule that each kernel is run under


def check_interpreted(kernel: Kernel, case: Case, dtype: str, seed: int | None = None) -> Result:
    """Check a CUDA kernel on one case and dtype; ValueError where it does not take them.

    Outputs are full of NaN first, inputs must be unchanged, and the interpreter watches every access. seed: the
    schedule of `launch.run`. A `Fault` is a failure of the name of its kind.
    """
    trial = Trial(kernel.problem, case, dtype)
    if not trial.suits(kernel):
        raise ValueError(f"{kernel.name} does not take the case {case.name!r} in {dtype}")

    def execute(launch: Launch) -> None:
        interpret(launch, seed=seed)

    layout = "channels_last"
    try:
        with poisoned(), executed_by(execute):
            outputs = trial.run(kernel, layout)
        return Result(kernel, case, dtype, layout, trial.compare(outputs, kernel))
    except Wrong as wrong:
        cause = wrong.__cause__
        failure, detail = (cause.kind, str(cause)) if isinstance(cause, Fault) else (wrong.failure, str(wrong))
        return Result(kernel, case, dtype, layout, float("nan"), failure, detail)


def check_all_cases(kernel: Kernel) -> Iterator[Result]:
    """Every test case in every dtype that the kernel takes, all warps in step; the last case of each dtype also under a
    schedule in which warps run in bursts."""
    for dtype in dtypes_of(kernel):
        cases = [c for c in kernel.problem.cases if "test" in c.tags and _takes(kernel, c, dtype)]
        yield from (check_interpreted(kernel, case, dtype) for case in cases)
        yield from (check_interpreted(kernel, case, dtype, SCHEDULE) for case in cases[-1:])


@functools.cache
def _takes(kernel: Kernel, case: Case, dtype: str) -> bool:
    return Trial(kernel.problem, case, dtype).suits(kernel)
