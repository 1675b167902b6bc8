"""`minires study exercise`: hands out an exercise, and grades what the learner wrote with the kernels' own checks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import numpy as np

from minires.kernels.batchnorm2d.problem import BATCHNORM2D_BWD  # pyright: ignore[reportMissingImports]
from minires.kernels.checking import LAYOUTS, Result, Trial, Wrong, check  # pyright: ignore[reportMissingImports]
from minires.kernels.conv2d.problem import CONV2D_DGRAD, CONV2D_WGRAD  # pyright: ignore[reportMissingImports]
from minires.kernels.elementwise.problem import RELU_BWD  # pyright: ignore[reportMissingImports]
from minires.kernels.pool2d.problem import MAXPOOL2D_BWD  # pyright: ignore[reportMissingImports]
from minires.kernels.registry import TEST, Case, Kernel, Problem  # pyright: ignore[reportMissingImports]

from ..study.exercises import EXERCISES, Exercise
from ..study.op_pages import op_page

FOLDER = Path("runs/study/exercises")
_SMALL = 60_000  # operations: what seven nested loops of Python do in less than a second

_MEANS = {
    "signature": "The parameters must be those of the template, in name and order.",
    "raised": "Your function stopped with an exception.",
    "shape": "A gradient has the shape of what it is the gradient of.",
    "dtype": "Float32 in, float32 out: something turned the numbers into another type.",
    "wrong value": "One eps is the dtype's rounding error; more of them than allowed is no rounding. (inf: no rounding "
    "is due here at all, the number must be exact.)",
    "input changed": "Never write into an argument: others may still need it. Make a new array.",
    "not deterministic": "The same call twice must give the same bits.",
    "stale output": "Something is kept from one call to the next. Make a new array in each call.",
    "non-finite lost": "A NaN must stay visible, or nobody finds out where it began.",
    "layout": "Arrays may be views with any strides (a transposed image, a slice). Do not rely on their memory.",
    "unwritten output": "np.empty holds whatever was in memory: every number of it must be written.",
}


def exercise(name: str | None = None, /, *, file: Path | None = None, hint: int | None = None) -> int:
    """Write an op's backward yourself, and have it graded by the kernels' own checks. Without a name: list them.

    The first call writes the task into a Python file; every later call grades that file. Exit code 0 where all is right
    (and where there was nothing to grade yet), 1 where something is wrong, 2 for bad input.

    Parameters
    ----------
    name
        relu, add, batch_norm, conv2d or max_pool2d.
    file
        Your file; by default runs/study/exercises/NAME.py.
    hint
        Only print hint 1, 2 or 3: from a nudge to nearly the answer.
    """
    if name is None:
        _list()
        return 0
    if name not in EXERCISES:
        raise ValueError(f"there is no exercise {name!r}; there are {', '.join(EXERCISES)}")
    chosen = EXERCISES[name]
    file = FOLDER / f"{name}.py" if file is None else file
    if hint is not None:
        if not 1 <= hint <= len(chosen.hints):
            raise ValueError(f"{name} has no hint {hint}: there are 1 to {len(chosen.hints)}")
        print(f"hint {hint} of {len(chosen.hints)}: {chosen.hints[hint - 1]}")
        return 0
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(chosen.template, encoding="utf-8")
        again = f"minires study exercise {name}" + ("" if file == FOLDER / f"{name}.py" else f" --file {file}")
        print(f"{chosen.task}\n\nThe task is in {file}. Next:")
        print(f"  1. open it, read the task at its head, and write the body of {_names(chosen)} in place of `raise`")
        print(f"  2. {again}   grades it, as often as you like")
        print(f"  3. minires study exercise {name} --hint 1   helps a little; 2 and 3 help more")
        return 0
    return _grade(chosen, file)


def _list() -> None:
    width = max(map(len, EXERCISES))
    for known in EXERCISES.values():
        print(f"{known.name:<{width}}  {known.task}")
    print("\nBegin with one: minires study exercise relu")


def _names(chosen: Exercise) -> str:
    return " and ".join(f"`{f}`" for f in chosen.functions)


def _grade(chosen: Exercise, file: Path) -> int:
    """Print the verdict on a learner's file; 0 where all is right, else 1."""
    written = load(file, chosen.functions)
    verdicts = []
    for function, problem in problems(chosen.name).items():
        print(f"{chosen.name}, {function}:")
        verdicts.append(_grade_one(chosen, written[function], problem, file))
    if not all(verdicts):
        print(f"\nA hint: minires study exercise {chosen.name} --hint 1 (there are {len(chosen.hints)})")
        return 1
    print(
        f"\nAll right: {file} passes the checks that our own kernels have to pass.\n"
        f"Ours, to compare: {op_page(chosen.op).where}"
    )
    return 0


def _grade_one(chosen: Exercise, function: Callable, problem: Problem, file: Path) -> bool:
    """Print a line for each case and the first failure in detail; whether all are right."""
    graded = [(case, grade(function, problem, case)) for case in problem.cases]
    first = next((r for _, found in graded for r in found if not r.ok), None)
    if first is not None and first.detail.startswith("NotImplementedError"):
        print(f"  not written yet ({first.detail})")
        return False
    width = max(len(case.name) for case, _ in graded)
    for case, found in graded:
        last = found[-1]
        seen = f"right ({len(found)} checks)" if last.ok else f"{last.failure} ({last.dtype}, {last.layout})"
        print(f"  {case.name:<{width}}  {seen}")
    right = sum(found[-1].ok for _, found in graded)
    print(
        f"  {right} of {len(graded)} cases right; each is tried in float64 and float32, contiguous and in other strides"
    )
    if first is not None:
        print(f"\nThe first failure, case {first.case.name} in {first.dtype}, {first.layout}:")
        detail = re.sub(r"\boutput (\d+)", lambda output: chosen.gradients[int(output[1])], first.detail)
        print(f"  {first.failure}: {detail}{_line(function, first, file)}")
        print(f"  {_MEANS[first.failure]}")
        trial = Trial(problem, first.case, first.dtype)
        shapes = [f"{key} {a.shape}" for key, a in trial.arrays.items()]
        print(f"  It was called with {', '.join(shapes + [f'{key}={value}' for key, value in trial.params.items()])}.")
    return first is None


def grade(function: Callable, problem: Problem, case: Case) -> list[Result]:
    """The checks of one case up to the first that fails: float64 before float32, contiguous before other strides."""
    kernel = Kernel(problem, "yours", "cpu", 0, "", function, dtypes=("any",))
    found = []
    for dtype in ("float64", "float32"):
        trial = Trial(problem, case, dtype)
        for layout in LAYOUTS:
            if layout != "channels_last" or any(a.ndim == 4 for a in trial.arrays.values()):
                found.append(check(kernel, case, dtype, layout, trial=trial))
                if not found[-1].ok:
                    return found
    return found


def _line(function: Callable, failed: Result, file: Path) -> str:
    """Where in the learner's file an exception came from, if it comes again."""
    try:
        Trial(failed.kernel.problem, failed.case, failed.dtype).run(failed.kernel, failed.layout)
    except Wrong as wrong:
        trace, line = wrong.__cause__ and wrong.__cause__.__traceback__, None
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == str(file):
                line = trace.tb_lineno
            trace = trace.tb_next
        return "" if line is None else f" ({file}, line {line})"
    return ""


def load(file: Path, functions: tuple[str, ...]) -> dict[str, Callable]:
    """The functions of a learner's file. ImportError where it cannot be run, ValueError where a function is missing.

    It is compiled anew each time: Python's cache of bytecode overlooks a second edit within the same second.
    """
    module = ModuleType(file.stem)
    module.__file__ = str(file)
    try:
        code: CodeType = compile(file.read_bytes(), str(file), "exec")
        exec(code, module.__dict__)
    except SyntaxError as error:
        where = f"{file}, line {error.lineno}" if error.lineno else str(file)  # none in a file that is no text
        raise ImportError(f"{where}: {error.msg}") from error
    except OSError:
        raise
    except (Exception, SystemExit) as error:  # whatever the file raises is what is wrong with it
        raise ImportError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    found = {name: getattr(module, name, None) for name in functions}
    for name, function in found.items():
        if not callable(function):
            raise ValueError(f"{file} has no function {name}; move the file away to get the template again")
    return found  # pyright: ignore[reportReturnType]  (all are callable)


# --- what each function is checked against --------------------------------------------------------------------------


def problems(name: str) -> dict[str, Problem]:
    """The problem of each function of an exercise, with its small cases."""
    return {function: _small(problem) for function, problem in _PROBLEMS[name].items()}


def _small(problem: Problem) -> Problem:
    def operations(case: Case) -> int:
        arrays, params = problem.inputs(case, np.random.default_rng(0))
        return problem.flops(*arrays.values(), **params)

    return replace(problem, cases=tuple(c for c in problem.cases if "test" in c.tags and operations(c) <= _SMALL))


def _plainer(whole: Problem, plain: Callable[[Callable], Callable], suits: Callable[[dict[str, Any]], bool]) -> Problem:
    """A problem of the registry with fewer parameters: `plain` makes its functions into those of the learner's
    signature, `suits` says which cases are such."""
    reference = plain(whole.reference)
    names = inspect.signature(reference).parameters

    def inputs(case: Case, rng: np.random.Generator) -> tuple[dict, dict]:
        arrays, params = whole.inputs(case, rng)
        return {k: a for k, a in arrays.items() if k in names}, {k: p for k, p in params.items() if k in names}

    cases = tuple(case for case in whole.cases if "test" in case.tags and suits(dict(case.params)))
    flops, moved = plain(whole.flops), plain(whole.bytes_moved)
    return Problem(whole.name, reference, inputs, cases, flops, moved, plain(whole.error_scale))


def _dgrad(whole: Callable) -> Callable:
    def dgrad(dy, w, *, stride, padding, input_hw):
        return whole(dy, w, stride=stride, padding=padding, dilation=(1, 1), groups=1, input_hw=input_hw)

    return dgrad


def _wgrad(whole: Callable) -> Callable:
    def wgrad(x, dy, *, stride, padding, kernel_hw):
        return whole(x, dy, stride=stride, padding=padding, dilation=(1, 1), groups=1, kernel_hw=kernel_hw)

    return wgrad


def _batch_norm(whole: Callable) -> Callable:
    def backward(dy, x, gamma, mean, inv_std):
        stats = dict(mean=mean, inv_std=inv_std)  # y and beta only tell where a ReLU let through: there is none
        alone = dict(training=True, relu=False, residual=False)
        found = whole(dy=dy, x=x, y=None, gamma=gamma, beta=None, **stats, **alone)
        return found[:3] if isinstance(found, tuple) else found  # without dz; flops and bytes are one number

    return backward


def _max_pool(whole: Callable) -> Callable:
    unread = dict.fromkeys(("kernel", "stride", "padding", "dilation", "ceil_mode"))  # the indices tell

    def backward(dy, indices, *, input_hw):
        return whole(dy, indices, **unread, input_hw=input_hw)

    return backward


def _ungrouped(params: dict[str, Any]) -> bool:
    return params["dilation"] == (1, 1) and params["groups"] == 1


def _trained_alone(params: dict[str, Any]) -> bool:
    """Without means far from 0, too: the blackboard's derivation through variance and mean is right, but adds a sum
    over x - mean that is 0 only as far as the given mean is exact."""
    return params["training"] and not (params["relu"] or params["z"] or params["offset"])


def _add_backward(dy, *, a_shape, b_shape):
    """Every operand's number gets the sum of all dy that it was used for, counted place by place."""
    sums = []
    for shape in (a_shape, b_shape):
        used = np.broadcast_to(np.arange(int(np.prod(shape))).reshape(shape), dy.shape)  # which number stood where
        total = np.zeros(int(np.prod(shape)), dy.dtype)
        np.add.at(total, used.ravel(), dy.ravel())
        sums.append(total.reshape(shape))
    return tuple(sums)


def _add_inputs(case: Case, rng: np.random.Generator) -> tuple[dict, dict]:
    return dict(dy=rng.standard_normal(np.broadcast_shapes(*case.params.values()))), dict(case.params)


_ADD = Problem(
    "add_bwd",
    _add_backward,
    _add_inputs,
    tuple(
        Case(name, dict(a_shape=a, b_shape=b), TEST)
        for name, a, b in (
            ("equal_shapes", (2, 3), (2, 3)),
            ("row", (2, 3), (3,)),
            ("column", (2, 3), (2, 1)),
            ("bias_of_channels", (2, 3, 4, 5), (3, 1, 1)),
            ("both_stretched", (4, 1, 3), (5, 1)),
            ("one_number", (), (3, 4)),
            ("length_1_stays", (1, 3), (1, 1)),
            ("empty", (0, 3), (3,)),
        )
    ),
    flops=lambda dy, **_: 2 * dy.size,
    bytes_moved=lambda dy, **_: 3 * dy.nbytes,
    error_scale=lambda dy, **shapes: _add_backward(np.abs(dy), **shapes),
)

_PROBLEMS: dict[str, dict[str, Problem]] = {
    "relu": {"backward": RELU_BWD},
    "add": {"backward": _ADD},
    "batch_norm": {"backward": _plainer(BATCHNORM2D_BWD, _batch_norm, _trained_alone)},
    "conv2d": {
        "dgrad": _plainer(CONV2D_DGRAD, _dgrad, _ungrouped),
        "wgrad": _plainer(CONV2D_WGRAD, _wgrad, _ungrouped),
    },
    "max_pool2d": {"backward": _plainer(MAXPOOL2D_BWD, _max_pool, lambda _: True)},
}
